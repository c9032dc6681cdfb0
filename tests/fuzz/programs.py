"""Random programs as source text."""

from __future__ import annotations

import linecache
import re
import string
import sys
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from hypothesis import strategies as st

from .tables import ARGUMENTS, ARGUMENTS_OF_TWO, DTYPES, OPERATORS, RESULTS, STATE, UPDATES

PRELUDE = '''\
"""A program of the fuzzer: from the root of the project, run it with PYTHONPATH=src:. """

from collections import OrderedDict, defaultdict, deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclass
class Both:
    first: Any
    second: Any


def quarters(*shape):
    return torch.randint(-8, 9, shape) / 4
'''

EPILOGUE = """

if __name__ == "__main__":
    from tests.fuzz.compare import check

    print(check(globals()))
"""


@dataclass(frozen=True)
class Line:
    """One line of a program, and the template that it was made from."""

    code: str
    template: str


@dataclass(frozen=True)
class Program:
    """A model, the arguments that it is called with, and how it is compiled."""

    arguments: Mapping[str, str]
    """By name, which of the table of arguments."""
    body: tuple[Line, ...]
    result: Line
    config: Mapping[str, Any]
    calls: tuple[tuple[tuple[int, ...], str], ...]
    """The lengths of the dynamic dimensions, and the mode of gradients."""
    two_dims: bool
    named: bool
    """Whether dynamic dimensions have names."""
    frozen: bool
    """Whether parameters require no gradients."""

    @property
    def table(self) -> dict[str, tuple[str, dict[int, str]]]:
        """How arguments are made."""
        return ARGUMENTS_OF_TWO if self.two_dims else ARGUMENTS

    def traits(self) -> list[str]:
        """The templates that a program was made from."""
        kinds = [kind for kind in self.arguments.values() if kind != "floats"]
        return [*kinds, *(line.template for line in self.body), f"return {self.result.template}"]

    def text(self) -> str:
        """The program as a module of Python."""
        lines = [line.code for line in self.body] + [f"return {self.result.code}"]
        used = set(re.findall(r"self\.(\w+)", "\n".join(lines)))
        if "part" in used:
            used.add("cache")
        state = [made for name, made in STATE.items() if name in used]
        made = [f"{name} = {self.table[kind][0]}" for name, kind in self.arguments.items()]
        dims: dict[str, Any] = {}
        for name, kind in self.arguments.items():
            if of := self.table[kind][1]:
                plain = tuple(of) if len(of) > 1 else next(iter(of))
                dims[name] = of if self.named else plain
        parameters = ", ".join(self.arguments)
        lengths = "n, l" if self.two_dims else "n"
        return "\n".join(
            [
                f"{PRELUDE}\n",
                "class Model(nn.Module):",
                *_block(
                    "def __init__(self):",
                    [
                        "super().__init__()",
                        "torch.manual_seed(0)",
                        *state,
                        *(["self.requires_grad_(False)"] if self.frozen else []),
                    ],
                ),
                "",
                *_block(f"def forward(self, {parameters}):", lines),
                "\n",
                f"def arguments({lengths}):",
                *(
                    f"    {line}"
                    for line in (
                        f"torch.manual_seed({'n * 100 + l' if self.two_dims else 'n'})",
                        *made,
                        f"return [{parameters}]",
                    )
                ),
                "\n",
                f"CONFIG = dict({', '.join(f'{k}={v!r}' for k, v in self.config.items())})",
                f"DIMS = {dims!r}",
                f"MAX_DIMS = {LARGEST if self.two_dims else {}!r}",
                f"CALLS = {list(self.calls)!r}",
                EPILOGUE,
            ]
        )


def _block(head: str, lines: Sequence[str]) -> list[str]:
    return [f"    {head}", *(f"        {line}" for line in lines)]


def load(text: str) -> dict[str, Any]:
    """The names that a program defines, as a module that Python can show the source of."""
    module = ModuleType("fuzzed")
    sys.modules[module.__name__] = module  # where dataclasses look
    name = f"<fuzzed {zlib.crc32(text.encode()):x}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    exec(compile(text, name, "exec"), module.__dict__)
    return module.__dict__


# --- drawing ---------------------------------------------------------------------------

