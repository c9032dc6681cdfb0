"""What a call looks like: which arguments are tensors, where the size is, what is constant.

A `Signature` is read off the first call. It makes example arguments of any size for
capture, and writes the Python source of the checks that every later call runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from .. import _torch
from ..errors import (
    GradientRequired,
    InputError,
    InvalidDynamicDims,
    SizeMismatch,
    WrongArguments,
    WrongDevice,
    WrongDimension,
    WrongDtype,
    WrongRank,
    WrongStrides,
    WrongValue,
)

DynamicDims = Mapping[str, int | tuple[int, ...] | None]
"""For each argument that depends on the size: the dimension(s) that are the size, or None
for an integer argument that is the size itself."""

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
"""Types of arguments that are compared by value; all others by identity."""


@dataclass(frozen=True)
class TensorLeaf:
    """A tensor among the arguments."""

    path: str
    """How messages name it, for example `batch['ids']`."""
    dtype: torch.dtype
    device: torch.device
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """Both as at the first call."""
    dims: tuple[int, ...]
    """The dimensions that are the size."""

    def strides_for(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The strides of this layout at another size: those of dimensions outside a dynamic
        one in memory grow with it."""
        strides = list(self.strides)
        for dim in self.dims:
            if self.shape[dim] == 1 == shape[dim]:
                continue
            outer = self.strides[dim] * self.shape[dim]
            for other, stride in enumerate(self.strides):
                if other != dim and stride >= outer and stride % outer == 0 and outer:
                    scale = shape[dim] * strides[dim]
                    strides[other] = strides[other] // outer * scale
        return tuple(strides)

    def stride_at(self, dim: int) -> tuple[int, int]:
        """(a, b) such that the stride of a dimension is a + b * size."""
        at = [
            self.strides_for(tuple(size if d in self.dims else n for d, n in enumerate(self.shape)))
            for size in (2, 3)
        ]
        slope = at[1][dim] - at[0][dim]
        return at[0][dim] - 2 * slope, slope

    def example(self, size: int, dynamic: bool) -> torch.Tensor:
        """A fresh tensor of this kind at a size; its contents are undefined."""
        shape = tuple(size if d in self.dims else n for d, n in enumerate(self.shape))
        tensor = torch.empty_strided(
            shape, self.strides_for(shape), dtype=self.dtype, device=self.device
        )
        for dim in self.dims if dynamic else ():
            _torch.mark_dynamic(tensor, dim)
        return tensor


@dataclass(frozen=True)
class SizeLeaf:
    """An integer argument that is the size."""

    path: str


@dataclass(frozen=True)
class ConstantLeaf:
    """Any other argument: part of what was captured, so it must stay the same."""

    path: str
    value: Any


Leaf = TensorLeaf | SizeLeaf | ConstantLeaf


