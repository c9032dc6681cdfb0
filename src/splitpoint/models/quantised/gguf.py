"""GGUF files: matrices in Q4_0 stay in 4 bits.

transformers reads the file and decodes it, as it knows the model and the order of its rows. A layer
whose weight the file holds in Q4_0 then gets the file's own values in its place, where they decode
to the very weight that transformers made.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.memory import Streamed
from .decoded import Decoded, packed_linear, signed

log = logging.getLogger("splitpoint")

KEPT = "Q4_0"
"""Blocks of 32 values, -8 to 7, with a float16 scale. Others do not map onto the kernels: Q8_0
has a scale for each 32 values too, where 8 bits need one a row, and Q4_1 and the K kinds have
minima that are no whole steps."""

BLOCK, BLOCK_BYTES = 32, 18


def load_gguf(model_class: Any, file: Path, quantization_config: Any, **how: Any) -> Any:
    """`model_class.from_pretrained` of a GGUF file, with its layers in Q4_0 in 4 bits. Raises what
    that does."""
    model = model_class.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=quantization_config, **how
    )
    kept = keep_blocks(model, file)
    layers = sum(type(each) is nn.Linear for each in model.modules())
    log.info("%s: %d layers stay in 4 bits, %d were decoded", file, len(kept), layers)
    return model


def keep_blocks(model: Any, file: Path) -> list[str]:
    """Put the values of a GGUF file in the place of those layers of a model made of it whose
    weights it holds in Q4_0; the layers' names."""
    import gguf

    reader = gguf.GGUFReader(str(file))
    architecture = reader.fields["general.architecture"].contents()
    kind = next((each for each, it in gguf.MODEL_ARCH_NAMES.items() if it == architecture), None)
    if kind is None:
        return []
    text = model.config.get_text_config(decoder=True)
    names = gguf.get_tensor_name_map(kind, text.num_hidden_layers)
    blocks = {
        tensor.name: tensor.data for tensor in reader.tensors if tensor.tensor_type.name == KEPT
    }
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    kept, memory = [], Streamed()
    for name, module in list(model.named_modules()):
        stored = blocks.get(names.get_name(f"{name}.weight", try_suffixes=(".weight",)))
        if type(module) is not nn.Linear or stored is None or f"{name}.weight" in tied:
            continue
        decoded = _decoded(torch.from_numpy(stored.copy()))
        for order in _row_orders(text, module.out_features):
            turned = Decoded(
                4, decoded.values[order], decoded.scales[order], None, decoded.group_of
            )
            if torch.equal(_dense(turned).to(module.weight.dtype), module.weight):
                model.set_submodule(name, packed_linear(turned, module.bias, memory))
                kept.append(name)
                break
    return kept


def _decoded(blocks: Tensor) -> Decoded:
    """Of the bytes of a matrix, uint8 [n, k / 32 * 18]: a scale each, then 32 values of which the
    first half lies in the lower four bits."""
    n = blocks.shape[0]
    each = blocks.view(n, -1, BLOCK_BYTES)
    scales = each[..., :2].contiguous().view(torch.float16)[..., 0]
    values = torch.cat([each[..., 2:] & 15, each[..., 2:] >> 4], -1)
    group_of = torch.arange(each.shape[1]).repeat_interleave(BLOCK)
    return Decoded(4, signed(values, 4).view(n, -1), scales.float(), None, group_of)


def _dense(weight: Decoded) -> Tensor:
    """The float32 [n, k] of a weight without zero points: exact."""
    return weight.values.float() * weight.scales.repeat_interleave(BLOCK, 1)


def _row_orders(config: Any, rows: int) -> Iterator[Tensor]:
    """The orders in which a file may have the rows of a weight: the model's, or, of queries and
    keys, those of each head that rotate together side by side."""
    yield torch.arange(rows)
    heads = config.num_attention_heads
    for count in {heads, getattr(config, "num_key_value_heads", None) or heads}:
        if rows % (2 * count) == 0:
            yield torch.arange(rows).view(count, rows // count // 2, 2).swapaxes(1, 2).flatten()
