"""What a call looks like: which arguments are tensors, where the size is, what is constant.

A `Signature` is read off the first call. It makes example arguments of any size for
capture, and writes the Python source of the checks that every later call runs.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import (
    InvalidDynamicDims,
    SizeMismatch,
    WrongArguments,
)
from ..torch_internals.containers import (
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_unflatten,
)
from .dims import SIZE_ALONE, Dims, Lengths
from .leaves import PLAIN, ConstantLeaf, Leaf, SizeLeaf, TensorLeaf, _contiguous, same_constant
from .mismatch import cache_advice, explain_leaf, explain_nesting, short

DynamicDims = Mapping[str, int | tuple[int, ...] | Mapping[int, Any] | str | None]
"""For each argument that depends on the size: the dimension(s) that are the size, or None
for an integer argument that is the size itself. Where several dimensions change: their names
(or `torch.export.Dim`s) by dimension, or the name of what an integer argument is."""


class Signature:
    """The arguments of one callable, as its first call gave them."""

    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        dynamic_dims: DynamicDims | None,
        max_dims: Mapping[str, int] | None = None,
        size: str | None = None,
        max_size: int = 2**20,
    ) -> None:
        """Read a first call.

        Args:
            function: what is called.
            args: positional arguments of the call.
            kwargs: keyword arguments of the call.
            dynamic_dims: what changes from call to call; None for dimension 0 of every tensor.
            max_dims: the greatest length of each named dimension; the largest size by default.
            size: the size as Python over the names of dimensions; their product by default.
            max_size: the largest size.

        Raises:
            WrongArguments: when the arguments do not fit the callable.
            InvalidDynamicDims: when `dynamic_dims` names what is not there, or no argument
                has the size, or two that should share it do not.
        """
        self.parameters = inspect.signature(function)
        arguments = self.bind(args, kwargs)
        paths, self.spec = tree_flatten_with_path(arguments)
        self.leaves: list[Leaf] = []
        used: set[str] = set()
        names: dict[str, int | None] = {}
        for keys, value in paths:
            path = _path(keys)
            self.leaves.append(_leaf(path, value, dynamic_dims, used, names))
        if dynamic_dims is not None and (unused := set(dynamic_dims) - used):
            raise InvalidDynamicDims(
                f"dynamic_dims names {', '.join(sorted(unused))}, but the call's arguments are "
                f"{', '.join(leaf.path for leaf in self.leaves) or 'none'}"
            )
        self.lengths = self._first_lengths(paths, list(names) or ["size"])
        self.dims = _dims(names, self.lengths, max_dims or {}, size, max_size)
        self.size = self.dims.size_at(self.lengths)
        """That of the first call."""
        self.tensors = [leaf for leaf in self.leaves if isinstance(leaf, TensorLeaf)]

    def _first_lengths(self, paths: list[tuple[Any, Any]], names: Sequence[str]) -> Lengths:
        found: list[dict[str, int]] = [{} for _ in names]
        for leaf, (_, value) in zip(self.leaves, paths, strict=True):
            if isinstance(leaf, TensorLeaf):
                for dim, which in leaf.dynamic.items():
                    found[which][f"{leaf.path}.shape[{dim}]"] = leaf.shape[dim]
            elif isinstance(leaf, SizeLeaf):
                found[leaf.which][leaf.path] = value
        if not any(isinstance(leaf, TensorLeaf) and leaf.dims for leaf in self.leaves):
            raise InvalidDynamicDims(
                "no tensor argument has a dynamic dimension, so calls have no size: name one, "
                "as in dynamic_dims={'input_ids': 0}"
            )
        for name, sizes in zip(names, found, strict=True):
            if len(set(sizes.values())) > 1:
                listing = ", ".join(f"{path} = {size}" for path, size in sizes.items())
                raise InvalidDynamicDims(
                    f"the dynamic dimensions must all be the {name}, but {listing}: name those "
                    f"that are, as in dynamic_dims={{{next(iter(sizes)).split('.')[0]!r}: 0}}"
                )
        return tuple(next(iter(sizes.values())) for sizes in found)

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

    def examples(
        self, lengths: Sequence[int], symbolic: Collection[int]
    ) -> tuple[dict[str, Any], list[torch.Tensor]]:
        """Fresh arguments for lengths of the dynamic dimensions, by parameter name, and the tensors
        among them in order; dimensions in `symbolic` (by index) are marked for a capture that holds
        for other lengths too."""
        values: list[Any] = []
        for leaf in self.leaves:
            if isinstance(leaf, TensorLeaf):
                values.append(leaf.example(lengths, symbolic))
            else:
                values.append(lengths[leaf.which] if isinstance(leaf, SizeLeaf) else leaf.value)
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        return tree_unflatten(values, self.spec), tensors

    def tensors_in(self, arguments: Mapping[str, Any]) -> list[torch.Tensor]:
        """The tensors of a call that fits, in order, from what `bind` returned."""
        values, _ = tree_flatten(dict(arguments))
        return [v for v, leaf in zip(values, self.leaves, strict=True) if _is_tensor(leaf)]

    def kinds(self) -> dict[str, str]:
        """What each argument is, by the path to it."""
        return {leaf.path: _kind(leaf, self.dims.names) for leaf in self.leaves}

    def with_tensors(
        self, lengths: Sequence[int], tensors: Sequence[torch.Tensor]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of a call, from the lengths of its dynamic dimensions
        and the tensors among them in order."""
        left = iter(tensors)
        values: list[Any] = []
        for leaf in self.leaves:
            if isinstance(leaf, TensorLeaf):
                values.append(next(left))
            else:
                values.append(lengths[leaf.which] if isinstance(leaf, SizeLeaf) else leaf.value)
        return self.call_arguments(tree_unflatten(values, self.spec))

    # --- the checks of a call ----------------------------------------------------------

    def explain(self, arguments: Mapping[str, Any]) -> Lengths:
        """Raise the error that says why a call does not fit; if it does after all, return
        the lengths of its dynamic dimensions.

        Raises:
            InputError: one subclass per failure.
        """
        paths, spec = tree_flatten_with_path(dict(arguments))
        if spec != self.spec:
            raise WrongArguments(explain_nesting(self.spec, spec, ""))
        found: dict[int, tuple[str, int]] = {}
        for leaf, (_, value) in zip(self.leaves, paths, strict=True):
            for which, place, length in explain_leaf(leaf, value, self.dims.names):
                first, known = found.setdefault(which, (place, length))
                if length != known:
                    name = self.dims.names[which]
                    raise SizeMismatch(
                        f"{first} is {known} but {place} is {length}: they share the {name}"
                    )
        return tuple(length for _, (_, length) in sorted(found.items()))

    def checks(self, names: dict[str, Any]) -> tuple[list[str], list[str]]:
        """Source of the fast checks of a call.

        Args:
            names: what conditions name, which is added to; several signatures that are given the
                same one write equal conditions alike.

        Returns:
            The conditions that must all be true, over the parameters' names and `LENGTH`s, and, in
            order, the expressions of the tensors. The length of each dynamic dimension is assigned
            by the first condition that can. A false condition proves nothing yet: `explain`
            decides.
        """
        names["_Tensor"] = torch.Tensor
        conditions: list[str] = []
        tensors: list[str] = []
        state = _Checks(names, conditions, tensors)
        leaves = iter(self.leaves)
        for name, child in zip(self.spec.context, self.spec.children(), strict=True):
            state.visit(name, child, leaves)
        return conditions, tensors


