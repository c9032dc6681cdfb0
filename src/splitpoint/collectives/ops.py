"""The operators: their schemas, what tracing sees of them, and who serves a call.

| operator | returns |
| --- | --- |
| `allreduce_rmsnorm` | (norm, residual, quantised, scales), see `reference.finish` |
| `allreduce_rmsnorm.both` | (norm, residual): the form of most layers, cheaper to call |
| `allreduce_rmsnorm_` | nothing: the norm lies in `input`, the sum in `residual` |
| `all_reduce` | the sum, in `input`'s dtype |
| `all_reduce_` | nothing: the sum lies in `input` |
| `reduce_scatter` | this rank's share of the sum, dimension 0 split evenly |
| `all_gather` | the ranks' inputs, joined along dimension 0 |

Those that end in _ write to their arguments, the others are functional. `group` is a process
group by the name that functional collectives give it. `input` is [..., hidden], bfloat16, float16
or float32; `residual` has its shape and its dtype or float32, and the sum is returned in the
residual's dtype (the input's when there is none); `weight` is [hidden] of any of these dtypes, and
`weight_bias` is added to it (Gemma's 1 + w). What was not asked for is an empty tensor of shape
(0,).

`algorithm` is "one_shot" (each rank reads everything and computes everything), "two_shot" (each
rank computes its share of the rows and gives it to the others), intervals of the input's bytes
such as "one_shot:16384,two_shot" (`policy.spelled`; up to so many, inclusive, and above), "auto"
(the seeds of `policy`; on NVIDIA FlashInfer's own choice) or "reference" (the group's own
collective, then torch operations). A group without a workspace is served by
the reference whatever the algorithm. Ranks must agree on all arguments but the tensors' values.

Raised by calls: `InvalidCollective`, ValueError or TypeError for arguments without a meaning;
`CollectiveFailed` when a rank died, stalled, or made another call than this one.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import CollectiveFailed
from ..torch_internals import distributed
from . import reference

SCHEMAS = {
    "allreduce_rmsnorm": (
        "(Tensor input, Tensor? residual, Tensor weight, Tensor? quant_scale, *, str group, "
        'float eps, float weight_bias=0.0, str quant="none", bool want_norm=True, '
        'bool want_residual=True, str algorithm="auto") -> '
        "(Tensor norm, Tensor residual, Tensor quantised, Tensor scales)"
    ),
    # From Python, each named argument and each result costs about as much as a small kernel does.
    "allreduce_rmsnorm.both": (
        "(Tensor input, Tensor? residual, Tensor weight, str group, float eps, float weight_bias, "
        "str algorithm) -> (Tensor norm, Tensor residual)"
    ),
    "allreduce_rmsnorm_": (
        "(Tensor(a!) input, Tensor(b!)? residual, Tensor weight, *, str group, float eps, "
        'float weight_bias=0.0, str algorithm="auto") -> ()'
    ),
    "all_reduce": '(Tensor input, *, str group, str algorithm="auto") -> Tensor',
    "all_reduce_": '(Tensor(a!) input, *, str group, str algorithm="auto") -> ()',
    "reduce_scatter": "(Tensor input, *, str group) -> Tensor",
    "all_gather": "(Tensor input, *, str group) -> Tensor",
}
"""The operators of `torch.ops.splitpoint`, by name and overload."""

REFERENCE_NAMESPACE = "splitpoint_reference"
"""Where the same operators always are the reference: C++ finds it here for a group that has no
workspace."""

_lock = threading.Lock()


def register() -> None:
    """Make the operators available, served by the reference; any thread may call it, often."""
    with _lock:
        _register()


@functools.cache  # a library unregisters what it defined when it is collected
def _register() -> tuple[torch.library.Library, ...]:
    libraries = (
        torch.library.Library("splitpoint", "FRAGMENT"),  # type: ignore[no-untyped-call]
        torch.library.Library(REFERENCE_NAMESPACE, "DEF"),  # type: ignore[no-untyped-call]
    )
    for library in libraries:
        for name, schema in SCHEMAS.items():
            library.define(  # type: ignore[no-untyped-call]
                name + schema, tags=(torch.Tag.pt2_compliant_tag,)
            )
            # Less specific than CPU, where C++ comes in before it.
            library.impl(  # type: ignore[no-untyped-call]
                name, getattr(reference, function_of(name)), "CompositeExplicitAutograd"
            )
            torch.library.register_fake(f"{library.ns}::{name}", _FAKES[name], lib=library)
    failures = libraries[1]
    failures.define("failed(str message) -> ()")  # type: ignore[no-untyped-call]
    failures.impl("failed", _failed, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
    return libraries


def _failed(message: str) -> None:
    """What C++ calls to raise an error of this package's."""
    raise CollectiveFailed(message)


