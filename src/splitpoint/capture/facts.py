"""What a capture read of a module and its surroundings, in a form that can be kept.

Facts are expressions and descriptions of their values. They hold in another process when the
descriptions are equal there: constants by value, functions and classes by a digest of their
code, modules by name. Facts about a module of the tree are written over `m` and kept once for
all modules that have equal ones, so that thirty equal layers cost little more than one.
"""

from __future__ import annotations

import builtins
import enum
import importlib
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..torch_internals.operators import OPERATOR_TYPES
from .code import (
    Code,
    class_codes,
    class_digest,
    code_digest,
    function_digest,
    functions_of,
    nested,
)
from .methods import Methods, Named
from .module_reads import ModuleReads
from .reads import Cells, Reads

_CHAIN = re.compile(r"\bself((?:\._modules\['[^']*'\])+)")
_STEP = re.compile(r"\['([^']*)'\]")

_WATCHED = re.compile(
    r"(type\()?m(\.\w+)?\)?"
    r"|m\._(modules|parameters|buffers)\['[^']*'\]"
    r"|'\w+' in vars\(m\)"
    r"|hasattr\(m, '\w+'\)"
    r"|tuple\(m\._(modules|parameters|buffers)\)"
    r"|m\.\w+ is (m|self)(\._modules\['[^']*'\])*\.\w+"
)
"""Facts that change only together with a dict of the module tree."""

_PLAIN = (
    *(bool, int, float, complex, str, bytes, type(None), type(...)),
    *(torch.dtype, torch.device, torch.memory_format, torch.layout, torch.Size),
)

_LIBRARIES = ("torch._dynamo", "torch._inductor", "torch._functorch", "torch.fx.experimental")
"""Modules that a warm start need not import: they are what they are in this version of torch."""

_TORCH_FOLDER = str(Path(torch.__file__).parent)
_PYTHON_FOLDER = str(Path(types.__file__ or "").parent)

_GONE = (AttributeError, LookupError, TypeError, ValueError, ImportError, RuntimeError, NameError)
"""What an expression raises whose objects are not there any more."""

Json = Any


class Unprovable(Exception):
    """Something that was read cannot be compared in another process; says what."""


class Describer:
    """Describes values; remembers classes and functions, and whose code they hold."""

    def __init__(self) -> None:
        self.codes: set[str] = set()
        """Digests of the code objects described, those nested in them included."""
        self._known: dict[int, tuple[Any, Json]] = {}
        self._classes: dict[type, str] = {}

    def describe(self, value: Any, note_code: bool = False) -> Json:
        """JSON that is equal in another process if the value means the same there.

        Raises:
            Unprovable: when there is no such thing.
        """
        if isinstance(value, _PLAIN) and not isinstance(value, enum.Enum):
            return [type(value).__name__, repr(value)]
        if isinstance(value, (tuple, list, frozenset, set)):
            parts = [self.describe(each, note_code) for each in value]
            if isinstance(value, (frozenset, set)):
                parts.sort(key=repr)
            return [type(value).__name__, *parts]
        if id(value) not in self._known:
            self._known[id(value)] = (value, self._describe(value, note_code))
        return self._known[id(value)][1]

    def _describe(self, value: Any, note_code: bool) -> Json:
        if isinstance(value, enum.Enum):
            return ["enum", self.describe(type(value), note_code), value.name]
        if isinstance(value, type):
            if note_code:
                self.note(class_codes(value))
            return [
                "class",
                f"{value.__module__}.{value.__qualname__}",
                class_digest(value, self._classes),
            ]
        if isinstance(value, types.ModuleType):
            return ["module", value.__name__]
        if isinstance(value, (types.FunctionType, types.MethodType)):
            if note_code:
                self.note(each.__code__ for each in functions_of(value))
            name = f"{value.__module__}.{value.__qualname__}"
            return ["function", name, function_digest(value)]
        if isinstance(value, Code):
            if note_code:
                self.note([value])
            return ["code", code_digest(value)]
        if isinstance(value, (types.BuiltinFunctionType, types.MethodDescriptorType)):
            return ["builtin", str(getattr(value, "__module__", "")), value.__qualname__]
        if isinstance(value, (types.WrapperDescriptorType, types.GetSetDescriptorType)):
            return ["builtin", value.__objclass__.__qualname__, value.__name__]
        if isinstance(value, OPERATOR_TYPES):
            return ["operator", str(value)]
        raise Unprovable(f"a {type(value).__module__}.{type(value).__qualname__}")

    def note(self, codes: Iterable[Code]) -> None:
        """Add code objects to those described."""
        for code in codes:
            self.codes.update(map(code_digest, nested(code)))


