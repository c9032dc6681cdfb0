"""Steps of the runner against the Python text that they are read from, on random programs."""

from __future__ import annotations

import ctypes
import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitpoint.capture.postfix import NotPostfix, size_postfix
from splitpoint.compilers.native_steps import NoStep, piece_steps
from splitpoint.compilers.wrapper import Wrapper, read_wrapper
from splitpoint.graph.stitch import Body, Native, PieceSteps, assemble, rebind
from splitpoint.runtime.native import native
from splitpoint.runtime.native_library import program_type
from splitpoint.torch_internals.toolchain import cpp_compiler

KERNEL = """
#include <cstdint>
#include <stdexcept>
extern "C" __attribute__((visibility("default")))
void kernel(const float* in, float* out, int64_t n) {
  if (n < 0) throw std::runtime_error("n must not be negative");
  for (int64_t i = 0; i < n; ++i) out[i] = in[i] + 1;
}
"""
Kernel = Callable[..., Any]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Kernel]:
    """A kernel like Inductor's: its library, and a Python function that calls it."""
    if program_type() is None:
        pytest.skip("the runner needs a C++ compiler and Python's headers")
    folder = tmp_path_factory.mktemp("kernel")
    source, path = folder / "kernel.cpp", folder / "kernel.so"
    source.write_text(KERNEL)
    compiler = cpp_compiler()
    assert compiler is not None
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", str(source), "-o", str(path)], check=True)
    function = ctypes.CDLL(str(path)).kernel

    def call(x: torch.Tensor, out: torch.Tensor, n: int) -> None:
        function(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(n))

    return str(path), call


def wrapper_of(body: str, parameters: str = "arg0_1, arg1_1, arg2_1") -> Wrapper:
    lines = "\n".join("        " + line for line in body.strip().splitlines())
    return read_wrapper(
        "cpp_fused_0 = async_compile.cpp_pybinding(['float*'], '')\n"
        f"class Runner:\n    def call(self, args):\n        {parameters} = args\n"
        f"        args.clear()\n{lines}\n"
    )


def both(
    wrapper: Wrapper, kernel: tuple[str, Kernel], outputs: int, inputs: int = 2, bound: int = 0
) -> tuple[Kernel, Kernel]:
    """A stitched function over one piece with and without the runner; the last `bound` inputs
    are tensors of a module."""
    path, function = kernel
    data = json.loads(json.dumps(piece_steps(wrapper, takes=["s"])))
    names = [f"a{i}" for i in range(inputs - bound)] + [f"w{i}" for i in range(bound)]
    made = [f"v{i}" for i in range(outputs)]
    body = Body(
        ("size", *names[: inputs - bound]),
        (
            f"({', '.join(made)},) = p_0(size, {', '.join(names)})",
            f"return ({', '.join(made)},)",
        ),
        {"p_0": wrapper.bind({"cpp_fused_0": function})},
        (),
        (["piece", "p_0", names, made], None),
        {"p_0": PieceSteps(data, lambda: [(path, "kernel")] * len(data["kernels"]))},
    )
    fast = native(body)
    assert fast is not None
    assert len(fast.programs) == 1
    functions = assemble(body, None), assemble(body, None, native=fast)
    if not bound:
        for each in functions:
            rebind(each, [], None)
    return functions


# --- integers --------------------------------------------------------------------------

_LEAVES = st.one_of(st.just("size"), st.integers(0, 50).map(str))
_CODE = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*"), inner).map(" ".join).map("({})".format),
        st.tuples(inner, st.sampled_from(["//", "%"]), st.sampled_from(["3", "-4", "7"]))
        .map(" ".join)
        .map("({})".format),
        st.tuples(st.sampled_from(["min", "max"]), inner, inner).map(
            lambda t: f"{t[0]}({t[1]}, {t[2]})"
        ),
        inner.map("(-{})".format),
    ),
    max_leaves=8,
)


