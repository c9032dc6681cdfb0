"""How a call's arguments differ from those at capture, in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from ..errors import (
    GradientRequired,
    InputError,
    WrongArguments,
    WrongDevice,
    WrongDimension,
    WrongDtype,
    WrongRank,
    WrongStrides,
    WrongValue,
)
from .leaves import PLAIN, ConstantLeaf, Leaf, SizeLeaf, same_constant


def explain_leaf(leaf: Leaf, value: object, names: Sequence[str]) -> list[tuple[int, str, int]]:
    """Raise what is wrong with one argument; return which dynamic dimensions it has, where, and
    how long they are."""
    path = leaf.path
    if isinstance(leaf, SizeLeaf):
        if isinstance(value, bool) or not isinstance(value, int):
            name = names[leaf.which]
            raise WrongValue(f"{path} must be the {name}, an integer, got {value!r}")
        return [(leaf.which, path, value)]
    if isinstance(leaf, ConstantLeaf):
        if not same_constant(value, leaf.value):
            mend = cache_advice(value) or "pass the same value, or allow more max_signatures"
            raise WrongValue(
                f"{path} was {short(leaf.value)} when the model was captured, got "
                f"{short(value)}: {mend}"
            )
        return []
    if not isinstance(value, torch.Tensor):
        raise WrongArguments(f"{path} must be a tensor, got {short(value)}")

    def fail(
        error: type[InputError], what: str, expected: object, got: object, mend: str
    ) -> NoReturn:
        raise error(f"{path}: expected {what} {expected}, got {got}: {mend}")

    if value.dtype != leaf.dtype:
        fail(WrongDtype, "dtype", leaf.dtype, value.dtype, f"convert it with .to({leaf.dtype})")
    if value.device != leaf.device:
        fail(WrongDevice, "device", leaf.device, value.device, f"move it with .to('{leaf.device}')")
    if value.dim() != len(leaf.shape):
        fail(
            WrongRank,
            f"{len(leaf.shape)} dimensions",
            leaf.described(names),
            list(value.shape),
            "reshape it",
        )
    for dim, length in enumerate(leaf.shape):
        if dim not in leaf.dims and value.shape[dim] != length:
            fail(
                WrongDimension,
                f"dimension {dim} to be",
                length,
                f"{value.shape[dim]} (shape {list(value.shape)})",
                "only the dimensions in dynamic_dims may change from call to call",
            )
    expected = leaf.strides_for(tuple(value.shape))
    if any(
        n > 1 and got != want
        for n, got, want in zip(value.shape, value.stride(), expected, strict=True)
    ):
        fail(
            WrongStrides,
            "strides",
            expected,
            value.stride(),
            "pass it laid out as at capture, for example .contiguous()",
        )
    if value.requires_grad and torch.is_grad_enabled():
        raise GradientRequired(
            f"{path} requires gradients, but compiled models are for inference: call under "
            f"torch.no_grad() or pass {path}.detach()"
        )
    return [(of, f"{path}.shape[{dim}]", value.shape[dim]) for dim, of in leaf.dynamic.items()]


def explain_nesting(expected: Any, given: Any, path: str) -> str:
    """How two pytree specs differ, at the first place where they do."""
    if expected.is_leaf() or given.is_leaf() or expected.type is not given.type:
        want, got = (
            "a single value" if s.is_leaf() else f"a {s.type.__name__}" for s in (expected, given)
        )
        return f"{path}: expected {want} as at capture, got {got}"
    if expected.type is dict:
        missing = [k for k in expected.context if k not in given.context]
        extra = [k for k in given.context if k not in expected.context]
        if missing or extra:
            parts = [f"missing {', '.join(map(repr, missing))}"] if missing else []
            parts += [f"unexpected {', '.join(map(repr, extra))}"] if extra else []
            return f"{path or 'arguments'}: {' and '.join(parts)}, compared with capture"
        keys = [str(k) if not path else f"{path}[{k!r}]" for k in expected.context]
        theirs = dict(zip(given.context, given.children(), strict=True))
        pairs = [
            (k, e, theirs[c])
            for k, e, c in zip(keys, expected.children(), expected.context, strict=True)
        ]
    else:
        if expected.num_children != given.num_children:
            return (
                f"{path}: expected {expected.num_children} elements as at capture, got "
                f"{given.num_children}"
            )
        pairs = [
            (f"{path}[{i}]", e, g)
            for i, (e, g) in enumerate(zip(expected.children(), given.children(), strict=True))
        ]
    for inner, e, g in pairs:
        if e != g:
            return explain_nesting(e, g, inner)
    return f"{path}: nested differently than at capture"


def cache_advice(value: object) -> str:
    """What to do with another cache of keys and values, whose tensors are part of what was
    captured; "" for anything else."""
    if all(kind.__module__ != "transformers.cache_utils" for kind in type(value).__mro__):
        return ""
    return (
        "each cache is captured by itself, so pass one again after its reset(), or call "
        "splitpoint.integrations.transformers.compile(model), which takes any"
    )


def short(value: object) -> str:
    """A value as messages show it."""
    text = repr(value) if isinstance(value, PLAIN) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
