"""`Config`: everything a user decides, validated where it is written down.

Longer than 500 lines because each field is checked beside where it is documented.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

from .errors import (
    ConfigError,
    ConflictingFields,
    DuplicatePoint,
    InvalidField,
    InvalidJSON,
    InvalidMaxSize,
    InvalidRange,
    NonIntegerPoint,
    NonPositivePoint,
    NotSerializable,
    PointAboveMax,
    UnknownField,
    UnsortedPoints,
)
from .passes.as_json import pass_from_json, pass_to_json
from .passes.base import Pass
from .passes.batch_invariance import BatchInvariance
from .passes.noop import NoopElimination
from .ranges import Plan, PlannedRange, Range

LARGEST_MAX_SIZE = 2**20

Check = Callable[[str, Any, "Config"], object]
"""Takes a field's name, its value and the configuration; returns the value as it is kept.

Raises a `ConfigError` for a value that cannot be used.
"""

Backend = Literal["inductor", "eager"]
OnGuard = Literal["split", "error"]
OnBreak = Literal["split", "error"]
OnOutOfPlan = Literal["error", "eager"]
Hint = Literal["start", "middle", "end"]
ModuleGuards = Literal["every_call", "first_call"]
Runner = Literal["native", "python"]
Weights = Literal["int8", "int4"]
Activations = Literal["int8"]

OWN_KERNELS = ("gemv", "packed", "onednn")
"""Of what `Config.linear` may name, the kernels for CPU."""

LINEAR_VARIANTS = ("auto", "inductor", "autotuned", *OWN_KERNELS)
"""What `Config.linear` may name for a range."""

ATTENTION_VARIANTS = ("auto", "torch", "rowwise", "blockwise")
"""What `Config.attention` may name for a range."""

ATTENTION_OPS = ("aten::scaled_dot_product_attention", "flex_attention")
"""The splitting ops that apply unless others are named."""

NOT_AUTOTUNED = (
    "compile_sizes are not autotuned, which gains nothing on CPU; "
    'inductor_options={"max_autotune": True} asks for it'
)
"""What a plan says of single sizes that Inductor does not tune."""


@dataclass(frozen=True)
class Config:
    """What to compile and how. Immutable; every field is checked on construction.

    The names of vLLM's `--compilation-config` are accepted for split points
    (`compile_ranges_split_points`, `compile_ranges_endpoints`), so that one can be pasted.

    Raises:
        ConfigError: one subclass per failure; the message names the field, the value
            and the mend.
    """

    max_size: int = 8192
    """Largest size served, from 1 to 2**20."""
    split_points: Sequence[int] = ()
    """Ends (inclusive) of the ranges, ascending: [8, 32] with max_size 100 gives
    [1,8] [9,32] [33,100]."""
    compile_sizes: Sequence[int | tuple[int, ...]] = ()
    """Single sizes with a fully static graph of their own, ascending; each wins over the
    range around it. Where several dimensions change, the length of each: [(8, 128)]. Inductor does
    not autotune them, as it does in vLLM, unless `inductor_options` says so ({"1":
    {"max_autotune": True}}): on CPU its candidates need weights that are constants of the graph, so
    that there is nothing to choose among."""
    cudagraph_capture_sizes: Sequence[int] | None = None
    """On CUDA: sizes whose kernels are recorded as a CUDA graph and replayed, ascending, beside
    those of `compile_sizes`; None for those alone, () for none. They are recorded at the first call
    of one of them; one of `compile_sizes` that is not named here is then called nevertheless where
    a replay of it is not faster. Devices without such graphs refuse sizes by name."""
    pad_to_captured: bool = False
    """Serve a size that is not recorded by the next one that is, where the model's rows do not
    depend on each other nor on how many there are: that is tried on some sizes before, and the plan
    says where it was not so."""
    splitting_ops: Sequence[str] = ATTENTION_OPS
    """Operators the graph is split at, as "namespace::name"; they run as they are between
    the compiled pieces. () compiles the whole graph as one piece."""
    on_guard: OnGuard = "split"
    """What to do when a graph turns out to be valid for a part of its range only: "split"
    the range there and compile both parts, or raise an "error" that names the guard."""
    on_break: OnBreak = "split"
    """What to do where the model cannot be captured as one graph (it branches on data, prints,
    keeps something for the next call): "split" has torch.compile cut it there and run what no graph
    can hold in Python, with a warning, and gives each part the ranges; "error" names the line."""
    on_out_of_plan: OnOutOfPlan = "error"
    """What to do with a size above max_size: raise an "error" or run the model "eager"."""
    backend: Backend = "inductor"
    """What compiles the pieces; "eager" runs them uncompiled, as a reference."""
    inductor_options: Mapping[str, Any] = field(default_factory=dict)
    """Inductor options for all ranges ({"max_autotune": True}), or for those inside a range
    ({"1-8": {"max_autotune": True}}); a range's own win. Their names are checked when a model is
    compiled."""
    passes: Sequence[Pass] = (NoopElimination(),)
    """Graph passes, in the order in which they run; each decides which ranges it is for."""
    linear: str | Mapping[str, str] = "auto"
    """Kernels of linear layers on CPU, by range: "auto" measures this package's against
    Inductor's when a range is compiled, "inductor" leaves them all as they are, and a mapping
    such as {"1-8": "packed", "9-64": "inductor"} names one (`splitpoint.passes.linear.VARIANTS`)
    for the ranges inside each; others are measured. On CUDA "auto" has Inductor tune its GEMMs for
    `compile_sizes`; "autotuned" names that for a range, and tunes for its hint."""
    attention: str | Mapping[str, str] = "auto"
    """Kernels of scaled dot-product attention on CPU, where it is a splitting op, by range:
    "auto" measures this package's against torch's own when a range is compiled, "torch" leaves it
    as it is, and a mapping such as {"1-8": "rowwise", "9-64": "blockwise"} names one
    (`splitpoint.passes.attention.VARIANTS`) for the ranges inside each; others are measured."""
    weights: Weights | None = None
    """What the weights of linear layers on CPU are rounded to when the model is compiled: "int8",
    with one factor a column, or "int4", in groups of 64 (32 where 64 does not divide the layer's
    inputs) with one factor each, and the layer whose result the model returns in int8. All ranges
    compute with them, and activations stay as they are. What cannot be rounded so stays, and the
    plan says why. None leaves weights as they are. Chooses kernels itself: not with `linear`."""
    activations: Activations | None = None
    """What linear layers on CPU whose weights are int8 or 4 bits (`weights`, or the model's own)
    round their input to, row by row as it comes, in ranges where that is measured to be faster by
    10 %: "int8", with a row's largest magnitude over 127 as its scale, so that no value moves by
    more than a 254th of that magnitude. Products are then summed exactly, of 4 bits within each
    group. The plan says which layers do so in which ranges. A row with a value that is not finite
    gives NaN. None leaves inputs as they are. Chooses kernels by measuring: not with `linear`."""
    batch_invariant: bool = False
    """On CPU: a row's result has the same bits whatever the other rows are and however many, and
    with any number of threads. Linear layers get the one kernel that adds in the order of k at all
    sizes, attention is "rowwise", and one graph serves all sizes of one dimension: there are no
    `split_points` and `compile_sizes`; `on_guard` and `on_break` are "error". What a library
    divides by the number of rows (`passes.batch_invariance.VARIES`) is refused by name, and so are
    tensor parallelism and weights of 4 bits. Splitting ops of your own are taken to be so."""
    linear_budget_s: float = 10.0
    """Seconds that measuring for `linear="auto"` and `attention="auto"` may take in all; what is
    not measured by then stays with Inductor and torch."""
    max_packed_bytes: int | None = None
    """Most bytes that copies of weights in other layouts may take; None for no limit. Layers
    over it keep the module's own weight."""
    free_original_weights: bool = False
    """Give back the memory of weights that every range reads in a packed copy. What would read
    such a weight then, the module itself above all, raises `WeightsFreed`; one that is given all
    its values anew is packed and freed again. Not with `lazy` or `background`, as a range that is
    compiled later may need it. `linear="auto"` then chooses among kernels that read copies."""
    mmap_packed_weights: bool = False
    """Keep packed copies of weights in the store as files that are mapped: processes that serve the
    same weights share their memory, and a later start does not pack them. What is mapped was hashed
    by this process, and so were the weights, by whose values it is found. Not copies in oneDNN's
    layout. With `lazy` and `background`, from the start on that finds all compiled."""
    max_signatures: int = 8
    """For how many kinds of arguments the model is captured and compiled at most: None or a
    tensor, dtypes, numbers of dimensions, layouts, nesting, and the values of all other arguments.
    1 refuses arguments that differ from those of the first call, and names them."""
    lazy: bool = False
    """Compile a range when its first call comes, instead of all ranges at the first call."""
    background: bool = False
    """Compile in a thread while calls are served: a size whose range is not compiled yet by the
    compiled graph of a range that holds it too, or by the model itself. The first call captures
    and starts compiling all ranges or, with `lazy`, each when its first call comes."""
    compile_workers: int | None = None
    """How many C++ compilers may run at once, and into how many files the kernels that a start
    needs are divided at least: more take less time, and more CPU time, as each file reads the same
    headers. None for as many compilers as there are cores (`TORCHINDUCTOR_COMPILE_THREADS`), and a
    file for every 16 kernels."""
    hint: Hint = "end"
    """The size inside each range that the compiler tunes for."""
    module_guards: ModuleGuards = "every_call"
    """When to check that the module and the globals it reads are as they were at capture:
    at "every_call", or only at the "first_call" of each range, for an engine that never
    changes its module. Tensors updated in place are followed either way."""
    runner: Runner = "native"
    """What calls the compiled pieces and splitting ops one after the other: a program in C++,
    built with a compiler on first use ("native"; without one it is Python), or a function in
    "python", which does the same more slowly."""
    cache_dir: str | None = None
    """Folder of the store of compiled artifacts; None for `store` in the user's cache folder
    (`SPLITPOINT_CACHE`), "" to keep and use none."""
    compile_ranges_split_points: InitVar[Sequence[int] | None] = None
    compile_ranges_endpoints: InitVar[Sequence[int] | None] = None

    def __post_init__(
        self,
        compile_ranges_split_points: Sequence[int] | None,
        compile_ranges_endpoints: Sequence[int] | None,
    ) -> None:
        for alias, given in (
            ("compile_ranges_split_points", compile_ranges_split_points),
            ("compile_ranges_endpoints", compile_ranges_endpoints),
        ):
            if given is None:
                continue
            if self.split_points and list(self.split_points) != list(given):
                raise ConflictingFields(
                    f"{alias}={list(given)} and split_points={list(self.split_points)} name "
                    f"the same thing: give one of them"
                )
            self._set("split_points", given)
        for name, check in _CHECKS.items():
            self._set(name, check(name, getattr(self, name), self))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def compile_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Those of `compile_sizes` that are lengths of several dimensions."""
        return tuple(each for each in self.compile_sizes if isinstance(each, tuple))

    @property
    def single_sizes(self) -> tuple[int, ...]:
        """Those of `compile_sizes` that are sizes."""
        return tuple(each for each in self.compile_sizes if isinstance(each, int))

    @property
    def recorded_sizes(self) -> tuple[int, ...]:
        """The sizes to record, where the device can."""
        given = self.cudagraph_capture_sizes
        if given is None:
            return self.single_sizes
        return tuple(sorted({*self.single_sizes, *given})) if given else ()

    def hint_for(self, range_: Range) -> int:
        """The size inside a range that the compiler tunes for."""
        if self.hint == "start":
            return range_.start
        if self.hint == "middle":
            return (range_.start + range_.end) // 2
        return range_.end

    def options_for(self, range_: Range) -> dict[str, Any]:
        """Inductor options of a range: those for all ranges, then those of the range it is in."""
        common = {k: v for k, v in self.inductor_options.items() if not _is_range(k)}
        own: dict[str, Any] = {}
        for key, value in self.inductor_options.items():
            if _is_range(key) and _holds(key, range_):
                own |= value
        return common | own

    def unused_keys(self, ranges: Iterable[Range]) -> list[str]:
        """What a plan of these ranges says of the keys of `linear`, `attention` and
        `inductor_options` that hold none of them whole, and so change nothing."""
        ranges = list(ranges)
        return [
            f"{name}[{key!r}] changes nothing: no range of the plan lies in it"
            for name in ("linear", "attention", "inductor_options")
            for key in (getattr(self, name) if not isinstance(getattr(self, name), str) else ())
            if _is_range(key) and not any(_holds(key, each) for each in ranges)
        ]

    def linear_for(self, range_: Range) -> str:
        """The kernel named for a range's linear layers, or "auto"."""
        return _named_for(self.linear, range_)

    def attention_for(self, range_: Range) -> str:
        """The kernel named for a range's attention, or "auto"."""
        return _named_for(self.attention, range_)

    def planned(
        self, range_: Range, only: tuple[tuple[int, int], ...] = (), note: str = ""
    ) -> PlannedRange:
        """The line of the plan that this configuration gives a range."""
        return PlannedRange(
            range_,
            self.hint_for(range_),
            tuple(p.name for p in self.passes if p.applies_to(range_)),
            self.options_for(range_),
            only=only,
            note=note,
        )

    def plan(self) -> Plan:
        """The plan that this asks for, before any model has been seen."""
        starts = [1, *(point + 1 for point in self.split_points)]
        ends = [*self.split_points, self.max_size]
        singles = {Range(size, size) for size in self.single_sizes}
        notes = []
        ranges = set(singles)
        for start, end in zip(starts, ends, strict=True):
            if start > end:  # the last split point is max_size itself
                continue
            wide = Range(start, end)
            if wide not in singles and all(
                Range(size, size) in singles for size in range(start, end + 1)
            ):
                notes.append(f"{wide} gets no graph of its own: compile_sizes has all its sizes")
                continue
            ranges.add(wide)
        if self.backend == "inductor" and any(
            not self.options_for(single).get("max_autotune") for single in singles
        ):
            notes.append(NOT_AUTOTUNED)
        notes += self.unused_keys(ranges)
        return Plan(self.max_size, tuple(map(self.planned, sorted(ranges))), tuple(notes))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled and copied as the arguments it was made from, since its mappings are views."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = {k: _plain(v) if isinstance(v, Mapping) else v for k, v in given.items()}
        return Config.from_dict, (plain,)

    def to_json(self) -> str:
        """The configuration as JSON text; `from_json` gives an equal one back.

        Raises:
            NotSerializable: when a pass cannot be imported by name, or an option is
                not JSON.
        """
        data: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        data["passes"] = [pass_to_json(p) for p in self.passes]
        data = {k: _plain(v) if isinstance(v, Mapping) else v for k, v in data.items()}
        try:
            return json.dumps(data, indent=2)
        except TypeError as error:
            raise NotSerializable(f"inductor_options cannot be written as JSON: {error}") from error

    @classmethod
    def from_json(cls, text: str) -> Config:
        """Read a configuration; fields left out keep their defaults.

        Raises:
            InvalidJSON: when the text is not a JSON object.
            UnknownField: for a field that `Config` does not have.
            ConfigError: as the constructor.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise InvalidJSON(f"this is not JSON: {error}") from error
        if not isinstance(data, dict):
            raise InvalidJSON(f"expected a JSON object of Config fields, got {type(data).__name__}")
        if isinstance(data.get("passes"), list):
            data["passes"] = [pass_from_json(entry) for entry in data["passes"]]
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Config:
        """A configuration from keyword arguments in a mapping.

        Raises:
            UnknownField: for a field that `Config` does not have.
            ConfigError: as the constructor.
        """
        known = set(cls.__dataclass_fields__)
        for name in data:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                fields = f"did you mean {near[0]!r}?" if near else ", ".join(sorted(known))
                raise UnknownField(f"Config has no field {name!r}: {fields}")
        return cls(**data)


def _plain(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return {k: dict(v) if isinstance(v, Mapping) else v for k, v in mapping.items()}


def _max_size(name: str, value: object, config: Config) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidMaxSize(f"max_size must be an integer, got {value!r}")
    if not 1 <= value <= LARGEST_MAX_SIZE:
        raise InvalidMaxSize(f"max_size must be from 1 to {LARGEST_MAX_SIZE}, got {value}")
    return value


def _points(name: str, values: object, config: Config) -> tuple[int, ...]:
    max_size = config.max_size
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise InvalidField(f"{name} must be a list of integers, got {values!r}")
    points: list[int] = []
    for value in values:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise NonIntegerPoint(f"{name} must hold integers, got {value!r}")
        point = operator.index(value)
        if point <= 0:
            raise NonPositivePoint(f"{name} must be 1 or more, got {point}: remove it")
        if point > max_size:
            raise PointAboveMax(
                f"{name} holds {point}, above max_size={max_size}: remove it or raise max_size"
            )
        if points and point == points[-1]:
            raise DuplicatePoint(f"{name} holds {point} twice: keep one")
        if points and point < points[-1]:
            if point in points:
                raise DuplicatePoint(f"{name} holds {point} twice: keep one")
            raise UnsortedPoints(
                f"{name} must ascend, but {point} follows {points[-1]}: "
                f"sort it, {sorted({*points, point})}"
            )
        points.append(point)
    return tuple(points)


def _captured(name: str, values: object, config: Config) -> tuple[int, ...] | None:
    points = None if values is None else _points(name, values, config)
    if points and config.background is True:
        raise InvalidField(
            f"{name} cannot go with background=True: what is recorded has to be compiled first"
        )
    return points


def _sizes(name: str, values: object, config: Config) -> tuple[int | tuple[int, ...], ...]:
    if not isinstance(values, (list, tuple)) or not any(isinstance(v, tuple) for v in values):
        return _points(name, values, config)
    for value in values:
        if not isinstance(value, tuple) or not all(type(n) is int and n > 0 for n in value):
            raise InvalidField(
                f"{name} must hold either sizes or the lengths of several dimensions, such as "
                f"(8, 128), got {value!r}"
            )
    return tuple(dict.fromkeys(values))


def _names(name: str, values: object, config: Config) -> tuple[str, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise InvalidField(
            f"{name} must be a list of operator names such as 'mylib::attention', got {values!r}"
        )
    for value in values:
        if not isinstance(value, str) or not value:
            raise InvalidField(f"{name} must hold names such as 'mylib::attention', got {value!r}")
    return tuple(values)


def _choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InvalidField(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _one_of(kind: Any) -> Check:
    def check(name: str, value: object, config: Config) -> object:
        _choice(name, value, get_args(kind))
        return value

    return check


def _number(name: str, value: object, config: Config) -> object:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
        raise InvalidField(f"{name} must be a number of 0 or more, got {value!r}")
    return value


def _count(name: str, value: object, config: Config) -> object:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidField(f"{name} must be 1 or more, or None, got {value!r}")
    return value


def _flag(name: str, value: object, config: Config) -> object:
    if not isinstance(value, bool):
        raise InvalidField(f"{name} must be True or False, got {value!r}")
    return value


def _flag_of_later_compiles(name: str, value: object, config: Config) -> object:
    if _flag(name, value, config) and config.free_original_weights is True:
        raise InvalidField(
            f"free_original_weights=True cannot go with {name}=True, whose ranges are "
            f"compiled later and may need the weights: leave one of them out"
        )
    return value


def _mapped(name: str, value: object, config: Config) -> object:
    if _flag(name, value, config) and config.cache_dir == "":
        raise InvalidField(
            f"{name}=True keeps files in a store, and cache_dir='' means none: leave one of them "
            f"out"
        )
    return value


def _weights(name: str, value: object, config: Config) -> object:
    if value is None:
        return None
    _choice(name, value, get_args(Weights))
    if config.linear != "auto":
        raise InvalidField(
            f"{name}={value!r} chooses the kernels of linear layers itself, so linear must be "
            f"'auto', got {config.linear!r}: leave one of them out"
        )
    if config.backend == "eager":
        raise InvalidField(
            f"{name}={value!r} needs compiled pieces, and backend='eager' runs them as they are: "
            f"leave one of them out"
        )
    return value


def _activations(name: str, value: object, config: Config) -> object:
    if value is None:
        return None
    _choice(name, value, get_args(Activations))
    for other, wanted in _WHERE_ROUNDED.items():
        if getattr(config, other) not in wanted:
            raise InvalidField(
                f"{name}={value!r} needs {other}={wanted[0]!r}, got {getattr(config, other)!r}: "
                f"leave one of them out"
            )
    return value


_WHERE_ROUNDED: Mapping[str, tuple[object, ...]] = {
    "weights": ("int8", "int4", None),
    "linear": ("auto",),
    "backend": ("inductor",),
}
"""By field: what `activations` goes with; without `weights`, layers of the model have int8 or 4
bits."""


def _batch_invariant(name: str, value: object, config: Config) -> object:
    if not _flag(name, value, config):
        return value
    for other, wanted in _WHERE_INVARIANT.items():
        if getattr(config, other) not in wanted:
            raise InvalidField(
                f"{name}=True needs {other}={' or '.join(map(repr, wanted))}, got "
                f"{getattr(config, other)!r}: leave one of them out"
            )
    config._set("on_guard", "error")
    config._set("on_break", "error")
    if not any(isinstance(each, BatchInvariance) for each in config.passes):
        config._set("passes", (*config.passes, BatchInvariance()))
    return value


_WHERE_INVARIANT: Mapping[str, tuple[object, ...]] = {
    "split_points": ((),),
    "compile_sizes": ((),),
    "backend": ("inductor",),
    "on_out_of_plan": ("error",),
    "background": (False,),
    "linear": ("auto",),
    "attention": ("auto",),
    "weights": (None, "int8"),
}
"""By field: what `batch_invariant` goes with."""


def _path(name: str, value: object, config: Config) -> object:
    if not isinstance(value, (str, os.PathLike)):
        raise InvalidField(f"{name} must be a path or None, got {value!r}")
    return os.fspath(value)


def _or_none(check: Check) -> Check:
    return lambda name, value, config: None if value is None else check(name, value, config)


def _passes(name: str, values: object, config: Config) -> tuple[Pass, ...]:
    if not isinstance(values, Sequence):
        raise InvalidField(f"passes must be a list of splitpoint.Pass objects, got {values!r}")
    for value in values:
        if not isinstance(value, Pass):
            mend = f": write {value.__name__}()" if isinstance(value, type) else ""
            raise InvalidField(f"passes must hold splitpoint.Pass objects, got {value!r}{mend}")
    return tuple(values)


def _by_range(variants: tuple[str, ...]) -> Check:
    return lambda name, value, config: _kernels(name, value, variants)


def _kernels(name: str, value: object, variants: tuple[str, ...]) -> str | Mapping[str, str]:
    # Which variants there are is known where they are defined; here they are only named: "auto",
    # what leaves all as it is, and this package's own.
    automatic, unchanged, *own = variants
    if isinstance(value, str):
        _choice(name, value, (automatic, unchanged))
        return value
    if not isinstance(value, Mapping) or not all(
        isinstance(k, str) and isinstance(v, str) for k, v in value.items()
    ):
        raise InvalidField(
            f"{name} must be {automatic!r}, {unchanged!r} or a dict such as "
            f"{{'1-8': {own[-1]!r}}}, got {value!r}"
        )
    for key, variant in value.items():
        try:
            Range.parse(key)
        except InvalidRange as error:
            raise InvalidField(f"{name}: {error}") from error
        _choice(f"{name}[{key!r}]", variant, variants)
    return MappingProxyType(dict(value))


def _named_for(given: str | Mapping[str, str], range_: Range) -> str:
    if isinstance(given, str):
        return given
    for key, variant in given.items():
        if _holds(key, range_):
            return variant
    return "auto"


def _holds(key: str, range_: Range) -> bool:
    outer = Range.parse(key)
    return outer.start <= range_.start and range_.end <= outer.end


def _is_range(key: str) -> bool:
    return key[:1].isdigit() or key.startswith("[")


def _options(name: str, values: object, config: Config) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise InvalidField(
            f"inductor_options must be a dict such as {{'max_autotune': True}}, got {values!r}"
        )
    for key, value in values.items():
        if not isinstance(key, str):
            raise InvalidField(f"inductor_options keys must be strings, got {key!r}")
        if not _is_range(key):
            continue
        try:
            Range.parse(key)
        except InvalidRange as error:
            raise InvalidField(f"inductor_options: {error}") from error
        if not isinstance(value, Mapping):
            raise InvalidField(
                f"inductor_options[{key!r}] must be a dict of options for that range, got {value!r}"
            )
    return MappingProxyType(dict(values))


_CHECKS: Mapping[str, Check] = {
    "max_size": _max_size,  # before the points, which must not be above it
    "split_points": _points,
    "compile_sizes": _sizes,
    "cudagraph_capture_sizes": _captured,
    "pad_to_captured": _flag,
    "splitting_ops": _names,
    "on_guard": _one_of(OnGuard),
    "on_break": _one_of(OnBreak),
    "on_out_of_plan": _one_of(OnOutOfPlan),
    "backend": _one_of(Backend),
    "hint": _one_of(Hint),
    "module_guards": _one_of(ModuleGuards),
    "runner": _one_of(Runner),
    "linear": _by_range(LINEAR_VARIANTS),
    "attention": _by_range(ATTENTION_VARIANTS),
    "weights": _weights,  # after the backend and the kernels
    "activations": _activations,  # after the weights
    "linear_budget_s": _number,
    "max_packed_bytes": _or_none(_number),
    "max_signatures": _count,
    "compile_workers": _or_none(_count),
    "lazy": _flag_of_later_compiles,
    "background": _flag_of_later_compiles,
    "free_original_weights": _flag,
    "mmap_packed_weights": _mapped,
    "cache_dir": _or_none(_path),
    "passes": _passes,
    "inductor_options": _options,
    "batch_invariant": _batch_invariant,  # after all that it needs
}
"""By field: what it is checked, and normalised, by."""

__all__ = ["ATTENTION_OPS", "Config", "ConfigError"]