SIZES = (5, 1, 2, 3, 4, 8, 9)
"""At and beside the split point (4), the largest size (9) and the size with a graph of its own."""

SHAPES = ((2, 3), (1, 1), (1, 5), (3, 1), (2, 4), (1, 8), (1, 9), (3, 3), (4, 9), (2, 2))
"""Sizes 8 and 9 are at and beside the split point, 36 is the largest."""

LARGEST = {"n": 4, "l": 9}

MODES = ("no_grad", "inference_mode", "enable_grad", "inference_arguments")

SPLITTING_OPS = (
    ("aten::cumsum",),
    ("aten::scaled_dot_product_attention",),
    ("aten::relu", "aten::view", "aten::add"),
    ("aten::softmax", "aten::linear", "aten::mul_", "aten::add_"),
)
MOST_ELEMENTS = 3000


@st.composite
def programs(draw: st.DrawFn, inductor: float = 0.3) -> Program:
    """Programs that eager PyTorch runs at all their sizes.

    Args:
        draw: hypothesis's.
        inductor: the share that Inductor compiles; the pieces of the rest run uncompiled.
    """
    two_dims = draw(st.integers(0, 3)) == 3
    table = ARGUMENTS_OF_TWO if two_dims else ARGUMENTS
    kinds = ["floats", *draw(st.lists(st.sampled_from(sorted(table)), max_size=3))]
    arguments = dict(zip("xyzw", kinds, strict=False))
    config: dict[str, Any] = {
        "max_size": 36 if two_dims else 9,
        "split_points": [8 if two_dims else 4],
    }
    config["backend"] = "inductor" if draw(st.floats(0, 1)) < inductor else "eager"
    for name, values in _OPTIONS.items():
        if draw(st.integers(0, 3)) == 3:
            config[name] = draw(st.sampled_from(values))
    named = two_dims or draw(st.integers(0, 3)) == 3
    if draw(st.booleans()):
        config["compile_sizes"] = [(2, 3)] if two_dims else [(3,)] if named else [3]
    lengths = draw(st.permutations(SHAPES if two_dims else [(size,) for size in SIZES]))
    calls = tuple((each, draw(st.sampled_from(MODES))) for each in lengths)
    frozen = draw(st.booleans())
    nothing = Line("None", "None")
    shell = Program(arguments, (), nothing, config, calls, two_dims, named, frozen)
    return _filled(draw, shell)


_OPTIONS: dict[str, tuple[Any, ...]] = {
    "runner": ("python",),
    "splitting_ops": SPLITTING_OPS,
    "lazy": (True,),
    "module_guards": ("first_call",),
    "linear": ("inductor",),
}


def _filled(draw: st.DrawFn, shell: Program) -> Program:
    """A program with a body and a result."""
    growing = _Growing(shell)
    for _ in range(draw(st.integers(0, 7))):
        if draw(st.integers(0, 3)) == 3:
            growing.try_line(draw, draw(st.sampled_from(UPDATES)), value=False)
        else:
            growing.try_line(draw, draw(st.sampled_from(OPERATORS)), value=True)
    for _ in range(6):
        if (result := growing.tried(draw, draw(st.sampled_from(RESULTS)))) is not None:
            break
    else:
        result = Line("x", "{x}")
    names = dict(vars(shell)) | {"body": tuple(growing.body), "result": result}
    return Program(**names)