@dataclass(frozen=True)
class Kind:
    """Facts about one module, the same for all modules of a kind."""

    codes: tuple[str, ...]
    """Expressions over `m`, the module, and the other roots."""
    wants: tuple[Json, ...]
    """Descriptions of their values."""


@dataclass
class Facts:
    """All that captures read. `to_json` and `from_json` keep and restore it."""

    kinds: list[Kind] = field(default_factory=list)
    modules: list[tuple[str, int]] = field(default_factory=list)
    """(path in the tree, index of its kind)."""
    loose: Kind = Kind((), ())
    """Facts that are not about one module: of globals, closures, classes."""
    methods: tuple[Named, ...] = ()
    """What of the classes, which are facts of modules, has to stay within a process."""

    def to_json(self) -> Json:
        """Plain lists."""
        kinds = [[list(kind.codes), list(kind.wants)] for kind in [self.loose, *self.kinds]]
        return {
            "kinds": kinds,
            "modules": [list(each) for each in self.modules],
            "methods": [list(each) for each in self.methods],
        }

    @classmethod
    def from_json(cls, data: Json) -> Facts:
        """What `to_json` gave."""
        kinds = [Kind(tuple(codes), tuple(wants)) for codes, wants in data["kinds"]]
        modules = [(str(path), int(index)) for path, index in data["modules"]]
        methods = tuple((str(way), str(where), str(name)) for way, where, name in data["methods"])
        return cls(kinds[1:], modules, kinds[0], methods)


@dataclass(frozen=True)
class Roots:
    """Where the names in expressions are looked up."""

    owner: torch.nn.Module | None
    function: Callable[..., Any]
    """The Python function that was captured (a module's `forward`)."""

    def names(self) -> dict[str, Any]:
        """The namespace of expressions."""
        outer = getattr(self.function, "__func__", self.function)
        scope = getattr(outer, "__globals__", None)
        if scope is None:
            plain = next(functions_of(self.function), None)
            scope = plain.__globals__ if plain else {}
        return names_of(self.owner, Cells.of(outer), scope)


def names_of(
    owner: torch.nn.Module | None, cells: Cells, scope: Mapping[str, Any]
) -> dict[str, Any]:
    """What the names in expressions mean: `self`, `F` (the closure), `G` (globals), `M` (modules),
    `C` (objects by "module:name") and `B` (builtins)."""
    return {
        "self": owner,
        "F": cells,
        "G": scope,
        "M": _Modules(),
        "C": _Objects(),
        "B": vars(builtins),
    }


class _Modules(dict[str, Any]):
    def __missing__(self, name: str) -> Any:
        self[name] = importlib.import_module(name)
        return self[name]


class _Objects(dict[str, Any]):
    def __missing__(self, name: str) -> Any:
        module, _, qualified = name.partition(":")
        found: Any = importlib.import_module(module)
        for part in qualified.split("."):
            found = getattr(found, part)
        self[name] = found
        return found


def collect(
    expressions: Iterable[str], traced: Sequence[Code], roots: Roots, note: Describer
) -> Facts:
    """Facts from expressions that hold now, and proof that they reach all code traced.

    Raises:
        Unprovable: when a value, or a piece of code, cannot be compared in another process.
    """
    by_path: dict[str, dict[str, None]] = {}
    loose: dict[str, None] = {}
    for code in expressions:
        if any(f"M['{name}" in code or f"C['{name}" in code for name in _LIBRARIES):
            continue
        chains = sorted(set(_CHAIN.findall(code)), key=len)
        if not chains:
            loose[code] = None
            continue
        path = ".".join(_STEP.findall(chains[-1]))
        over_m = re.sub(rf"\bself{re.escape(chains[-1])}(?!\._modules\[)", "m", code)
        by_path.setdefault(path, {})[over_m] = None
    if roots.owner is not None:
        for path, module in roots.owner.named_modules(remove_duplicate=False):
            own = by_path.setdefault(path, {})
            own["type(m)"] = None
            own["'forward' in vars(m)"] = None
            if type(module).__module__.startswith("torch."):
                for name, value in vars(module).items():
                    if isinstance(value, (bool, int, float, str, type(None))):
                        own[f"m.{name}"] = None
    names = roots.names()
    facts = Facts()
    kinds: dict[str, int] = {}
    for path, codes in by_path.items():
        module = roots.owner.get_submodule(path) if roots.owner is not None and path else None
        kind = _kind(tuple(codes), {**names, "m": module or roots.owner}, note)
        text = repr(kind)
        if text not in kinds:
            kinds[text] = len(facts.kinds)
            facts.kinds.append(kind)
        facts.modules.append((path, kinds[text]))
    facts.loose = _kind(tuple(loose), names, note)
    for each in functions_of(roots.function):
        note.note([each.__code__])
    for code_object in traced:
        if not _is_library(code_object.co_filename) and code_digest(code_object) not in note.codes:
            raise Unprovable(
                f"code that no guard reaches: {code_object.co_qualname} in "
                f"{code_object.co_filename}"
            )
    return facts


