"""The forms of what a model returns."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch

from splitpoint import Config, compile
from splitpoint.errors import CaptureError
from tests.fuzz.compare import check, compared
from tests.fuzz.models import FORWARD, with_buffers


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclass
class Registered:
    first: Any
    second: Any


@dataclass
class Unknown:
    first: Any
    second: Any


torch.export.register_dataclass(Registered, serialized_type_name=f"{__name__}.Registered")

FORMS: dict[str, FORWARD] = {
    "a tensor": lambda self, x, y: x + y,
    "a tuple": lambda self, x, y: (x + y, x * y),
    "a list": lambda self, x, y: [x + y],
    "a dict": lambda self, x, y: {"b": x + y, "a": x},
    "nested": lambda self, x, y: {"a": [x + 1, (y, {"b": None})], 3: ()},
    "an ordered dict": lambda self, x, y: OrderedDict(b=x + 1, a=y),
    "a deque": lambda self, x, y: deque([x + 1, y]),
    "a named tuple": lambda self, x, y: Pair(x + 1, [y, None]),
    "a dataclass": lambda self, x, y: Registered(x + 1, {"y": y.T}),
    "None": lambda self, x, y: (x.add_(1), None)[1],
    "None among tensors": lambda self, x, y: (x + 1, None, y),
    "constants": lambda self, x, y: (x + 1, 3, 2.5, "text", True, torch.float32, ...),
    "a range": lambda self, x, y: (x + 1, range(3), slice(1, None), frozenset({1})),
    "a size": lambda self, x, y: (x + 1, x.shape[0]),
    "only a size": lambda self, x, y: y.shape[0] * 2,
    "what follows from the size": lambda self, x, y: (x + 1, [y.numel() - 1, -y.shape[0] // 2]),
    "a condition on the size": lambda self, x, y: (x + 1, x.shape[0] > 8),
    "a shape": lambda self, x, y: (x + 1, x.shape),
    "a part of a shape": lambda self, x, y: (x + 1, (x.shape[:1], x.shape[1:]), x[1:].shape),
    "the shape of what is not computed with": lambda self, x, y: (x + 1, y.shape, y.stride()),
    "only a shape": lambda self, x, y: y.shape,
    "a tuple of sizes": lambda self, x, y: (x + 1, tuple(y.shape)),
    "what tensors are": lambda self, x, y: (x + 1, y.dtype, y.dim(), y.device),
    "no dimension": lambda self, x, y: ((x * y).sum(), x.mean()),
    "nothing in it": lambda self, x, y: (x[:0], x.new_empty(x.shape[0], 0), x[:, 4:] + 1),
    "an argument": lambda self, x, y: y,
    "arguments that were swapped": lambda self, x, y: {"y": y, "x": (x, x + 1, x)},
    "the module's": lambda self, x, y: (self.cache, self.weight, x + self.plain),
    "one tensor twice": lambda self, x, y: (z := x + y, [z, z]),
    "empty containers": lambda self, x, y: (x + 1, [], (), {}),
    "integers and bools": lambda self, x, y: (x > y, x.long(), x.argmax(-1), (x > 0).all()),
    "bfloat16": lambda self, x, y: (x.bfloat16() + 1, x.bfloat16()),
    "another layout": lambda self, x, y: (x.T.contiguous().T, (x + y).T.contiguous()),
    "the module": lambda self, x, y: (x + 1, self.config),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_results(name: str) -> None:
    names = with_buffers(FORMS[name])
    if name == "only a shape" and torch.__version__ >= (2, 15):
        # Since torch 2.15 Dynamo makes no graph of what only reads sizes.
        report = check(names)
        assert not report.finding, report.finding
        assert {kind for kind, _ in report.refusals} == {"CaptureError"}
    else:
        compared(names)


@pytest.mark.slow
@pytest.mark.parametrize("runner", ["native", "python"])
def test_all_at_once_as_compiled(runner: str) -> None:
    def forward(self, x, y):
        return {name: form(self, x, y) for name, form in FORMS.items()}

    compared(with_buffers(forward, backend="inductor", runner=runner))


def test_shapes_where_two_dimensions_change() -> None:
    def model(x, y, z):
        return x.sum(), y.shape, z.shape[0], z.mT.stride(), x[1:, :, None].shape

    dims: Any = {"x": {0: "n", 1: "l"}, "y": {1: "n", 0: "l"}, "z": {0: "l"}}
    config = Config(max_size=64, split_points=[8], backend="eager", cache_dir="")
    compiled = compile(model, config, dynamic_dims=dims)
    for n, m in ((2, 3), (1, 1), (5, 1), (1, 5), (4, 4), (8, 8), (3, 9)):
        args = torch.randn(n, m), torch.randn(m, n), torch.randn(m, 3, 4)
        wanted, found = model(*args), compiled(*args)
        assert found[1:] == wanted[1:]
        assert list(map(type, found)) == list(map(type, wanted))
    assert compiled.stats().eager_calls == 0


@pytest.mark.parametrize(
    ("forward", "said"),
    [
        (lambda x: Unknown(x + 1, x.shape[0]), "Unknown that it makes at each call"),
        (lambda x: (x + 1, {1, 2}), "a set that it makes at each call"),
        (lambda x: (x + 1, lambda: x), "a function that it makes at each call"),
        (lambda x: (each for each in [x + 1, x]), "iterator that it makes at each call"),
        (lambda x: (x + 1, x.sum().item()), "does more with what it computed"),
        (lambda x: (x + 1, x.shape[0] / 2), "does more with what it computed"),
    ],
)
def test_what_cannot_be_made_anew_is_refused(forward: Any, said: str) -> None:
    config = Config(max_size=64, backend="eager", cache_dir="", on_break="error")
    with pytest.raises(CaptureError, match=said) as caught:
        compile(forward, config)(torch.randn(5, 4))
    assert len(str(caught.value).splitlines()) <= 3