class _Growing:
    """A program that grows by lines which run at all its sizes."""

    def __init__(self, shell: Program) -> None:
        self.shell = shell
        self.body: list[Line] = []
        self.made: dict[str, Any] = {}
        self._restart()

    def _restart(self) -> None:
        # All tensors of the module are there while lines are tried.
        full = Program(**{**vars(self.shell), "body": tuple(Line(f"self.{s}", "") for s in STATE)})
        names = load(full.text())
        self.spaces: list[dict[str, Any]] = []
        for lengths, _ in self.shell.calls:
            self.spaces.append(
                {
                    **names,
                    "self": names["Model"](),
                    **dict(zip(self.shell.arguments, names["arguments"](*lengths), strict=True)),
                }
            )
        for line in self.body:
            self._run(line.code)

    def _run(self, code: str) -> bool:
        """Run a line at all sizes; False when it failed at one."""
        try:
            with torch.no_grad(), warnings.catch_warnings():
                # A tensor that out= gives another shape is no update of it.
                warnings.filterwarnings("error", message="An output with one or more elements")
                for space in self.spaces:
                    exec(code, space)
        except Exception:  # noqa: BLE001 - whatever eager PyTorch says, the line is no use
            return False
        return True

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that a line can name, later ones first."""
        space = self.spaces[0]
        found = {name: space[name] for name in reversed([*self.shell.arguments, *self.made])}
        return found | {f"self.{name}": getattr(space["self"], name) for name in STATE}

    def tried(self, draw: st.DrawFn, template: str) -> Line | None:
        """A line from a template, if it runs."""
        code = self._code(draw, template)
        if code is None:
            return None
        if self._run(f"_found = {code}") and all(_is_small([s["_found"]]) for s in self.spaces):
            return Line(code, template)
        self._restart()
        return None

    def try_line(self, draw: st.DrawFn, template: str, value: bool) -> None:
        """Add a line from a template, if it runs."""
        code = self._code(draw, template)
        if code is None:
            return
        if not value:
            if self._run(code):
                self.body.append(Line(code, template))
            else:
                self._restart()
            return
        values = self._values(code)
        counts = {len(each) for each in values}
        if len(counts) != 1 or not values[0] or not isinstance(values[0][0], torch.Tensor):
            self._restart()
            return
        name = f"v{len(self.body)}"
        parts = [name] if counts == {1} else [f"{name}_{at}" for at in range(len(values[0]))]
        for space, each in zip(self.spaces, values, strict=True):
            space.update(zip(parts, each, strict=True))
        self.made |= dict.fromkeys(parts)
        self.body.append(Line(f"{', '.join(parts)} = {code}", template))

    def _values(self, code: str) -> list[tuple[Any, ...]]:
        """What an expression is at each size, as tuples of tensors; () where it is no use."""
        if not self._run(f"_found = {code}"):
            return [()]
        values = [space["_found"] for space in self.spaces]
        if any(isinstance(each, (list, tuple)) and len(each) == 1 for each in values):
            return [()]  # would be no tuple on the left
        parts = [tuple(e) if isinstance(e, (list, tuple)) else (e,) for e in values]
        return parts if all(map(_is_small, parts)) else [()]

    def _code(self, draw: st.DrawFn, template: str) -> str | None:
        """A template with all that is in braces drawn; None when nothing fits."""
        given: dict[str, str] = {}
        tensors = self.tensors()
        for _, field, _, _ in string.Formatter().parse(template):
            if not field or (name := field.partition(".")[0]) in given:
                continue
            choices = _choices(name, tensors, self.shell)
            if not choices:
                return None
            given[name] = draw(st.sampled_from(choices))
        # `format` would look attributes up: each name stands for its text.
        return (
            re.sub(r"\{(\w)\}", lambda m: given[m[1]], template)
            .replace("{{", "{")
            .replace("}}", "}")
        )


def _is_small(values: Sequence[Any]) -> bool:
    return all(not isinstance(v, torch.Tensor) or v.numel() <= MOST_ELEMENTS for v in values)


def _choices(name: str, tensors: Mapping[str, torch.Tensor], shell: Program) -> list[str]:
    own = [code for code in tensors if not code.startswith("self.")]
    if name in "ab":
        # A tensor of the module now and then.
        return own * 3 + [code for code in tensors if code.startswith("self.")]
    if name in "fg":
        return [code for code in own if tensors[code].is_floating_point()]
    if name == "i":
        return [c for c in own if tensors[c].dtype in (torch.int64, torch.int32)]
    if name == "m":
        return [code for code in own if tensors[code].dtype is torch.bool]
    if name == "x":
        return list(shell.arguments)
    if name == "s":
        return [code for code in tensors if code.startswith("self.")]
    if name in "nl":
        last = "x.shape[1]" if shell.two_dims else "x.size(0)"
        return ["x.shape[0]", "len(x)", "x.shape[0] + 1", "x.shape[0] * 2", "x.numel() // 4", last]
    return {"d": ["0", "-1", "1"], "k": ["1", "2", "3"], "t": list(DTYPES)}[name]
