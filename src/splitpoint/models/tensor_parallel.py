"""A Llama-family model whose linear layers are split over the ranks of a process group.

Queries, keys, values, gate and up projections are split by rows of their weights, so that each
rank computes its own heads and channels; output and down projections by columns, so that each
rank has a part of the sum, which an all-reduce completes: two of them a layer. Embedding, norms
and the last projection are on every rank.

Heads that do not divide among the ranks are filled up with heads of zeros. A head of zeros has
values of zero, and the columns that would read them are zero: it adds zeros to sums, nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UsageError
from ..torch_internals import distributed
from .stored_weights import StoredTensor, stored_weights

FAMILY = ("llama",)
"""Values of `model_type` that this is the model of."""

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
"""Weights outside the layers; a model whose head is its embedding may have no HEAD."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama-family model."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    eps: float
    rope_theta: float

    @classmethod
    def of(cls, config: Any) -> Shape:
        """The shape of a Hugging Face configuration.

        Raises:
            UsageError: when the model is of another family, or has biases or scaled positions.
        """
        rope = dict(getattr(config, "rope_parameters", None) or {})
        strange = {
            "model_type": (config.model_type, config.model_type in FAMILY),
            "hidden_act": (config.hidden_act, config.hidden_act == "silu"),
            "attention_bias": (config.attention_bias, not config.attention_bias),
            "mlp_bias": (config.mlp_bias, not config.mlp_bias),
            "rope_type": (
                rope.get("rope_type", "default"),
                rope.get("rope_type", "default") == "default",
            ),
        }
        for name, (found, fine) in strange.items():
            if not fine:
                raise UsageError(
                    f"--tp runs models of the Llama family without biases and with plain rotary "
                    f"positions, and this one has {name}={found!r}"
                )
        return cls(
            config.num_hidden_layers,
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.intermediate_size,
            config.rms_norm_eps,
            float(rope.get("rope_theta", 10000.0)),
        )

    def padded(self, ranks: int) -> Shape:
        """With as many key-value heads (each with its query heads) and channels as `ranks`
        divides."""
        kv_heads = -(-self.kv_heads // ranks) * ranks
        return replace(
            self,
            kv_heads=kv_heads,
            heads=kv_heads * (self.heads // self.kv_heads),
            intermediate=-(-self.intermediate // ranks) * ranks,
        )


class RowParallel(nn.Module):
    """[tokens, in / ranks] to [tokens, out]: a part of the sum on each rank, then all-reduced."""

    def __init__(self, weight: Tensor, group: str | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """Take this rank's columns of the input, return the whole output."""
        part = F.linear(x, self.weight)
        return part if self.group is None else distributed.all_reduce(part, self.group)


class Norm(nn.Module):
    """RMSNorm as Llama has it: in fp32, rounded before the weight."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, hidden] to the same."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return torch.mul(self.weight, wide.to(x.dtype))


class Layer(nn.Module):
    """One layer: attention over this rank's heads, and its channels of the MLP."""

    def __init__(
        self, weights: Mapping[str, Tensor], shape: Shape, group: str | None, index: int
    ) -> None:
        super().__init__()
        self.index = index
        self.heads, self.kv_heads, self.head_dim = shape.heads, shape.kv_heads, shape.head_dim
        self.before_attention = Norm(weights["input_layernorm"], shape.eps)
        self.before_mlp = Norm(weights["post_attention_layernorm"], shape.eps)
        qkv = [weights[f"self_attn.{name}_proj"] for name in "qkv"]
        self.qkv = nn.Parameter(torch.cat(qkv), requires_grad=False)
        gate_up = [weights[f"mlp.{name}_proj"] for name in ("gate", "up")]
        self.gate_up = nn.Parameter(torch.cat(gate_up), requires_grad=False)
        self.out = RowParallel(weights["self_attn.o_proj"], group)
        self.down = RowParallel(weights["mlp.down_proj"], group)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cached: tuple[Tensor, Tensor, Tensor] | None
    ) -> Tensor:
        """[tokens, hidden] to the same; `cos` and `sin` are [tokens, head_dim]."""
        x = x + self.out(self.attend(self.before_attention(x), cos, sin, cached))
        gate, up = F.linear(self.before_mlp(x), self.gate_up).chunk(2, dim=-1)
        return torch.add(x, self.down(F.silu(gate) * up))

    def attend(
        self, x: Tensor, cos: Tensor, sin: Tensor, cached: tuple[Tensor, Tensor, Tensor] | None
    ) -> Tensor:
        """Causal attention over the tokens, or over those of a cache, where there is one, and
        these: [tokens, hidden] to [tokens, heads * head_dim]."""
        qkv = F.linear(x, self.qkv).view(-1, self.heads + 2 * self.kv_heads, self.head_dim)
        q, k, v = torch.split(qkv.transpose(0, 1), [self.heads, self.kv_heads, self.kv_heads])
        # [1, heads, tokens, head_dim]
        q, k, v = _rotate(q, cos, sin)[None], _rotate(k, cos, sin)[None], v[None]
        if cached is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            y = y.transpose(1, 2)
        else:
            y = torch.ops.splitpoint.cached_attention(
                q, k, v, *cached, layer=self.index, scale=self.head_dim**-0.5
            )
        return y.reshape(-1, self.heads * self.head_dim)


class TensorParallelLlama(nn.Module):
    """The model of one rank: `forward(ids, positions)` to the logits of the last token. With the
    blocks, steps and tables of a paged cache, tokens follow those that it holds.

    Args:
        state: the whole model's weights, by their Hugging Face names; of those in files only
            the rank's part is read.
        shape: the whole model's.
        group: the process group; None for one rank alone.
        pad_to: the number of ranks that heads are filled up for; the group's by default. With
            no group it makes the one-rank model that the ranks of such a group together are.
    """

    def __init__(
        self,
        state: State,
        shape: Shape,
        group: dist.ProcessGroup | None = None,
        pad_to: int | None = None,
    ) -> None:
        super().__init__()
        rank, ranks = (group.rank(), group.size()) if group is not None else (0, 1)
        name = distributed.group_name(group) if group is not None else None
        whole = shape.padded(pad_to or ranks)
        own = replace(
            whole,
            heads=whole.heads // ranks,
            kv_heads=whole.kv_heads // ranks,
            intermediate=whole.intermediate // ranks,
        )
        self.shape = own
        """This rank's part."""
        self.embedding = nn.Parameter(_all(state[EMBEDDING]), requires_grad=False)
        self.layers = nn.ModuleList(
            Layer(_shard(_weights(state, layer), whole, rank, ranks), own, name, layer)
            for layer in range(shape.layers)
        )
        self.norm = Norm(_all(state[NORM]), shape.eps)
        head = state.get(HEAD)
        self.head = self.embedding if head is None else nn.Parameter(_all(head), False)
        powers = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
        self.register_buffer("frequencies", 1.0 / shape.rope_theta**powers)
        self.frequencies: Tensor

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        blocks: Tensor | None = None,
        steps: Tensor | None = None,
        tables: Tensor | None = None,
    ) -> Tensor:
        """[tokens] ids and their positions to [1, vocabulary] logits; the last three are what
        `cached_attention` takes of a cache, all or none."""
        cached = None
        if blocks is not None and steps is not None and tables is not None:
            cached = blocks, steps, tables
        angles = positions[:, None].float() * self.frequencies
        angles = torch.cat([angles, angles], dim=-1)
        x = F.embedding(ids, self.embedding)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, cached)
        return F.linear(self.norm(x)[-1:], self.head)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x is [heads, tokens, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


# --- weights ---------------------------------------------------------------------------


State = Mapping[str, Tensor] | Mapping[str, StoredTensor]
"""The whole model's weights by their Hugging Face names, in memory or in files."""


def _weights(state: State, layer: int) -> dict[str, Tensor | StoredTensor]:
    """The weights of one layer, by their names inside it."""
    prefix = f"model.layers.{layer}."
    return {
        name.removeprefix(prefix).removesuffix(".weight"): weight
        for name, weight in state.items()
        if name.startswith(prefix)
    }


SPLIT_DIMENSION = {
    "self_attn.q_proj": 0,
    "self_attn.k_proj": 0,
    "self_attn.v_proj": 0,
    "self_attn.o_proj": 1,
    "mlp.gate_proj": 0,
    "mlp.up_proj": 0,
    "mlp.down_proj": 1,
}
"""The dimension of each weight that is split over the ranks; others are whole on each."""


def _split_lengths(shape: Shape) -> dict[str, int]:
    """The length of each weight that is split, along the dimension that is."""
    return {
        "self_attn.q_proj": shape.heads * shape.head_dim,
        "self_attn.k_proj": shape.kv_heads * shape.head_dim,
        "self_attn.v_proj": shape.kv_heads * shape.head_dim,
        "self_attn.o_proj": shape.heads * shape.head_dim,
        "mlp.gate_proj": shape.intermediate,
        "mlp.up_proj": shape.intermediate,
        "mlp.down_proj": shape.intermediate,
    }


def _shard(
    weights: Mapping[str, Tensor | StoredTensor], whole: Shape, rank: int, ranks: int
) -> dict[str, Tensor]:
    """One rank's part of a layer's weights, filled up with zeros to a whole shape."""
    lengths = _split_lengths(whole)
    return {
        name: _part(weight, SPLIT_DIMENSION[name], lengths[name] // ranks, rank)
        if name in lengths
        else _all(weight)
        for name, weight in weights.items()
    }


def _part(weight: Tensor | StoredTensor, dim: int, length: int, rank: int) -> Tensor:
    """The `rank`-th part of a `length` along a dimension, zeros beyond its end."""
    there = weight.shape[dim]
    start = min(rank * length, there)
    stop = min(start + length, there)
    missing = length - (stop - start)
    part = weight.narrow(dim, start, stop - start)
    if missing:
        part = F.pad(part, (0, 0, 0, missing) if dim == 0 else (0, missing))
    return part.contiguous()


def _all(weight: Tensor | StoredTensor) -> Tensor:
    return weight.whole() if isinstance(weight, StoredTensor) else weight


def _in_files(config: Any, shape: Shape, folder: Path, dtype: torch.dtype) -> State | None:
    """The weights in a folder, unless they are something else than what the model reads: then
    transformers says what is wrong, or makes it fit."""
    state = stored_weights(folder, dtype)
    if state is None or getattr(config, "quantization_config", None) is not None:
        return None
    shapes = {EMBEDDING: (config.vocab_size, shape.hidden), NORM: (shape.hidden,)}
    if HEAD in state or not config.tie_word_embeddings:  # transformers uses one that is there
        shapes[HEAD] = (config.vocab_size, shape.hidden)
    of_layer: dict[str, tuple[int, ...]] = {
        name: (length, shape.hidden) if SPLIT_DIMENSION[name] == 0 else (shape.hidden, length)
        for name, length in _split_lengths(shape).items()
    }
    of_layer |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (shape.hidden,))
    for layer in range(shape.layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": each for name, each in of_layer.items()}
    fine = all(name in state and state[name].shape == each for name, each in shapes.items())
    return state if fine else None


def load(
    name: str,
    dtype: torch.dtype,
    group: dist.ProcessGroup | None = None,
    *,
    layers: int | None = None,
    pad_to: int | None = None,
) -> tuple[TensorParallelLlama, Any | None]:
    """One rank's part of a model by name, as `catalogue.load` finds it, and its tokenizer.

    From a folder of safetensors each rank reads its part alone; weights of other kinds (random,
    on the hub, in another format) are whole in its memory until it has taken its part. Quantised
    ones are decoded.

    Raises:
        ModelNotFound: when there is no such model, or its files are damaged.
        UsageError: when it is not of the Llama family, or has fewer layers.
    """
    from . import catalogue

    config, tokenizer, folder = catalogue.find(name, layers=layers)
    shape = Shape.of(config)
    state = _in_files(config, shape, folder, dtype) if folder is not None else None
    if state is None:
        from .quantised.loading import dense_state

        state = dense_state(catalogue.load(name, dtype, layers=layers)[0], dtype)
    part = TensorParallelLlama(state, shape, group, pad_to)
    return part.eval(), tokenizer