def _is_library(filename: str) -> bool:
    """Whether code comes with torch or Python, whose versions are in every key."""
    if filename.startswith(_PYTHON_FOLDER) and "site-packages" not in filename:
        return True
    return filename.startswith((_TORCH_FOLDER, "<frozen"))


def _kind(codes: tuple[str, ...], names: Mapping[str, Any], note: Describer) -> Kind:
    wants = []
    for code in codes:
        try:
            value = eval(code, dict(names))
        except _GONE as error:
            raise Unprovable(f"{code}, which gives {type(error).__name__}") from error
        try:
            wants.append(note.describe(value, True))
        except Unprovable as what:
            raise Unprovable(f"{code}, which is {what}") from what
    return Kind(codes, tuple(wants))


class Checker:
    """Facts bound to a module: proves them once, then tells whether they still hold."""

    def __init__(self, facts: Facts, roots: Roots) -> None:
        self.facts = facts
        self.roots = roots
        self._values: list[tuple[str, Callable[[Any], tuple[Any, ...]], tuple[Any, ...]]] = []
        self._code: dict[int, tuple[types.FunctionType, Code]] = {}
        self._loose: Callable[[], tuple[Any, ...]] = tuple
        self._loose_now: tuple[Any, ...] = ()
        self._methods = Methods(None, (), roots.function)

    def prove(self, describer: Describer | None = None) -> list[str]:
        """Bind everything; return the facts that do not hold, as text. Nothing may be used
        unless that is empty. `describer` remembers what it described a moment ago."""
        describer = describer or Describer()
        names = self.roots.names()
        broken: list[str] = []
        proven: dict[int, list[tuple[Any, ...]]] = {}
        found = {"": self.roots.owner}
        try:
            functions = [_function(kind.codes, "m", names) for kind in self.facts.kinds]
            self._loose = _function(self.facts.loose.codes, "", names)
        except (ImportError, AttributeError, KeyError) as error:
            return [f"{type(error).__name__}: {error}"]
        for path, index in self.facts.modules:
            kind = self.facts.kinds[index]
            try:
                module = _submodule(found, path)
                values = functions[index](module)
                is_known = any(_same(values, known) for known in proven.get(index, ()))
            except _GONE as error:
                broken.append(f"{path}: {type(error).__name__}: {error}")
                continue
            if not is_known:
                wrong = _differences(kind, values, describer)
                broken += [f"{path or 'the module'}: {text}" for text in wrong]
                if wrong:
                    continue
                proven.setdefault(index, []).append(values)
                self._note_code(values)
            self._values.append((path, functions[index], values))
        try:
            self._loose_now = self._loose()
        except _GONE as error:
            return [*broken, f"{type(error).__name__}: {error}"]
        self._note_code(self._loose_now)
        if not broken:
            self._methods = Methods(self.roots.owner, self.facts.methods, self.roots.function)
        return broken + _differences(self.facts.loose, self._loose_now, describer)

    def _note_code(self, values: Sequence[Any]) -> None:
        for value in values:
            if isinstance(value, types.FunctionType):
                self._code[id(value)] = (value, value.__code__)

    def _has_its_code(self) -> bool:
        """Whether no function was given other code."""
        return all(function.__code__ is code for function, code in self._code.values())

    def rest(self, reads: Reads | None) -> Callable[[], bool]:
        """A function that tells whether what a watch over the module tree does not see is as it
        is now, without what `reads` comes to see."""
        names = self.roots.names()
        unwatched = [
            [code for code in kind.codes if not _WATCHED.fullmatch(code)]
            for kind in self.facts.kinds
        ]
        asked = [ModuleReads.of(codes) for codes in unwatched]
        seen: dict[tuple[str, type], bool] = {}
        parts: dict[tuple[str, ...], list[Any]] = {}
        found = {"": self.roots.owner}
        for path, index in self.facts.modules:
            module = _submodule(found, path)
            left = unwatched[index]
            if reads is not None:
                left = asked[index].unseen(reads, module, {**names, "m": module}, seen)
            if left:
                parts.setdefault(tuple(left), []).append(module)
        loose = [c for c in self.facts.loose.codes if reads is None or not reads.sees(c, names)]
        ways = [(_function(codes, "m", names), modules) for codes, modules in parts.items()]
        checks = [(way, module, way(module)) for way, modules in ways for module in modules]
        if reads is not None:
            self._methods.note(reads)
        read_loose = _function(loose, "", names)
        loose_now = read_loose()

        def holds() -> bool:
            try:
                return (
                    _same(read_loose(), loose_now)
                    and all(_same(function(module), values) for function, module, values in checks)
                    and (reads is not None or (self._has_its_code() and self._methods.holds()))
                )
            except _GONE:
                return False

        return holds

    def holds(self) -> bool:
        """Whether all facts still hold."""
        try:
            found = {"": self.roots.owner}
            for path, function, values in self._values:
                if not _same(function(_submodule(found, path)), values):
                    return False
            return (
                _same(self._loose(), self._loose_now)
                and self._has_its_code()
                and self._methods.holds()
            )
        except _GONE:
            return False

    def explain(self) -> str:
        """Which facts no longer hold."""
        if changed := self._methods.explain():
            return changed
        found = Checker(self.facts, Roots(self.roots.owner, self.roots.function)).prove()
        return "; ".join((found or list(self._replaced()))[:5])

    def _replaced(self) -> Iterator[str]:
        """What is another object than it was, though like it."""
        kinds = dict(self.facts.modules)
        for path, function, known in self._values:
            values = function(_submodule({"": self.roots.owner}, path))
            codes = self.facts.kinds[kinds[path]].codes
            for code, value, before in zip(codes, values, known, strict=True):
                if not _same((value,), (before,)):
                    yield f"{path or 'the module'}: {code} is another object, though like it was"
        loose = zip(self.facts.loose.codes, self._loose(), self._loose_now, strict=True)
        for code, value, before in loose:
            if not _same((value,), (before,)):
                yield f"{code} is another object, though like it was"
        for function, before in self._code.values():
            if function.__code__ is not before:
                yield f"{function.__qualname__} was given other code"


