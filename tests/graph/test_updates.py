"""Updates in place: of arguments, of tensors of the module, and of views of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.fuzz.compare import check, compared
from tests.fuzz.models import FORWARD, with_buffers


def after(*updates: FORWARD) -> FORWARD:
    """A forward that updates and then returns what it can see of it."""

    def forward(self, x, y):
        for update in updates:
            update(self, x, y)
        return x + 1, x.T, x

    return forward


def keeps_keys_and_values(self, x, y):
    n = x.shape[0]
    self.kv[0, :n] = x
    self.kv[1, :n].copy_(y)
    keys, values = self.kv[:, :n].unbind(0)
    return F.softmax(x @ keys.T, -1) @ values, keys, self.kv


def appends(self, x, y):
    at = torch.arange(x.shape[0])
    self.cache.index_copy_(0, at + 1, x)
    self.count.add_(1)
    return self.cache[: x.shape[0] + 1] * 2, self.count


def part_then_whole(self, x, y):
    self.part.mul_(2)
    self.cache.add_(1)
    self.part[:1] = x[:1]
    return self.cache[4:6] + 0, self.part[:2], self.cache


def of_an_intermediate(self, x, y):
    z = x + y
    z[1:].mul_(2)
    z.T[0].fill_(3)
    return z, z[:1], x


def through_a_splitting_op(self, x, y):
    x.add_(1)
    z = x.cumsum(0)
    z[:1] = 7
    x.mul_(2)
    return z, x, z.cumsum(1)


ARGUMENTS: dict[str, FORWARD] = {
    "returned": lambda self, x, y: x.add_(1),
    "returned with itself": lambda self, x, y: (x.mul_(2), x),
    "returned with a view": lambda self, x, y: (x.mul_(2), x.T, x[1:]),
    "only updated": lambda self, x, y: (x.mul_(2), None)[1] or y + 1,
    "a row": after(lambda self, x, y: x[0].add_(1)),
    "the last row": after(lambda self, x, y: x[-1:].fill_(2)),
    "a column": after(lambda self, x, y: x[:, 1].mul_(3)),
    "flat": after(lambda self, x, y: x.view(-1)[::2].zero_()),
    "turned": after(lambda self, x, y: x.t().copy_(y.t())),
    "all but the first": after(lambda self, x, y: x[1:].sub_(y[1:])),
    "by a mask": after(lambda self, x, y: x.masked_fill_(y > 0, 5)),
    "by an index": after(lambda self, x, y: x.index_fill_(0, torch.tensor([0]), 2)),
    "by scatter": after(lambda self, x, y: x.scatter_(1, y.long().clamp(0, 3), 9)),
    "from itself": after(lambda self, x, y: x.copy_(x.flip(0))),
    "rows by rows": after(lambda self, x, y: x[1:].add_(x[:-1].clone())),
    "twice": after(lambda self, x, y: x.add_(1), lambda self, x, y: x[:1].mul_(3)),
    "both": lambda self, x, y: (x.add_(y), y.mul_(2), x + y),
    "out=": after(lambda self, x, y: torch.add(y, 1, out=x)),
    "inplace=True": lambda self, x, y: (F.relu(x, inplace=True), x),
    "through detach": after(lambda self, x, y: x.detach().add_(1)),
}
MODULE: dict[str, FORWARD] = {
    "a counter": lambda self, x, y: (self.count.add_(1), x + self.count),
    "keys and values": keeps_keys_and_values,
    "rows after rows": appends,
    "a part and the whole": part_then_whole,
    "as long as the size": lambda self, x, y: (self.cache[: x.shape[0]].add_(x), self.cache),
    "the buffer returned": lambda self, x, y: self.cache.mul_(0.5),
    "a parameter": lambda self, x, y: (self.weight.mul_(0.5), x @ self.weight),
    "no buffer of torch's": lambda self, x, y: (self.plain[1:].add_(1), x + self.plain),
    "an intermediate": of_an_intermediate,
    "past an operator": through_a_splitting_op,
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_updates_of_arguments(name: str) -> None:
    compared(with_buffers(ARGUMENTS[name]))


@pytest.mark.parametrize("name", MODULE)
def test_updates_of_the_module(name: str) -> None:
    names = with_buffers(MODULE[name], splitting_ops=["aten::cumsum"])
    if name == "keys and values" and torch.__version__ < (2, 12):
        refused_for_its_size(names)
    else:
        compared(names)


def refused_for_its_size(names: Mapping[str, Any]) -> None:
    """Torch 2.11 asks which number the size is where a part as long as it is assigned."""
    report = check(names)
    assert not report.finding, report.finding
    assert {kind for kind, _ in report.refusals} == {"SizeSpecialized"}


@pytest.mark.slow
@pytest.mark.parametrize("runner", ["native", "python"])
def test_all_of_the_module_at_once_as_compiled(runner: str) -> None:
    def forward(self, x, y):
        return [form(self, x, y) for form in MODULE.values()]

    names = with_buffers(forward, backend="inductor", runner=runner)
    if torch.__version__ < (2, 12):
        refused_for_its_size(names)
    else:
        compared(names)


@pytest.mark.slow
@pytest.mark.parametrize("runner", ["native", "python"])
def test_all_of_arguments_at_once_as_compiled(runner: str) -> None:
    def forward(self, x, y):
        found = [form(self, x, y) for name, form in ARGUMENTS.items() if name != "both"]
        return [*found, y]

    compared(with_buffers(forward, backend="inductor", runner=runner))


@pytest.mark.parametrize("layout", ["turned", "columns", "shifted"])
@pytest.mark.parametrize("name", ["returned with a view", "a column", "rows by rows"])
def test_updates_of_arguments_that_are_views(name: str, layout: str) -> None:
    compared(with_buffers(ARGUMENTS[name], layout=layout))


def test_rows_up_to_a_single_size() -> None:
    """A piece that takes the size and no tensor that has it: there the size is a number too."""

    def forward(self, x, y):
        self.kv.unbind(0)[1][: x.shape[0] + 1].mul_(2)
        return []

    compared(with_buffers(forward, backend="inductor", compile_sizes=[5]))