@dataclass
class _Checks:
    """Writes the conditions of one signature."""

    names: dict[str, Any]
    conditions: list[str]
    tensors: list[str]
    sized: set[int] = field(default_factory=set)
    """Which dynamic dimensions are assigned already."""
    flats: int = 0
    """How many containers pytree takes apart."""

    def name(self, value: object) -> str:
        for known, other in self.names.items():
            if known.startswith("_k") and same_constant(value, other):
                return known
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
            self.flats += 1
            flat = f"_f{self.flats}"
            self.conditions.append(
                f"({flat} := {self.name(tree_flatten)}({code}))[1] == {self.name(spec)}"
            )
            for index in range(spec.num_leaves):
                self.leaf(f"{flat}[0][{index}]", next(leaves))

    def leaf(self, code: str, leaf: Leaf) -> None:
        add = self.conditions.append
        if isinstance(leaf, ConstantLeaf):
            value = leaf.value
            if value is None or isinstance(value, bool) or not isinstance(value, PLAIN):
                add(f"{code} is {self.name(value)}")
            elif isinstance(value, complex) or value == 0 or value != value:  # -0.0, nan
                kind = self.name(type(value))
                add(f"repr({code}) == {self.name(repr(value))} and type({code}) is {kind}")
            else:
                add(f"{code} == {self.name(value)} and type({code}) is {self.name(type(value))}")
            return
        if isinstance(leaf, SizeLeaf):
            add(f"type({code}) is int")
            self.length(leaf.which, code)
            return
        self.tensors.append(code)
        add(f"isinstance({code}, _Tensor)")
        add(f"{code}.dtype is {self.name(leaf.dtype)}")
        if leaf.device == torch.device("cpu"):
            add(f"{code}.is_cpu")
        else:
            add(f"{code}.device == {self.name(leaf.device)}")
        shape = f"_s{len(self.tensors)}"
        add(f"len({shape} := {code}.shape) == {len(leaf.shape)}")
        dynamic = leaf.dynamic
        for dim, length in enumerate(leaf.shape):
            if dim in dynamic:
                self.length(dynamic[dim], f"{shape}[{dim}]")
            else:
                add(f"{shape}[{dim}] == {length}")
        if leaf.strides == _contiguous(leaf.shape):
            add(f"{code}.is_contiguous()")
        else:
            add(f"{self.name(leaf)}.strides_for({shape}) == {code}.stride()")
        if leaf.dtype.is_floating_point or leaf.dtype.is_complex:
            add(f"not ({code}.requires_grad and _grad)")

    def length(self, which: int, code: str) -> None:
        name = f"{LENGTH}{which}"
        if which in self.sized:
            self.conditions.append(f"{code} == {name}")
        else:
            # Parentheses make it one condition that is true for every length, 0 included.
            self.conditions.append(f"({name} := {code}) >= 0")
            self.sized.add(which)


