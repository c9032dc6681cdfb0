"""Results that are views: of arguments, of tensors of the module, and of what a call computes."""

from __future__ import annotations

import pytest
import torch

from splitpoint import Config, compile
from tests.fuzz.compare import compared
from tests.fuzz.models import FORWARD, with_buffers

ARGUMENTS: dict[str, FORWARD] = {
    "the argument": lambda self, x, y: x,
    "turned": lambda self, x, y: x.T,
    "without the first": lambda self, x, y: x[1:],
    "the last": lambda self, x, y: x[-1],
    "flat": lambda self, x, y: x.view(-1),
    "a column": lambda self, x, y: x[..., 0],
    "every other": lambda self, x, y: (x[::2], x[:, 1::2]),
    "both parts": lambda self, x, y: (x[:1], x[1:]),
    "split": lambda self, x, y: list(x.split(2, -1)),
    "parts that may be empty": lambda self, x, y: x.tensor_split(3),
    "unbound": lambda self, x, y: x.unbind(1),
    "expanded": lambda self, x, y: x.expand(3, *x.shape),
    "squeezed": lambda self, x, y: x.unsqueeze(0).squeeze(0),
    "detached": lambda self, x, y: x.detach(),
    "of another dtype": lambda self, x, y: x.view(dtype=y.int().dtype),
    "diagonal": lambda self, x, y: x.diagonal(),
    "as strided": lambda self, x, y: x.as_strided((2, 2), (1, 2), 0),
    "contiguous": lambda self, x, y: x.contiguous(),
    "empty": lambda self, x, y: x[:0],
    "a view of a view": lambda self, x, y: x.T[1:].unsqueeze(0),
    "two alike": lambda self, x, y: (x.T, x.T),
    "one twice": lambda self, x, y: (z := x.t(), z),
    "of two": lambda self, x, y: {"x": x[:1], "y": y.T, "both": (x, y[1:])},
    "beside what is computed": lambda self, x, y: (x + y, x.T, x.relu()),
}
BUFFERS: dict[str, FORWARD] = {
    "the buffer": lambda self, x, y: self.cache,
    "its start": lambda self, x, y: self.cache[: x.shape[0]],
    "its end": lambda self, x, y: self.cache[x.shape[0] :],
    "turned": lambda self, x, y: self.cache.T,
    "flat": lambda self, x, y: self.cache.view(-1)[2:],
    "a part and the whole": lambda self, x, y: (self.part, self.cache, self.part[: x.shape[0]]),
    "of keys and values": lambda self, x, y: self.kv[:, : x.shape[0]].transpose(0, 1),
    "a parameter": lambda self, x, y: (self.weight, self.weight.T, self.weight[1:]),
    "no buffer of torch's": lambda self, x, y: self.plain[:2],
    "with an argument": lambda self, x, y: (self.cache[:1], x[:1], x + self.weight[0]),
}
COMPUTED: dict[str, FORWARD] = {
    "turned": lambda self, x, y: (x + y).T,
    "with what it views": lambda self, x, y: (z := x + y, z.T, z[1:]),
    "only views": lambda self, x, y: ((z := x * 2)[:1], z[1:]),
    "chunks": lambda self, x, y: (x + y).chunk(2, -1),
    "the same twice": lambda self, x, y: (z := x + y, z),
    "equal but not the same": lambda self, x, y: (x + y, x + y),
    "expanded": lambda self, x, y: (x.sum(0) + y[0]).expand(x.shape[0], 4),
    "a reshape": lambda self, x, y: (z := x * y, z.reshape(-1), z.T.reshape(-1)),
    "parts that may be empty": lambda self, x, y: (x + y).unbind(-1)[3][1:],
    "past an operator": lambda self, x, y: (z := x + y, (c := z.cumsum(0)), z.T, c[1:]),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_views_of_arguments(name: str) -> None:
    compared(with_buffers(ARGUMENTS[name]))


@pytest.mark.parametrize("name", BUFFERS)
def test_views_of_tensors_of_the_module(name: str) -> None:
    compared(with_buffers(BUFFERS[name]))


@pytest.mark.parametrize("name", COMPUTED)
def test_views_of_what_is_computed(name: str) -> None:
    compared(with_buffers(COMPUTED[name], splitting_ops=["aten::cumsum"]))


@pytest.mark.slow
@pytest.mark.parametrize("runner", ["native", "python"])
@pytest.mark.parametrize("table", [ARGUMENTS, BUFFERS, COMPUTED])
def test_all_at_once_as_compiled(table: dict[str, FORWARD], runner: str) -> None:
    """All forms in one result, so that Inductor compiles them once."""

    forms = dict(table)
    if torch.__version__ < (2, 12):
        # torch 2.11 asks for the size's remainder by 3: no range may hold other sizes.
        forms.pop("parts that may be empty", None)

    def forward(self, x, y):
        return [form(self, x, y) for form in forms.values()]

    compared(with_buffers(forward, backend="inductor", runner=runner))


def test_a_view_of_an_argument_without_elements() -> None:
    compiled = compile(
        lambda x, y: (x + 1, y[1:], y.T),
        Config(max_size=9, split_points=[4], backend="eager", cache_dir=""),
    )
    for size in (5, 1, 4, 9):
        _, part, turned = compiled(torch.randn(size, 4), torch.empty(size, 0))
        assert (part.shape, turned.shape) == ((size - 1, 0), (0, size))


@pytest.mark.parametrize("layout", ["turned", "columns", "shifted", "expanded"])
def test_views_of_arguments_that_are_views(layout: str) -> None:
    def forward(self, x, y):
        return x.T, x[1:], x[..., 0], x.unsqueeze(1), (x + 1).T, x

    compared(with_buffers(forward, layout=layout))
