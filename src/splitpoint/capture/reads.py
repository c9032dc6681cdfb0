"""Which dicts, objects and lists the value of an expression depends on.

The facts that a capture relied on are expressions such as `G['F'].silu` or `type(self.config)`.
Walking one notes every place that it reads. While none of these places changes, neither does the
value, and looking at them takes a hundredth of evaluating the expression. What cannot be reduced
to such places (a property, a class with a `__getattribute__` of its own) is refused.
"""

from __future__ import annotations

import ast
import enum
import functools
import gc
import re
import types
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import torch

from ..torch_internals.operators import OPERATOR_TYPES
from .code import functions_of

ABSENT = NotImplemented
"""Stands for the value of a key that a dict does not have."""

_HEAP_TYPE = 1 << 9
"""Of a class's `__flags__`: its attributes can be set."""

_DICTS = (dict, OrderedDict)

_FIXED = (
    *(bool, int, float, complex, str, bytes, type(None), type(...), range, slice),
    *(torch.dtype, torch.device, torch.memory_format, torch.layout, torch.Size, enum.Enum),
    *(type, types.ModuleType, types.CodeType, types.BuiltinFunctionType),
    *(types.MethodDescriptorType, types.WrapperDescriptorType, types.GetSetDescriptorType),
    *OPERATOR_TYPES,
)
"""Values that mean the same for as long as they are the same object."""

_PLAIN_LOOKUPS = (vars(object)["__getattribute__"], vars(types.ModuleType)["__getattribute__"])

_DICT_METHODS = {
    name: [vars(kind)[name] for kind in _DICTS if name in vars(kind)]
    for name in ("__len__", "__iter__")
}

_FUNCTION_FIELDS = ("__code__", "__defaults__", "__kwdefaults__", "__closure__")


class Unwatchable(Exception):
    """An expression whose value does not follow from dicts, objects and lists alone."""


class Cells(Mapping[str, Any]):
    """What the variables of a closure are at the moment, by name."""

    def __init__(self, cells: Mapping[str, types.CellType]) -> None:
        self.cells = cells

    def __getitem__(self, name: str) -> Any:
        return self.cells[name].cell_contents

    def __iter__(self) -> Any:
        return iter(self.cells)

    def __len__(self) -> int:
        return len(self.cells)

    @classmethod
    def of(cls, function: Any) -> Cells:
        """Of a plain function; none for anything else."""
        if not isinstance(function, types.FunctionType):
            return cls({})
        return cls(
            dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        )


Keyed = tuple[dict[Any, Any], dict[Any, Any]]
"""A dict, and what some of its keys have to be: `ABSENT` for those that have to stay out."""