LENGTH = "_n"
"""With a number, how `Signature.checks` names the lengths of dynamic dimensions."""


def differences(signatures: Sequence[Signature]) -> list[str]:
    """For each of several signatures what of its arguments the others do not have alike."""
    kinds = [signature.kinds() for signature in signatures]
    paths = dict.fromkeys(path for each in kinds for path in each)
    differ = [p for p in paths if len({each.get(p) for each in kinds}) > 1]
    return [", ".join(f"{p} {each.get(p, 'is not there')}" for p in differ) for each in kinds]


def more_dims(signature: Signature, arguments: Mapping[str, Any]) -> dict[str, dict[int, str]]:
    """`dynamic_dims` for which both a signature and a call with tensors of the same ranks fit:
    dimensions that changed alike share a name, as do those that shared one."""
    values, _ = tree_flatten(dict(arguments))
    names: dict[object, str] = {}
    found: dict[str, dict[int, str]] = {}
    for leaf, value in zip(signature.leaves, values, strict=False):
        if not isinstance(leaf, TensorLeaf) or not isinstance(value, torch.Tensor):
            continue
        dynamic = leaf.dynamic
        for dim, (before, now) in enumerate(zip(leaf.shape, value.shape, strict=False)):
            if dim in dynamic:
                key: object = dynamic[dim], now
            elif before != now:
                key = "changed", before, now
            else:
                continue
            own = f"dim{dim}_of_{re.sub(r'[^A-Za-z0-9]+', '_', leaf.path).strip('_')}"
            found.setdefault(leaf.path, {})[dim] = names.setdefault(key, own)
    return found


def changing(signatures: Sequence[Signature]) -> tuple[str, str]:
    """Of several signatures the argument that is new in the last one, or else differs most often,
    with some of its kinds; and what to do about it, where that is known."""
    kinds = [signature.kinds() for signature in signatures]
    table = {
        path: [each.get(path, "is not there") for each in kinds]
        for path in dict.fromkeys(path for each in kinds for path in each)
    }
    caches = [
        (leaf.path, advice)
        for leaf in signatures[-1].leaves
        if isinstance(leaf, ConstantLeaf) and (advice := cache_advice(leaf.value))
    ]
    if caches:  # by their class they all look alike
        return f"{caches[0][0]} is another cache", caches[0][1]
    new = [path for path, (*earlier, now) in table.items() if now not in earlier]
    path = max(new or table, key=lambda path: len(set(table[path])))
    *earlier, now = table[path]
    before = [kind for kind in dict.fromkeys(earlier) if kind != now]
    more = ["..."] if len(before) > _SHOWN else []
    return f"{path} {', '.join([*before[:_SHOWN], *more])}, now {now}", ""


_SHOWN = 4


def _is_tensor(leaf: Leaf) -> bool:
    return isinstance(leaf, TensorLeaf)


def _kind(leaf: Leaf, names: Sequence[str]) -> str:
    if isinstance(leaf, SizeLeaf):
        return f"is the {names[leaf.which]}"
    if isinstance(leaf, ConstantLeaf):
        return f"is {short(leaf.value)}"
    laid_out = "" if leaf.strides == _contiguous(leaf.shape) else f" with strides {leaf.strides}"
    return f"is {str(leaf.dtype).removeprefix('torch.')}{leaf.described(names)}{laid_out}"