@given(_CODE, st.integers(0, 1000))
@settings(deadline=None)
def test_integers_are_those_of_python(code: str, size: int) -> None:
    if (make := program_type()) is None:
        pytest.skip("the runner needs a C++ compiler and Python's headers")
    want = eval(code, {"size": size, "min": min, "max": max})
    if not -(2**40) < want < 2**40:
        return
    # full() with a 0-dimensional shape shows the integer.
    step = [
        "op",
        "aten::full.default",
        [0],
        [[], {"e": size_postfix(code, ["size"])}],
        {"dtype": torch.int64},
    ]
    program = make([], [step], 0, 0, [0])
    program.bind([])
    assert program(size)[0].item() == want


@pytest.mark.parametrize(
    "code", ["size ** 2", "size / 2", "other", "abs(size)", "size if 1 else 2"]
)
def test_integers_without_a_sign_are_refused(code: str) -> None:
    with pytest.raises(NotPostfix):
        size_postfix(code, ["size"])


# --- random programs -------------------------------------------------------------------


def random_program(chance: random.Random) -> tuple[str, int]:
    """Lines over tensors of [s12, 4], and how many it returns."""
    whole = ["arg1_1", "arg2_1"]
    lines = ["s12 = arg0_1"]
    count = 0

    def new() -> str:
        nonlocal count
        count += 1
        return f"buf{count}"

    def pick() -> str:
        chosen = chance.choice(whole)
        if chance.random() < 0.2:
            return f"reinterpret_tensor({chosen}, (s12, 4), (4, 1), 0)"
        return chosen

    for _ in range(chance.randint(3, 25)):
        kind = chance.choice(
            ["kernel", "add", "split", "sort", "view", "memory", "rename", "del", "assert"]
        )
        if kind == "kernel":
            name, source = new(), pick()
            lines.append(f"{name} = empty_strided_cpu((s12, 4), (4, 1), torch.float32)")
            lines.append(f"cpp_fused_0({source}, {name}, 4*s12)")
            whole.append(name)
        elif kind == "add":
            name = new()
            scale = chance.choice(["", ", alpha=2", ", alpha=0.5"])
            lines.append(f"{name} = torch.ops.aten.add.Tensor({pick()}, {pick()}{scale})")
            whole.append(name)
        elif kind == "split":
            name, parts = new(), chance.sample([0, 1, 2], chance.randint(1, 3))
            joined = new()
            lines.append(
                f"{joined} = torch.ops.aten.cat.default([{pick()}, {pick()}, {pick()}], 1)"
            )
            lines.append(
                f"{name} = torch.ops.aten.split_with_sizes_copy.default({joined}, [4, 4, 4], -1)"
            )
            for part in parts:
                whole.append(new())
                lines.append(f"{whole[-1]} = {name}[{part}]")
            lines.append(f"del {name}")
        elif kind == "sort":
            name = new()
            lines.append(f"{name} = torch.ops.aten.sort.default({pick()}, -1, False)")
            whole.append(new())
            lines.append(f"{whole[-1]} = {name}[0]")
        elif kind == "view":
            name, back = new(), new()
            lines.append(
                f"{name} = reinterpret_tensor({chance.choice(whole)}, (4, s12), (1, 4), 0)"
            )
            lines.append(f"{back} = torch.ops.aten.transpose_copy.int({name}, 0, 1)")
            whole.append(back)
        elif kind == "memory":  # views that only a kernel reads, one of the other
            rows, row, name = new(), new(), new()
            lines += [
                f"{rows} = reinterpret_tensor({chance.choice(whole)}, (s12, 4), (4, 1), 0)",
                f"{row} = reinterpret_tensor({rows}, (1, 4), (4, 1), 4*s12 + -4)",
                f"{name} = empty_strided_cpu((s12, 4), (4, 1), torch.float32)",
                f"cpp_fused_0({rows}, {name}, 4*s12)",
                f"cpp_fused_0({row}, {name}, 4)",
                f"del {chance.choice([rows, row])}",
            ]
            whole.append(name)
        elif kind == "rename":
            name, old = new(), chance.choice(whole)
            lines += [f"{name} = {old}", f"del {old}"]
            whole.remove(old)
            whole.append(name)
        elif kind == "del" and len(whole) > 1:
            old = chance.choice(whole)
            lines.append(f"del {old}")
            whole.remove(old)
        elif kind == "assert":
            lines.append(
                f"assert_size_stride({chance.choice(whole)}, (s12, 4), (4, 1), 'torch.ops.x')"
            )
    outputs = chance.sample(whole, chance.randint(1, len(whole)))
    lines.append(f"return ({', '.join(outputs)}, )")
    return "\n".join(lines), len(outputs)