def _same(values: tuple[Any, ...], known: tuple[Any, ...]) -> bool:
    """Whether values are the same constants and objects; 1, True and 1.0 are not, nor 0.0 and
    -0.0."""
    return values == known and all(
        type(a) is type(b) and (a != 0 or repr(a) == repr(b))
        for a, b in zip(values, known, strict=True)
        if a is not b
    )


def _submodule(found: dict[str, Any], path: str) -> Any:
    """The module at a path; `found` has the owner at "", and remembers what is on the way."""
    if path not in found:
        parent, _, name = path.rpartition(".")
        found[path] = _submodule(found, parent)._modules[name]
    return found[path]


def _differences(kind: Kind, values: Sequence[Any], describer: Describer) -> list[str]:
    broken = []
    for code, want, value in zip(kind.codes, kind.wants, values, strict=True):
        try:
            found = describer.describe(value)
        except Unprovable as what:
            found = str(what)
        if found != want:
            broken.append(f"{code} is {_shown(found)}, not {_shown(want)}")
    return broken


def _shown(description: Json) -> str:
    text = str(description[1]) if isinstance(description, list) and len(description) == 2 else ""
    return text or str(description)


_CLASS_DICT = re.compile(r"\bdict\((type\([\w.\[\]']+\)(?:\.__mro__\[\d+\])?\.__dict__)\)")
_FIXED = re.compile(r"\b([MCB])\['([^']*)'\]")


def _function(codes: Sequence[str], parameter: str, names: Mapping[str, Any]) -> Any:
    """A function that returns the values of expressions as a tuple."""
    namespace = dict(names)
    fixed: dict[str, str] = {}

    def name(match: re.Match[str]) -> str:
        made = fixed.setdefault(match[0], f"_{len(fixed)}")
        namespace[made] = names[match[1]][match[2]]
        return made

    text = "".join(f"{code}, " for code in codes)
    # A class's dict need not be copied to be read, nor a module be looked up at each call.
    text = _FIXED.sub(name, _CLASS_DICT.sub(r"\1", text))
    source = f"def values({parameter}):\n    return ({text})\n"
    exec(compile(source, "<splitpoint facts>", "exec"), namespace)
    return namespace["values"]
