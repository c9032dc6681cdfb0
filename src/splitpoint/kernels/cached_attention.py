"""Attention over a paged cache in plain torch and float64, and how far a correct kernel may be from
it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .bounds import ROUNDOFF, TINY, U32


def pack_steps(
    tokens: Sequence[int], held: Sequence[int], rows: Sequence[int], capacity: int
) -> Tensor:
    """What the operator is told of a step: how many tokens each sequence has in it and had before,
    and its row in the tables; int32, with zeros up to the capacity."""
    starts = [0]
    for count in tokens:
        starts.append(starts[-1] + count)
    used = [len(tokens), *starts, *held, *rows]
    return torch.tensor(used + [0] * (capacity - len(used)), dtype=torch.int32)


def appended(
    key: Tensor, value: Tensor, cache: Tensor, steps: Tensor, tables: Tensor, *, layer: int
) -> Tensor:
    """The cache after a step, as a copy."""
    result = cache.clone()
    for sequence in _sequences(steps, tables):
        mine = slice(sequence.first, sequence.first + sequence.tokens)
        at = torch.arange(sequence.held, sequence.held + sequence.tokens)
        block, inside = sequence.place(at, cache.shape[4])
        result[layer, 0, block, :, inside] = key[0, :, mine].transpose(0, 1)
        result[layer, 1, block, :, inside] = value[0, :, mine].transpose(0, 1)
    return result


@dataclass(frozen=True)
class Expected:
    """What a step's result should be, in float64, and how far each output may be off."""

    exact: Tensor
    allowed: Tensor
    cache: Tensor
    """The cache as it is afterwards."""

    @staticmethod
    def of(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: Tensor,
        steps: Tensor,
        tables: Tensor,
        *,
        layer: int,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        rounds_weights: bool = False,
    ) -> Expected:
        """For the operator's arguments, and a cache as it was before the call.

        Sums are in float32 in any order, as in `attention.bounds`. The softmax is made piece by
        piece: each piece rounds what was summed before by one more factor, of which there are
        fewer than keys / 4. tanh, from exp, is off by less than 8 u. With `rounds_weights` weights
        of bfloat16 inputs are rounded to bfloat16 before they meet the values.
        """
        after = appended(key, value, cache, steps, tables, layer=layer)
        _, heads, count, size = query.shape
        exact = torch.zeros(1, count, heads, size, dtype=torch.float64)
        allowed = torch.full_like(exact, TINY)
        for sequence in _sequences(steps, tables):
            if sequence.tokens == 0:
                continue
            mine = slice(sequence.first, sequence.first + sequence.tokens)
            # Heads that share keys are rows of one product.
            q = query[0, :, mine].double().reshape(key.shape[1], -1, size)
            keys, values = (half.double() for half in sequence.read(after[layer], window))
            seen = _seen(sequence, keys.shape[1], window).repeat(heads // key.shape[1], 1)
            scores = q @ keys.transpose(-1, -2) * scale
            wrong = (size + 4) * U32 * (q.abs() @ keys.abs().transpose(-1, -2)) * abs(scale)
            wrong = wrong + 2 * U32 * scores.abs()
            if softcap > 0:
                scores = softcap * torch.tanh(scores / softcap)
                wrong = wrong + 8 * U32 * softcap
            finite = scores.masked_fill(~seen, 0.0).abs().amax(-1, keepdim=True)
            most = wrong.masked_fill(~seen, 0.0).amax(-1, keepdim=True) + 4 * U32 * finite
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            share = torch.expm1(2 * most) + (4 * keys.shape[1] + 32) * U32
            if rounds_weights:
                share = share + ROUNDOFF[query.dtype]
            right = weights @ values
            error = share * (weights @ values.abs())
            error = error + keys.shape[1] * TINY * (1 + values.abs().amax(-2, True))
            error = error + ROUNDOFF[query.dtype] * (right.abs() + error)
            exact[0, mine] = right.view(heads, -1, size).transpose(0, 1)
            allowed[0, mine] = error.view(heads, -1, size).transpose(0, 1)
        return Expected(exact, allowed, after)

    def exceeded(self, y: Tensor) -> float:
        """The worst error of an output as a multiple of its bound; infinite where it is no
        number."""
        assert y.shape == self.exact.shape, f"{tuple(y.shape)} is not {tuple(self.exact.shape)}"
        share = ((y.double() - self.exact).abs() / self.allowed).nan_to_num(nan=torch.inf)
        return float(share.amax()) if share.numel() else 0.0


@dataclass(frozen=True)
class _Sequence:
    first: int
    tokens: int
    held: int
    blocks: Tensor

    def place(self, positions: Tensor, block_tokens: int) -> tuple[Tensor, Tensor]:
        return self.blocks[positions // block_tokens], positions % block_tokens

    def read(self, layer: Tensor, window: int) -> tuple[Tensor, Tensor]:
        """Keys and values of its positions, zeros where no query sees them."""
        at = torch.arange(self._first_seen(window), self.held + self.tokens)
        block, inside = self.place(at, layer.shape[3])
        halves = layer.new_zeros(2, layer.shape[2], self.held + self.tokens, layer.shape[4])
        for half, stored in zip(halves, layer, strict=True):
            half[:, at] = stored[block, :, inside].transpose(0, 1)
        return halves[0], halves[1]

    def _first_seen(self, window: int) -> int:
        return max(0, self.held - window + 1) if window else 0


def _sequences(steps: Tensor, tables: Tensor) -> Iterator[_Sequence]:
    count, *rest = steps.tolist()
    starts, lengths = rest[: count + 1], rest[count + 1 : 2 * count + 1]
    for i, row in enumerate(rest[2 * count + 1 : 3 * count + 1]):
        yield _Sequence(starts[i], starts[i + 1] - starts[i], lengths[i], tables[row].long())


def _seen(sequence: _Sequence, keys: int, window: int) -> Tensor:
    """Which keys each of a sequence's queries sees."""
    own = torch.arange(sequence.held, sequence.held + sequence.tokens)[:, None]
    at = torch.arange(keys)[None, :]
    seen = at <= own
    return seen & (at > own - window) if window else seen