@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(0, 2))
@settings(deadline=None, max_examples=60)
def test_random_programs_give_what_python_gives(
    kernel: tuple[str, Kernel], seed: int, size: int, bound: int
) -> None:
    text, outputs = random_program(random.Random(seed))
    plain, fast = both(wrapper_of(text), kernel, outputs, bound=bound)
    inputs = [torch.randn(size, 4) for _ in range(2)]
    given_, held = inputs[: 2 - bound], inputs[2 - bound :]
    rebind(plain, held, None)
    rebind(fast, held, None)
    for _ in range(2):  # what a call leaves behind must not show in the next
        want, got = plain(size, *given_), fast(size, *given_)
        assert len(want) == len(got) == outputs
        for a, b in zip(want, got, strict=True):
            assert torch.equal(a, b)
            assert a.stride() == b.stride()
            assert [a is x for x in inputs] == [b is x for x in inputs]
    rebind(fast, [x + 1 for x in held], None)
    rebind(plain, [x + 1 for x in held], None)
    for a, b in zip(plain(size, *given_), fast(size, *given_), strict=True):
        assert torch.equal(a, b)


# --- errors ----------------------------------------------------------------------------

WRONG = {
    "an assertion": ("assert_size_stride(arg1_1, (s12, 5), (5, 1), 'input')", AssertionError),
    "another rank": ("assert_size_stride(arg1_1, (s12,), (1,))", AssertionError),
    "alignment": (
        "buf9 = reinterpret_tensor(arg1_1, (1, 1), (1, 1), 1)\n"
        "assert_alignment(buf9, 16, 'torch.ops.x')",
        AssertionError,
    ),
    "an operator": ("buf9 = torch.ops.aten.mm.default(arg1_1, arg1_1)", RuntimeError),
    "a dimension": ("buf9 = torch.ops.aten.cumsum.default(arg1_1, 7)", IndexError),
    "a missing argument": ("buf9 = torch.ops.aten.sum.dim_IntList(arg1_1, [5])", IndexError),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_those_of_python(kernel: tuple[str, Kernel], name: str) -> None:
    line, kind = WRONG[name]
    wrapper = wrapper_of(f"s12 = arg0_1\n{line}\nreturn (arg2_1, )")
    messages = []
    for call in both(wrapper, kernel, 1):
        with pytest.raises(kind) as error:
            call(3, torch.randn(3, 4), torch.randn(3, 4))
        assert type(error.value) is kind
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_an_exception_of_a_kernel_is_a_runtime_error(kernel: tuple[str, Kernel]) -> None:
    body = "s12 = arg0_1\ncpp_fused_0(arg1_1, arg2_1, 0 - s12)\nreturn (arg2_1, )"
    _, fast = both(wrapper_of(body), kernel, 1)
    with pytest.raises(RuntimeError, match="n must not be negative"):
        fast(3, torch.randn(3, 4), torch.randn(3, 4))


def test_an_exception_of_an_operator_in_python_comes_through(kernel: tuple[str, Kernel]) -> None:
    class Refused(Exception):
        pass

    def refuse(x: torch.Tensor) -> torch.Tensor:
        raise Refused("not today")

    with torch.library._scoped_library("runner_test", "DEF") as library:
        library.define("refuse(Tensor x) -> Tensor")
        library.impl("refuse", refuse, "CPU")
        body = "s12 = arg0_1\nbuf1 = torch.ops.runner_test.refuse.default(arg1_1)\nreturn (buf1, )"
        for call in both(wrapper_of(body), kernel, 1):
            with pytest.raises(Refused, match="not today"):
                call(3, torch.randn(3, 4), torch.randn(3, 4))


def test_inputs_updated_in_place_count_their_version_up(kernel: tuple[str, Kernel]) -> None:
    body = (
        "s12 = arg0_1\nincrement_version((arg1_1,))\ncpp_fused_0(arg1_1, arg1_1, 4*s12)\n"
        "return (arg1_1, )"
    )
    for call in both(wrapper_of(body), kernel, 1):
        x = torch.zeros(2, 4)
        (out,) = call(2, x, x)
        assert out is x
        assert x._version == 1
        assert torch.equal(x, torch.ones(2, 4))
        with torch.inference_mode():
            call(2, torch.zeros(2, 4), torch.zeros(2, 4))


@pytest.mark.parametrize(
    "line",
    [
        "buf1 = 2*s12 if s12 > 3 else 1",
        "buf1 = torch.ops.aten.add.Tensor(arg1_1, 1)[0]",
        "buf1 = torch.ops.aten.sort.default(arg1_1)\nbuf2 = (buf1[0], buf1)",
        "buf1 = torch.ops.aten.add.Tensor(arg1_1, arg1_1)\nbuf2 = buf1[0]",
        "buf1 = torch.ops.aten.item.default(arg1_1)",
        "buf1 = empty_strided_cpu((s12 ** 2, 4), (4, 1), torch.float32)",
        "buf1 = empty_strided((s12, 4), (4, 1), device='cpu', dtype=torch.float32)",
        "for i in range(s12): pass",
    ],
)
def test_what_the_runner_does_not_know_is_refused(line: str) -> None:
    with pytest.raises(NoStep):
        piece_steps(wrapper_of(f"s12 = arg0_1\n{line}\nreturn (arg1_1, )"), takes=["s"])


# --- the program itself ----------------------------------------------------------------


def test_calls_that_do_not_fit_are_refused() -> None:
    if (make := program_type()) is None:
        pytest.skip("the runner needs a C++ compiler and Python's headers")
    add: list[Any] = ["op", "aten::add.Tensor", [0], [{"t": -2}, {"t": -1}], {}]
    program = make([], [add], 1, 1, [0])
    x = torch.ones(2)
    with pytest.raises(RuntimeError, match="before its tensors are bound"):
        program(2, x)
    with pytest.raises(ValueError, match="1 tensors of the module, got 2"):
        program.bind([x, x])
    with pytest.raises(TypeError, match="bind takes tensors, got int"):
        program.bind([1])
    program.bind([x])
    assert torch.equal(program(2, x)[0], x + x)
    with pytest.raises(TypeError, match="1 lengths and 1 tensors"):
        program(2)
    with pytest.raises(TypeError, match="takes tensors, got str"):
        program(2, "x")
    with pytest.raises(TypeError):
        program("2", x)
    for wrong, error in (
        (["op", "aten::nothing.default", [0], [], {}], RuntimeError),
        (["op", "aten::add.Tensor", [0], [{"t": -2}], {}], TypeError),
        (["op", "aten::add.Tensor", [0], [{"t": 5}, {"t": -1}], {}], ValueError),
        (["op", "aten::add.Tensor", [0], [{"t": -2}, {"t": -1}], {"beta": 1}], TypeError),
        (["free", [0]], ValueError),
        (["dance"], ValueError),
    ):
        with pytest.raises(error):
            make([], [wrong], 1, 1, [])


def test_a_native_is_left_out_without_steps() -> None:
    body = Body(("size", "a0"), ("return (a0,)",), {}, (), (None,))
    made: Native | None = native(body)
    assert made is None


def test_the_library_of_the_kernel_must_be_there(
    kernel: tuple[str, Kernel], tmp_path: Path
) -> None:
    make = program_type()
    assert make is not None
    piece = {
        "parameters": [],
        "steps": [],
        "outputs": [],
        "kernels": [(str(tmp_path / "no.so"), "kernel")],
    }
    with pytest.raises(RuntimeError, match=r"no\.so"):
        make([piece], [], 0, 0, [])
