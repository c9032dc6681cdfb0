"""The code around kernels, on its own: the same results, and the old way where it is not safe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from splitpoint import Config, compile
from splitpoint.compilers import inductor
from splitpoint.compilers.native_steps import piece_steps
from splitpoint.compilers.wrapper import NotPlain, read_wrapper

CONFIG = Config(max_size=8, linear="inductor")

MODULE = """
from torch._inductor.async_compile import AsyncCompile
async_compile = AsyncCompile()
cpp_fused_0 = async_compile.cpp_pybinding(['float*'], r'''code''')
class Runner:
    def call(self, args):
        arg0_1, arg1_1 = args
        args.clear()
        s12 = arg0_1
        assert_size_stride(arg1_1, (s12, 4), (4, 1), 'input')
        buf0 = empty_strided_cpu((s12, 4), (4, 1), torch.float32)
        cpp_fused_0(arg1_1, buf0, s12)
        buf1 = torch.ops.aten.cumsum.default(buf0, dim=-1)
        assert_size_stride(buf1, (s12, 4), (4, 1), 'torch.ops.aten.cumsum.default')
        return (buf1, )
"""


def test_the_function_has_parameters_and_no_attribute_chains() -> None:
    wrapper = read_wrapper(MODULE)
    assert wrapper.source.startswith("def call(arg0_1, arg1_1):")
    assert "= torch." not in wrapper.source
    assert "torch.float32" not in wrapper.source
    assert wrapper.kernels == ("cpp_fused_0",)
    assert set(wrapper.operators.values()) == {"torch.float32", "aten::cumsum.default"}

    def kernel(x: torch.Tensor, out: torch.Tensor, size: int) -> None:
        out.copy_(x + 1)

    x = torch.randn(3, 4)
    (out,) = wrapper.bind({"cpp_fused_0": kernel})(3, x)
    assert torch.equal(out, torch.cumsum(x + 1, -1))


def test_assertions_stay_for_inputs_that_nothing_else_checks() -> None:
    assert read_wrapper(MODULE).source.count("assert_size_stride") == 2
    assert "assert_size_stride(arg1_1" not in read_wrapper(MODULE, trusted={1}).source
    with pytest.raises(AssertionError):
        read_wrapper(MODULE).bind({"cpp_fused_0": lambda *_: None})(3, torch.randn(3, 8)[:, :4])


def test_assertions_on_inputs_are_told_from_others_where_they_do_not_say_so() -> None:
    as_in_211 = MODULE.replace(", 'input')", ")")
    assert read_wrapper(as_in_211).source.count("assert_size_stride") == 2
    assert read_wrapper(as_in_211, trusted={1}).source.count("assert_size_stride") == 1


GROUPED = MODULE.replace(
    "assert_size_stride(arg1_1, (s12, 4), (4, 1), 'input')",
    "assert_size_stride_grouped((arg1_1, arg2_1), ((s12, 4), (2, )), ((4, 1), (1, )), 'input')",
).replace("arg0_1, arg1_1 = args", "arg0_1, arg1_1, arg2_1 = args")
METADATA = GROUPED.replace(
    "assert_size_stride(buf1, (s12, 4), (4, 1), 'torch",
    "assert_tensor_metadata(buf1, (s12, 4), (4, 1), torch.float32, 'torch",
)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.randn(3, 8)[:, :4], torch.ones(2), "stride 8==4"),
        (torch.ones(3, 4), torch.ones(3), "size 3==2"),
    ],
)
def test_assertions_of_several_are_made_single(
    x: torch.Tensor, y: torch.Tensor, message: str
) -> None:
    wrapper = read_wrapper(METADATA)
    assert wrapper.source.count("assert_size_stride(") == 3
    assert wrapper.source.count("assert_dtype(") == 1
    assert read_wrapper(METADATA, trusted={1}).source.count("assert_size_stride(") == 2
    kinds = [step[0] for step in piece_steps(wrapper, ["s"])["steps"]]
    assert kinds == ["sizes", "sizes", "empty", "kernel", "op", "dtype", "sizes"]

    def kernel(x: torch.Tensor, out: torch.Tensor, size: int) -> None:
        out.set_(x.clone())

    with pytest.raises(AssertionError, match=message):
        wrapper.bind({"cpp_fused_0": kernel})(3, x, y)
    other = read_wrapper(METADATA.replace("torch.float32, 'torch", "torch.float64, 'torch"))
    with pytest.raises(RuntimeError, match=r"expected dtype torch\.float64 but got torch\.float32"):
        other.bind({"cpp_fused_0": kernel})(3, torch.ones(3, 4), torch.ones(2))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("((s12, 4), (2, ))", "((s12, 4), )"),
        ("(arg1_1, arg2_1)", "both"),
        ("torch.float32, 'torch", "'torch"),
    ],
)
def test_other_assertions_of_several_are_refused(old: str, new: str) -> None:
    assert old in METADATA
    with pytest.raises(NotPlain):
        read_wrapper(METADATA.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("arg0_1, arg1_1 = args", "arg0_1 = args[0]"),
        ("args.clear()", "pass"),
        ("def call(", "def other("),
        ("cpp_fused_0(arg1_1", "run_intermediate_hooks(arg1_1"),
        ("cpp_fused_0(arg1_1", "self.partitions[0](arg1_1"),
        ("torch.ops.aten.cumsum.default", "torch.cumsum"),
        ("torch.ops.aten.cumsum.default", "extern_kernels.bias_addmm"),
        ("return (buf1, )", "import os; return (buf1, )"),
        ("return (buf1, )", "return (lambda: (buf1, ))()"),
    ],
)
def test_what_is_not_known_is_refused(old: str, new: str) -> None:
    assert old in MODULE
    with pytest.raises(NotPlain):
        read_wrapper(MODULE.replace(old, new))


def test_an_operator_that_is_not_registered_is_named() -> None:
    wrapper = read_wrapper(MODULE.replace("aten.cumsum.default", "nowhere.cumsum.default"))
    with pytest.raises(LookupError, match=r"nowhere::cumsum\.default"):
        wrapper.bind({"cpp_fused_0": lambda *_: None})


# --- compiled pieces -------------------------------------------------------------------


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Callable[..., Any]]]:
    """(what Inductor made, what is called) of every piece compiled in the test."""
    seen: list[tuple[Any, Callable[..., Any]]] = []
    bare = inductor._bare

    def note(graph: Any, trusted: Any, piece: str) -> Any:
        made = bare(graph, trusted, piece)
        seen.append((graph, graph.call if made is None else made.call))
        return made

    monkeypatch.setattr(inductor, "_bare", note)
    return seen


def test_a_plain_piece_is_called_without_the_wrapper(pieces: list[Any]) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.GELU()).requires_grad_(False)
    compiled = compile(model, CONFIG)
    for size in (3, 1, 8):
        x = torch.randn(size, 6)
        torch.testing.assert_close(compiled(x), model(x))
    ((graph, call),) = pieces
    assert call is not graph.call
    size, tensors = 4, [torch.randn(4, 6), model[0].weight, model[0].bias]
    with torch.no_grad():
        for order in ([0, 1, 2], [1, 0, 2], [1, 2, 0]):  # inputs are in order of first use
            arguments = [size, *(tensors[i] for i in order)]
            try:
                want = graph.call(*arguments)
            except AssertionError:
                continue
            assert torch.equal(call(*arguments)[0], want[0])
            break
        else:
            pytest.fail("no order of the inputs fits")


def test_a_buffer_updated_in_place_counts_its_version_up(pieces: list[Any]) -> None:
    class Counting(torch.nn.Module):
        seen: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.add_(x.sum(0))
            return x * self.seen

    model, reference = Counting(), Counting()
    compiled = compile(model, CONFIG)
    for size in (3, 5, 2):
        before = model.seen._version
        x = torch.randn(size, 4)
        torch.testing.assert_close(compiled(x), reference(x))
        assert model.seen._version > before
    torch.testing.assert_close(model.seen, reference.seen)
    assert any("increment_version" in call.__code__.co_names for _, call in pieces)


def test_views_of_inputs_need_no_wrapper(pieces: list[Any]) -> None:
    compiled = compile(lambda x: (x[:, :2], x + 1), CONFIG)
    x = torch.randn(3, 4)
    view, _ = compiled(x)
    assert view.data_ptr() == x.data_ptr()
    ((graph, call),) = pieces
    assert call is not graph.call
    assert not graph.wrapped


def test_a_graph_compiled_under_autocast_keeps_the_wrapper(pieces: list[Any]) -> None:
    model = torch.nn.Linear(4, 4).requires_grad_(False)
    x = torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert compile(model, CONFIG)(x).dtype == torch.bfloat16
    assert [call is graph.call for graph, call in pieces] == [True]


def test_a_splitting_op_that_returns_other_strides_is_caught() -> None:
    with torch.library._scoped_library("wrapper_test", "DEF") as library:
        library.define("lying(Tensor x) -> Tensor")
        library.impl("lying", lambda x: x.t().contiguous().t(), "CPU")
        torch.library.register_fake("wrapper_test::lying", torch.empty_like, lib=library)

        def model(x: torch.Tensor) -> torch.Tensor:
            lied: torch.Tensor = torch.ops.wrapper_test.lying(x * 2)
            return lied + 1

        compiled = compile(model, Config(max_size=8, splitting_ops=["wrapper_test::lying"]))
        with pytest.raises(AssertionError, match="stride"):
            compiled(torch.randn(3, 4))