class Reads:
    """Collects the places that expressions read.

    Args:
        tree: ids of the modules, and of their dicts, that are watched as a whole anyway.
    """

    def __init__(self, tree: Collection[int] = ()) -> None:
        self.objects: list[Any] = []
        """Functions, cells, classes and others, whose own fields (code; contents; bases; class
        and dict) may not change."""
        self.lists: list[tuple[list[Any], int]] = []
        """Elements (list, index) that may not change, nor may the list's length."""
        self._on_way: Reads | None = None
        self._keyed: dict[int, tuple[dict[Any, Any], dict[Any, Any]]] = {}
        self._tree = frozenset(tree)
        self._noted: set[Any] = set()
        self._whole: dict[int, dict[Any, Any]] = {}
        self._modules: dict[str, torch.nn.Module] = {}
        self._inherited: dict[tuple[type, str, type | None], Any] = {}
        """What was found in classes before."""
        self._chains: dict[str, Any] = {}
        """What chains of attributes that do not start at `m` lead to."""

    @property
    def whole(self) -> list[dict[Any, Any]]:
        """Dicts nothing in which may change."""
        return list(self._whole.values())

    @property
    def keyed(self) -> list[Keyed]:
        """Dicts some keys of which may not change."""
        return list(self._keyed.values())

    def way(self) -> Reads:
        """What was read of the tree on the way to these places."""
        if self._on_way is None:
            self._on_way = Reads()
        return self._on_way

    def sees(self, code: str, names: Mapping[str, Any]) -> bool:
        """Note what an expression reads, evaluated with `names`; False when that does not decide
        its value."""
        try:
            if hooks := HOOKS_OF.fullmatch(code):
                self._all(self._key(vars(self._module(hooks[1], names)), hooks[2]))
                return True
            chain = _CHAIN.fullmatch(code)
            value = self._chain(code, names) if chain else self._value(_parsed(code), names)
            self._settle(value)
        except (Unwatchable, LookupError):
            return False
        return True

    def follow(self, code: str, names: Mapping[str, Any]) -> Any:
        """The object that an expression leads to, having noted what it reads.

        Raises:
            Unwatchable: when that does not decide which object it is.
        """
        try:
            return self._value(_parsed(code), names)
        except LookupError as error:
            raise Unwatchable from error

    def method(self, kind: type, name: str) -> None:
        """Note what decides which attribute of that name a class or its bases have, and its
        code."""
        for function in functions_of(self._in_classes(kind, name)):
            self._object(function)

    def function(self, function: types.FunctionType) -> None:
        """Note the code of a function."""
        self._object(function)

    def sees_hooks(self, module: torch.nn.Module, names: Sequence[str]) -> bool:
        """`sees` of `len(m.name)` for several of a module's dicts of hooks."""
        own = vars(module)
        try:
            found = {name: own[name] for name in names}
        except KeyError:
            return False
        if id(own) in self._tree:
            self.way().note(own, found)
        else:
            self.note(own, found)
        self._whole.update((id(h), h) for h in found.values() if id(h) not in self._tree)
        return True

    def sees_type(self, module: torch.nn.Module) -> None:
        """`sees` of `type(m)`."""
        self._object(module)

    def note(self, holder: dict[Any, Any], values: Mapping[Any, Any]) -> None:
        """Note what some keys of a dict are."""
        self._keyed.setdefault(id(holder), (holder, {}))[1].update(values)

    def _chain(self, code: str, names: Mapping[str, Any]) -> Any:
        """`_value` of a root and attributes of it. Those of one capture have much in common."""
        if code not in self._chains:
            if code.endswith("]"):
                self._chains[code] = self._value(_parsed(code), names)
            else:
                inner, _, name = code.rpartition(".")
                self._chains[code] = self._attribute(self._chain(inner, names), name)
        return self._chains[code]

    def _module(self, code: str, names: Mapping[str, Any]) -> torch.nn.Module:
        if code == "m":
            return cast(torch.nn.Module, names["m"])
        if code not in self._modules:
            self._modules[code] = self._value(_parsed(code), names)
        return self._modules[code]

    def _settle(self, value: Any) -> None:
        """Note what else a result depends on."""
        if isinstance(value, types.FunctionType):
            self._object(value)
        elif type(value) is tuple:
            for each in value:
                self._settle(each)
        elif not isinstance(value, (*_FIXED, torch.nn.Module)):
            raise Unwatchable

    # --- places ------------------------------------------------------------------------

    def _key(self, holder: dict[Any, Any], key: Any) -> Any:
        """The value of a key of a dict, or `ABSENT`."""
        found = dict.get(holder, key, ABSENT)
        into = self.way() if id(holder) in self._tree else self
        into._keyed.setdefault(id(holder), (holder, {}))[1][key] = found
        return found

    def _object(self, value: Any) -> None:
        if id(value) in self._tree:
            self.way()._object(value)
        elif id(value) not in self._noted:
            self._noted.add(id(value))
            self.objects.append(value)

    def _all(self, holder: Any) -> None:
        """Note a whole dict."""
        if id(holder) not in self._tree:
            self._whole[id(holder)] = holder

    def _element(self, holder: list[Any], index: int) -> None:
        if (id(holder), index) not in self._noted:
            self._noted.add((id(holder), index))
            self.lists.append((holder, index))

    # --- expressions -------------------------------------------------------------------

    def _value(self, node: ast.AST, names: Mapping[str, Any]) -> Any:
        kind = type(node)  # the three that most nodes are, before patterns are tried in turn
        if kind is ast.Constant:
            return cast(ast.Constant, node).value
        if kind is ast.Name:
            return names[cast(ast.Name, node).id]
        if kind is ast.Attribute:
            attribute = cast(ast.Attribute, node)
            return self._attribute(self._value(attribute.value, names), attribute.attr)
        match node:
            case ast.Subscript(ast.Name("M" | "C" as root), ast.Constant(key)):
                return names[root][key]  # which object that is was settled when it was looked up
            case ast.Subscript(inner, key):
                return self._item(self._value(inner, names), self._value(key, names))
            case ast.Tuple(elements):
                return tuple(self._value(each, names) for each in elements)
            case ast.UnaryOp(ast.USub(), ast.Constant(int(value))):
                return -value
            case ast.Call(function, arguments, []):
                return self._call(function, arguments, names)
            case ast.Compare(left, [comparison], [right]):
                return self._compare(comparison, self._value(left, names), right, names)
        raise Unwatchable

    def _compare(
        self, comparison: ast.cmpop, left: Any, right: ast.AST, names: Mapping[str, Any]
    ) -> bool:
        other = self._value(right, names)
        match comparison:
            case ast.Is():
                return left is other
            case ast.IsNot():
                return left is not other
            case ast.In() if type(other) in _DICTS and type(left) in (str, int):
                return self._key(other, left) is not ABSENT
        raise Unwatchable

    def _call(self, function: ast.AST, arguments: list[ast.expr], names: Mapping[str, Any]) -> Any:
        match function, arguments:
            case ast.Attribute(ast.Name("dict"), "__getitem__"), [holder, key]:
                found = self._value(holder, names)
                if isinstance(found, dict):
                    return self._member(found, self._value(key, names))
            case ast.Name("list"), [ast.Call(ast.Attribute(ast.Name("dict"), "keys"), [holder])]:
                found = self._value(holder, names)
                if isinstance(found, dict):
                    self._all(found)
                    return tuple(dict.keys(found))
            case ast.Name("hasattr"), [inner, ast.Constant(str(name))]:
                return self._attribute(self._value(inner, names), name, True) is not ABSENT
            case ast.Name(name), [inner]:
                return self._of_one(name, self._value(inner, names))
        raise Unwatchable

    def _of_one(self, function: str, value: Any) -> Any:
        """The value of a function of one argument."""
        if function == "type":
            self._object(value)
            return type(value)
        if function == "vars":
            return self._own(value)
        if function == "dict" and type(value) in _DICTS:
            return value  # to be read, not to be kept
        if function == "len" and type(value) is list:
            self._element(value, -1)
            return len(value)
        if function not in ("len", "tuple"):
            raise Unwatchable
        if isinstance(value, dict):
            self._object(value)
            method = "__len__" if function == "len" else "__iter__"
            if self._in_classes(type(value), method) not in _DICT_METHODS[method]:
                raise Unwatchable
            self._all(value)
        elif type(value) is not tuple:
            raise Unwatchable
        return len(value) if function == "len" else tuple(value)

    def _item(self, holder: Any, key: Any) -> Any:
        if isinstance(holder, Cells):
            self._object(holder.cells[key])
            return holder[key]
        if type(holder) is tuple:
            return holder[key]
        if type(holder) is list and type(key) is int and 0 <= key < len(holder):
            self._element(holder, key)
            return holder[key]
        if type(holder) in _DICTS:
            return self._member(holder, key)
        raise Unwatchable

    def _member(self, holder: dict[Any, Any], key: Any) -> Any:
        """The value of a key that is there. Comparing keys must not run other code."""
        if not isinstance(key, (str, int, type)) or (found := self._key(holder, key)) is ABSENT:
            raise Unwatchable
        return found

    # --- attributes --------------------------------------------------------------------

    def _attribute(self, value: Any, name: str, may_lack: bool = False) -> Any:
        """An attribute; `ABSENT` where there is none, if that may be."""
        if isinstance(value, types.FunctionType):
            if name not in _FUNCTION_FIELDS:
                raise Unwatchable
            self._object(value)
            return getattr(value, name)
        if isinstance(value, types.CellType):
            self._object(value)
            return value.cell_contents
        if type(value) is types.MethodType and name in ("__self__", "__func__"):
            return getattr(value, name)
        if type(value) is property and name in ("fget", "fset", "fdel"):
            return getattr(value, name)
        if name == "__class__":
            if self._in_classes(type(value), name, but=object) is not ABSENT:
                raise Unwatchable
            self._object(value)
            return type(value)
        if isinstance(value, type):
            return self._of_class(value, name)
        return self._of_instance(value, name, may_lack)

    def _of_class(self, value: type, name: str) -> Any:
        kind = type(value)
        if kind.__getattribute__ is not type.__getattribute__:
            raise Unwatchable
        self._object(value)
        if name == "__mro__":
            return value.__mro__
        if name == "__dict__":
            return _class_dict(value)
        if _is_data_descriptor(self._in_classes(kind, name)):
            raise Unwatchable
        return _plain(self._in_classes(value, name))

    def _of_instance(self, value: Any, name: str, may_lack: bool) -> Any:
        kind = type(value)
        own = self._own(value)
        lookup = self._in_classes(kind, "__getattribute__")
        if not any(lookup is plain for plain in _PLAIN_LOOKUPS):
            # What a look-up in Python reads was read by the capture, too, and has facts of its
            # own. It is taken for what it is only where it gives what the plain one does.
            if not isinstance(lookup, types.FunctionType):
                raise Unwatchable
            self._object(lookup)
            if getattr(value, name, ABSENT) is not own.get(name, ABSENT):
                raise Unwatchable
        if name == "__dict__":
            return own
        inherited = self._in_classes(kind, name)
        if _is_data_descriptor(inherited):
            raise Unwatchable
        if (found := self._key(own, name)) is not ABSENT:
            return found
        if inherited is not ABSENT:
            return _plain(inherited)
        if isinstance(value, torch.nn.Module) and kind.__getattr__ is torch.nn.Module.__getattr__:
            for place in ("_parameters", "_buffers", "_modules"):
                if (found := self._key(own[place], name)) is not ABSENT:
                    return found
        elif may_lack and self._in_classes(kind, "__getattr__") is ABSENT:
            return ABSENT
        raise Unwatchable

    def _own(self, value: Any) -> dict[str, Any]:
        """The dict of an object, which a `__getattribute__` of its class has no say in."""
        try:
            own = object.__getattribute__(value, "__dict__")
        except AttributeError:
            raise Unwatchable from None
        if type(own) is not dict:
            raise Unwatchable
        self._object(value)
        return own

    def _in_classes(self, kind: type, name: str, but: type | None = None) -> Any:
        """What the first of a class and its bases has under a name, or `ABSENT`."""
        key = (kind, name, but)
        if key not in self._inherited:
            self._inherited[key] = self._look_up(kind, name, but)
        return self._inherited[key]

    def _look_up(self, kind: type, name: str, but: type | None) -> Any:
        self._object(kind)
        for base in kind.__mro__:
            if base is but:
                continue
            if base.__flags__ & _HEAP_TYPE:
                found = self._key(_class_dict(base), name)
            else:
                found = vars(base).get(name, ABSENT)
            if found is not ABSENT:
                return found
        return ABSENT


