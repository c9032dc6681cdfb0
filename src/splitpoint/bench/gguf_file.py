"""A model of transformers as a GGUF file, for engines that read those.

Only what is needed to run token numbers through a model of the Llama family; a tokenizer where the
weights came from a GGUF file that has one.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BaselineFailed
from ..kernels.packed_linear import PackedLinear
from ..models.catalogue import gguf_source
from ..paths import cache_folder, make_folder

DENSE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""What GGUF calls the dtypes of weights that are not quantised."""


def gguf_of(model: Any, name: str, kind: str = "") -> Path:
    """The file of a model, made where it is not in the cache folder yet; in another `kind` than its
    weights' dtype where one is given: "F16", "Q8_0", or "Q4_0", in which embeddings are in Q8_0.

    Raises:
        BaselineFailed: when the model is none of the Llama family, or gguf is not installed.
    """
    if model.config.model_type != "llama":
        raise BaselineFailed(f"only models of type llama are written as GGUF, not {name}")
    if any(isinstance(each, PackedLinear) for each in model.modules()):
        raise BaselineFailed(f"{name} is quantised, and only dense weights are written as GGUF")
    try:
        import gguf
    except ImportError as error:
        raise BaselineFailed("gguf is not installed: pip install gguf") from error
    folder = cache_folder() / "gguf"
    kind = kind or DENSE[model.dtype]
    path = folder / f"{_digest(model)}-{kind}.gguf"
    if not path.exists():
        make_folder(folder)
        file, temporary = tempfile.mkstemp(prefix=f".{path.stem}-", dir=folder)
        os.close(file)
        try:
            _write(gguf, model, kind, gguf_source(name), temporary)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    return path


def _digest(model: Any) -> str:
    """Of the configuration and all weights."""
    found = hashlib.sha256(model.config.to_json_string().encode())
    for name, tensor in model.state_dict().items():
        found.update(name.encode())
        found.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()[:20]


def _write(gguf: Any, model: Any, kind: str, source: Path | None, path: str) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    types = gguf.GGMLQuantizationType
    prefix = "ALL" if kind == "F32" else "MOSTLY"
    writer.add_file_type(gguf.LlamaFileType[f"{prefix}_{kind}"])
    if source is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        _copy_tokenizer(gguf, writer, source)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {
        "q_proj.weight": config.num_attention_heads,
        "k_proj.weight": config.num_key_value_heads,
    }
    tied = config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        for ending, count in heads.items():
            if name.endswith(ending):
                tensor = _pairs_together(tensor, count)
        array = tensor.float().contiguous().numpy()
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise BaselineFailed(f"{name} has no place in a GGUF file of a Llama")
        if array.ndim > 1:
            few = known.startswith(("token_embd", "output")) and kind == "Q4_0"
            type_ = types["Q8_0" if few else kind]
            writer.add_tensor(known, gguf.quants.quantize(array, type_), raw_dtype=type_)
        else:
            writer.add_tensor(known, array)
    if config.rope_parameters.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", _rope_factors(config, head_dim).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _pairs_together(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head so that the two that rotate together stand side by side."""
    rows = weight.shape[0]
    halves = weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _rope_factors(config: Any, head_dim: int) -> Tensor:
    """What the rotation's frequencies are divided by, as Llama 3 stretches them."""
    given = config.rope_parameters
    old = given["original_max_position_embeddings"]
    low, high = given["low_freq_factor"], given["high_freq_factor"]
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    waves = 2 * math.pi * given["rope_theta"] ** exponents
    smooth = ((old / waves - low) / (high - low)).clamp(0, 1)
    factors: Tensor = 1 / ((1 - smooth) / given["factor"] + smooth)
    return factors


def _copy_tokenizer(gguf: Any, writer: Any, source: Path) -> None:
    for field in gguf.GGUFReader(str(source)).fields.values():
        if field.name.startswith("tokenizer."):
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, inner)