def function_of(operator: str) -> str:
    """The name of the Python function that serves an operator."""
    return operator.replace(".", "_")


# --- what tracing sees -----------------------------------------------------------------


def _allreduce_rmsnorm(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    quant_scale: Tensor | None,
    *,
    group: str,
    eps: float,
    weight_bias: float = 0.0,
    quant: str = "none",
    want_norm: bool = True,
    want_residual: bool = True,
    algorithm: str = "auto",
) -> reference.Fused:
    reference.check(input, residual, weight, quant_scale, quant)
    *rows, hidden = input.shape
    kept = input if residual is None else residual
    quantised: tuple[int, ...] = (0,)
    scales: tuple[int, ...] = (0,)
    quantised_dtype, scales_dtype = torch.uint8, torch.float32
    if quant in ("fp8_static", "fp8_token"):
        quantised, quantised_dtype = (*rows, hidden), reference.FP8
    if quant == "fp8_token":
        scales = (*rows, 1)
    if quant == "nvfp4":
        quantised = (*rows, hidden // 2)
        scales, scales_dtype = (*rows, hidden // reference.FP4_BLOCK), reference.FP8
    return reference.Fused(
        input.new_empty(input.shape if want_norm else 0),
        kept.new_empty(kept.shape if want_residual else 0),
        input.new_empty(quantised, dtype=quantised_dtype),
        input.new_empty(scales, dtype=scales_dtype),
    )


def _allreduce_rmsnorm_both(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    group: str,
    eps: float,
    weight_bias: float,
    algorithm: str,
) -> tuple[Tensor, Tensor]:
    made = _allreduce_rmsnorm(input, residual, weight, None, group=group, eps=eps)
    return made.norm, made.residual


def _allreduce_rmsnorm_(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    *,
    group: str,
    eps: float,
    weight_bias: float = 0.0,
    algorithm: str = "auto",
) -> None:
    reference.check(input, residual, weight, None, "none")


def _all_reduce(input: Tensor, *, group: str, algorithm: str = "auto") -> Tensor:
    return input.new_empty(input.shape)


def _all_reduce_(input: Tensor, *, group: str, algorithm: str = "auto") -> None:
    pass


def _reduce_scatter(input: Tensor, *, group: str) -> Tensor:
    rows, *rest = input.shape
    return input.new_empty((rows // distributed.group_of(group).size(), *rest))


def _all_gather(input: Tensor, *, group: str) -> Tensor:
    rows, *rest = input.shape
    return input.new_empty((rows * distributed.group_of(group).size(), *rest))


_FAKES: dict[str, Callable[..., object]] = {
    "allreduce_rmsnorm": _allreduce_rmsnorm,
    "allreduce_rmsnorm.both": _allreduce_rmsnorm_both,
    "allreduce_rmsnorm_": _allreduce_rmsnorm_,
    "all_reduce": _all_reduce,
    "all_reduce_": _all_reduce_,
    "reduce_scatter": _reduce_scatter,
    "all_gather": _all_gather,
}