_HOOKS = tuple(name for name in vars(torch.nn.Module()) if "_hooks" in name)
"""The dicts of a module that hold hooks."""

HOOKS_OF = re.compile(rf"len\((m|self(?:\._modules\['[^']*'\])*)\.({'|'.join(_HOOKS)})\)")
"""What is asked six times of each module, so that it has a short cut."""

_CHAIN = re.compile(r"[FGMCB]\['[^']*'\](\.\w+)*")
"""Most of what is read of globals and modules, so that it need not be parsed."""


@functools.lru_cache(maxsize=4096)
def _parsed(code: str) -> ast.AST:
    return ast.parse(code, mode="eval").body


@functools.lru_cache(maxsize=1024)
def _class_dict(kind: type) -> dict[str, Any]:
    """The dict behind a class's `__dict__`, which only shows it."""
    (found,) = gc.get_referents(kind.__dict__)
    assert type(found) is dict
    return found


def _is_data_descriptor(value: Any) -> bool:
    return hasattr(type(value), "__set__") or hasattr(type(value), "__delete__")


def _plain(value: Any) -> Any:
    """A class's attribute as its instances have it; the function itself for a method."""
    if isinstance(value, types.FunctionType):
        return value
    if value is ABSENT or hasattr(type(value), "__get__"):
        raise Unwatchable
    return value