class Signature:
    """The arguments of one callable, as its first call gave them."""

    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        dynamic_dims: DynamicDims | None,
    ) -> None:
        """Read a first call.

        Raises:
            WrongArguments: when the arguments do not fit the callable.
            InvalidDynamicDims: when `dynamic_dims` names what is not there, or no argument
                has the size, or two that should share it do not.
        """
        self.parameters = inspect.signature(function)
        arguments = self.bind(args, kwargs)
        paths, self.spec = _torch.tree_flatten_with_path(arguments)
        self.leaves: list[Leaf] = []
        used: set[str] = set()
        for keys, value in paths:
            path = _path(keys)
            self.leaves.append(_leaf(path, value, dynamic_dims, used))
        if dynamic_dims is not None and (unused := set(dynamic_dims) - used):
            raise InvalidDynamicDims(
                f"dynamic_dims names {', '.join(sorted(unused))}, but the call's arguments are "
                f"{', '.join(leaf.path for leaf in self.leaves) or 'none'}"
            )
        self.size = self._first_size(paths)
        self.tensors = [leaf for leaf in self.leaves if isinstance(leaf, TensorLeaf)]

    def _first_size(self, paths: list[tuple[Any, Any]]) -> int:
        sizes: dict[str, int] = {}
        for leaf, (_, value) in zip(self.leaves, paths, strict=True):
            if isinstance(leaf, TensorLeaf):
                for dim in leaf.dims:
                    sizes[f"{leaf.path}.shape[{dim}]"] = leaf.shape[dim]
            elif isinstance(leaf, SizeLeaf):
                sizes[leaf.path] = value
        if not any(isinstance(leaf, TensorLeaf) and leaf.dims for leaf in self.leaves):
            raise InvalidDynamicDims(
                "no tensor argument has a dynamic dimension, so calls have no size: name one, "
                "as in dynamic_dims={'input_ids': 0}"
            )
        if len(set(sizes.values())) > 1:
            listing = ", ".join(f"{name} = {size}" for name, size in sizes.items())
            raise InvalidDynamicDims(
                f"the dynamic dimensions must all be the size, but {listing}: name those that "
                f"are, as in dynamic_dims={{{next(iter(sizes)).split('.')[0]!r}: 0}}"
            )
        return next(iter(sizes.values()))

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All parameters by name, defaults included.

        Raises:
            WrongArguments: when the arguments do not fit the callable.
        """
        try:
            bound = self.parameters.bind(*args, **kwargs)
        except TypeError as error:
            raise WrongArguments(f"the arguments do not fit {self.parameters}: {error}") from error
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        for name, parameter in self.parameters.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                # The order in which a call writes its keywords means nothing.
                arguments[name] = dict(sorted(arguments[name].items()))
        return arguments

    def call_arguments(
        self, arguments: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments that pass what `bind` returned."""
        bound = inspect.BoundArguments(self.parameters, dict(arguments))
        return bound.args, bound.kwargs

    def examples(self, size: int, dynamic: bool) -> tuple[dict[str, Any], list[torch.Tensor]]:
        """Fresh arguments at a size, by parameter name, and the tensors among them in order;
        `dynamic` ones are marked for a capture that holds for other sizes too."""
        values: list[Any] = []
        for leaf in self.leaves:
            if isinstance(leaf, TensorLeaf):
                values.append(leaf.example(size, dynamic))
            else:
                values.append(size if isinstance(leaf, SizeLeaf) else leaf.value)
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        return _torch.tree_unflatten(values, self.spec), tensors

    def with_tensors(
        self, size: int, tensors: Sequence[torch.Tensor]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of a call, from its size and the tensors among them
        in order."""
        left = iter(tensors)
        values: list[Any] = []
        for leaf in self.leaves:
            if isinstance(leaf, TensorLeaf):
                values.append(next(left))
            else:
                values.append(size if isinstance(leaf, SizeLeaf) else leaf.value)
        return self.call_arguments(_torch.tree_unflatten(values, self.spec))

    # --- the checks of a call ----------------------------------------------------------

    def explain(self, arguments: Mapping[str, Any]) -> int:
        """Raise the error that says why a call does not fit; if it does after all, return
        its size.

        Raises:
            InputError: one subclass per failure.
        """
        paths, spec = _torch.tree_flatten_with_path(dict(arguments))
        if spec != self.spec:
            raise WrongArguments(_explain_nesting(self.spec, spec, ""))
        size: int | None = None
        first = ""
        for leaf, (_, value) in zip(self.leaves, paths, strict=True):
            for name, dim_size in _explain_leaf(leaf, value):
                if size is None:
                    size, first = dim_size, name
                elif dim_size != size:
                    raise SizeMismatch(
                        f"{first} is {size} but {name} is {dim_size}: they share the size"
                    )
        assert size is not None
        return size

    def checks(self) -> tuple[list[str], dict[str, Any], list[str]]:
        """Source of the fast checks of a call.

        Returns:
            The conditions that must all be true, over the parameters' names and `size`;
            the names those conditions use; and, in order, the expressions of the tensors.
            The first dynamic dimension is assigned to `size` by the first condition that
            can. A false condition proves nothing yet: `explain` decides.
        """
        names: dict[str, Any] = {"Tensor": torch.Tensor}
        conditions: list[str] = []
        tensors: list[str] = []
        state = _Checks(names, conditions, tensors)
        leaves = iter(self.leaves)
        for name, child in zip(self.spec.context, self.spec.children(), strict=True):
            state.visit(name, child, leaves)
        return conditions, names, tensors


@dataclass
class _Checks:
    """Writes the conditions of one signature."""

    names: dict[str, Any]
    conditions: list[str]
    tensors: list[str]
    sized: bool = False

    def name(self, value: object) -> str:
        made = f"_k{len(self.names)}"
        self.names[made] = value
        return made

    def visit(self, code: str, spec: Any, leaves: Any) -> None:
        if spec.is_leaf():
            self.leaf(code, next(leaves))
            return
        count = spec.num_children
        if spec.type in (list, tuple):
            self.conditions.append(
                f"type({code}) is {spec.type.__name__} and len({code}) == {count}"
            )
            for index, child in enumerate(spec.children()):
                self.visit(f"{code}[{index}]", child, leaves)
        elif spec.type is dict:
            keys = list(spec.context)
            self.conditions.append(
                f"type({code}) is dict and len({code}) == {count}"
                + "".join(f" and {self.name(key)} in {code}" for key in keys)
            )
            for key, child in zip(keys, spec.children(), strict=True):
                self.visit(f"{code}[{self.name(key)}]", child, leaves)
        else:
            # Any other registered container is taken apart by pytree itself.
            flat = self.name(None)
            self.conditions.append(
                f"({flat} := {self.name(_torch.tree_flatten)}({code}))[1] == {self.name(spec)}"
            )
            for index in range(spec.num_leaves):
                self.leaf(f"{flat}[0][{index}]", next(leaves))

    def leaf(self, code: str, leaf: Leaf) -> None:
        add = self.conditions.append
        if isinstance(leaf, ConstantLeaf):
            value = leaf.value
            if value is None or isinstance(value, bool) or not isinstance(value, PLAIN):
                add(f"{code} is {self.name(value)}")
            else:
                add(f"{code} == {self.name(value)} and type({code}) is {self.name(type(value))}")
            return
        if isinstance(leaf, SizeLeaf):
            add(f"type({code}) is int")
            self.size(code)
            return
        self.tensors.append(code)
        add(f"isinstance({code}, Tensor)")
        add(f"{code}.dtype is {self.name(leaf.dtype)}")
        if leaf.device == torch.device("cpu"):
            add(f"{code}.is_cpu")
        else:
            add(f"{code}.device == {self.name(leaf.device)}")
        shape = f"_s{len(self.tensors)}"
        add(f"len({shape} := {code}.shape) == {len(leaf.shape)}")
        for dim, length in enumerate(leaf.shape):
            if dim in leaf.dims:
                self.size(f"{shape}[{dim}]")
            else:
                add(f"{shape}[{dim}] == {length}")
        if leaf.strides == _contiguous(leaf.shape):
            add(f"{code}.is_contiguous()")
        else:
            add(f"{self.name(leaf)}.strides_for({shape}) == {code}.stride()")
        if leaf.dtype.is_floating_point or leaf.dtype.is_complex:
            add(f"not ({code}.requires_grad and grad)")

    def size(self, code: str) -> None:
        if self.sized:
            self.conditions.append(f"{code} == size")
        else:
            # Parentheses make it one condition that is true for every size, 0 included.
            self.conditions.append(f"(size := {code}) >= 0")
            self.sized = True


def _path(keys: tuple[Any, ...]) -> str:
    """`batch['ids'][0]`: the parameter's name, then the way down from it."""
    return f"{keys[0].key}{_torch.keystr(keys[1:])}"


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * max(shape[dim + 1], 1)
    return tuple(strides)


def _leaf(path: str, value: object, dynamic_dims: DynamicDims | None, used: set[str]) -> Leaf:
    given: int | tuple[int, ...] | None = ()
    named = False
    if dynamic_dims is not None:
        parameter = path.split("[")[0].split(".")[0]
        for key in (path, parameter):
            if key in dynamic_dims:
                used.add(key)
                given, named = dynamic_dims[key], True
                break
    if isinstance(value, torch.Tensor):
        if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout != torch.strided:
            raise WrongArguments(
                f"{path} is a {type(value).__name__} with layout {value.layout}: only plain "
                f"strided tensors can be captured"
            )
        if dynamic_dims is None:
            given = (0,) if value.dim() else ()
        if given is None:
            raise InvalidDynamicDims(
                f"dynamic_dims[{path!r}] is None, which is for an integer argument that is the "
                f"size, but {path} is a tensor: name its dimension"
            )
        dims = tuple(sorted({_dim(path, value, d) for d in _as_tuple(given)}))
        shape = tuple(value.shape)
        # A size-1 dimension may carry any stride; a contiguous tensor is written as such.
        strides = _contiguous(shape) if value.is_contiguous() else tuple(value.stride())
        return TensorLeaf(path, value.dtype, value.device, shape, strides, dims)
    if named:
        if given is not None:
            if path == parameter:
                raise InvalidDynamicDims(
                    f"dynamic_dims[{path!r}] names dimension {given}, but {path} is "
                    f"{value!r}: only tensors have dimensions (None marks an integer argument "
                    f"that is the size)"
                )
        elif isinstance(value, bool) or not isinstance(value, int):
            raise InvalidDynamicDims(
                f"dynamic_dims[{path!r}] is None, so {path} must be an integer, got {value!r}"
            )
        else:
            return SizeLeaf(path)
    return ConstantLeaf(path, value)


def _as_tuple(dims: int | tuple[int, ...]) -> tuple[int, ...]:
    return (dims,) if isinstance(dims, int) else tuple(dims)


def _dim(path: str, value: torch.Tensor, dim: int) -> int:
    if not isinstance(dim, int) or not -value.dim() <= dim < value.dim():
        raise InvalidDynamicDims(
            f"dynamic_dims[{path!r}] is {dim}, but {path} has {value.dim()} dimensions"
        )
    return dim % value.dim()


def _explain_leaf(leaf: Leaf, value: object) -> list[tuple[str, int]]:
    """Raise what is wrong with one argument; return the sizes it names."""
    path = leaf.path
    if isinstance(leaf, SizeLeaf):
        if isinstance(value, bool) or not isinstance(value, int):
            raise WrongValue(f"{path} must be the size, an integer, got {value!r}")
        return [(path, value)]
    if isinstance(leaf, ConstantLeaf):
        same = value is leaf.value or (
            isinstance(leaf.value, PLAIN)
            and type(value) is type(leaf.value)
            and value == leaf.value
        )
        if not same:
            raise WrongValue(
                f"{path} was {_short(leaf.value)} when the model was captured, got "
                f"{_short(value)}: pass the same value, or compile the model a second time for "
                f"the other"
            )
        return []
    if not isinstance(value, torch.Tensor):
        raise WrongArguments(f"{path} must be a tensor, got {_short(value)}")

    def fail(
        error: type[InputError], what: str, expected: object, got: object, mend: str
    ) -> NoReturn:
        raise error(f"{path}: expected {what} {expected}, got {got}: {mend}")

    if value.dtype != leaf.dtype:
        fail(WrongDtype, "dtype", leaf.dtype, value.dtype, f"convert it with .to({leaf.dtype})")
    if value.device != leaf.device:
        fail(WrongDevice, "device", leaf.device, value.device, f"move it with .to('{leaf.device}')")
    if value.dim() != len(leaf.shape):
        shape = ["size" if d in leaf.dims else n for d, n in enumerate(leaf.shape)]
        fail(
            WrongRank,
            f"{len(leaf.shape)} dimensions",
            f"[{', '.join(map(str, shape))}]",
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
    return [(f"{path}.shape[{dim}]", value.shape[dim]) for dim in leaf.dims]


def _explain_nesting(expected: Any, given: Any, path: str) -> str:
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
            return _explain_nesting(e, g, inner)
    return f"{path}: nested differently than at capture"


def _short(value: object) -> str:
    text = repr(value) if isinstance(value, PLAIN) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