def _path(keys: tuple[Any, ...]) -> str:
    """`batch['ids'][0]`: the parameter's name, then the way down from it."""
    return f"{keys[0].key}{keystr(keys[1:])}"


def _leaf(
    path: str,
    value: object,
    dynamic_dims: DynamicDims | None,
    used: set[str],
    names: dict[str, int | None],
) -> Leaf:
    """One argument; the names of its dynamic dimensions go to `names`, with the greatest length
    where a `torch.export.Dim` says it."""
    given: Any = ()
    named = False
    if dynamic_dims is not None:
        parameter = path.split("[")[0].split(".")[0]
        for key in (path, parameter):
            if key in dynamic_dims:
                used.add(key)
                given, named = dynamic_dims[key], True
                break

    def which(name: Any) -> int:
        most = getattr(name, "max", None)
        text = name if isinstance(name, str) else getattr(name, "__name__", None)
        if not isinstance(text, str) or not text.isidentifier() or _RESERVED.fullmatch(text):
            raise InvalidDynamicDims(
                f"dynamic_dims[{path!r}] names a dimension {name!r}: give a name such as 'batch', "
                f"or a torch.export.Dim"
            )
        names.setdefault(text, most if isinstance(most, int) else None)
        return list(names).index(text)

    if isinstance(value, torch.Tensor):
        if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout != torch.strided:
            raise WrongArguments(
                f"{path} is a {type(value).__name__} with layout {value.layout}: only plain "
                f"strided tensors can be captured"
            )
        if dynamic_dims is None:
            given = (0,) if value.dim() else ()
        if given is None or isinstance(given, str):
            raise InvalidDynamicDims(
                f"dynamic_dims[{path!r}] is {given!r}, which is for an integer argument that is "
                f"the size, but {path} is a tensor: name its dimension"
            )
        if not isinstance(given, Mapping):
            given = dict.fromkeys(_as_tuple(given), "size")
        found = {_dim(path, value, d): which(name) for d, name in given.items()}
        shape = tuple(value.shape)
        # A size-1 dimension may carry any stride; a contiguous tensor is written as such.
        strides = _contiguous(shape) if value.is_contiguous() else tuple(value.stride())
        dims = tuple(sorted(found))
        kind = value.dtype, value.device, shape, strides
        return TensorLeaf(path, *kind, dims, tuple(found[dim] for dim in dims))
    if named and (value is not None or isinstance(given, str)):  # None: not there in this call
        if given is not None and not isinstance(given, str):
            if path == parameter:
                raise InvalidDynamicDims(
                    f"dynamic_dims[{path!r}] names dimension {given}, but {path} is "
                    f"{value!r}: only tensors have dimensions (None marks an integer argument "
                    f"that is the size)"
                )
        elif isinstance(value, bool) or not isinstance(value, int):
            raise InvalidDynamicDims(
                f"dynamic_dims[{path!r}] is {given!r}, so {path} must be an integer, got {value!r}"
            )
        else:
            return SizeLeaf(path, which(given or "size"))
    return ConstantLeaf(path, value)


_RESERVED = re.compile(r"math|[avwkhopn]\d+.*|stitched|plain|_.*")
"""Names that generated code has for other things."""


def _dims(
    names: Mapping[str, int | None],
    lengths: Lengths,
    max_dims: Mapping[str, int],
    size: str | None,
    max_size: int,
) -> Dims:
    if not set(names) - {"size"} and not max_dims and size is None:
        return SIZE_ALONE
    if "size" in names:
        raise InvalidDynamicDims(
            "where several dimensions change each must be named, as in "
            "dynamic_dims={'input_ids': {0: 'batch', 1: 'length'}}"
        )
    if unknown := [name for name in max_dims if name not in names]:
        raise InvalidDynamicDims(
            f"max_dims names {', '.join(unknown)}, but the dynamic dimensions are "
            f"{', '.join(names)}"
        )
    largest = [min(max_dims.get(name, most or max_size), max_size) for name, most in names.items()]
    return Dims(
        tuple(names), tuple(largest), size or "*".join(names), tuple(max(1, n) for n in lengths)
    )


def _as_tuple(dims: int | tuple[int, ...]) -> tuple[int, ...]:
    return (dims,) if isinstance(dims, int) else tuple(dims)


def _dim(path: str, value: torch.Tensor, dim: int) -> int:
    if not isinstance(dim, int) or not -value.dim() <= dim < value.dim():
        raise InvalidDynamicDims(
            f"dynamic_dims[{path!r}] is {dim}, but {path} has {value.dim()} dimensions"
        )
    return dim % value.dim()
