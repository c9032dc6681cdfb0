"""Methods that are replaced, or given other code, after the capture that went through them."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from splitpoint import Config, compile, errors

Kinds = types.SimpleNamespace


def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def kinds() -> Kinds:
    """Classes of their own for each test."""

    class Base(torch.nn.Module):
        def inherited(self, x: torch.Tensor) -> torch.Tensor:
            return x - 1

    class Part(Base):
        def forward(self, x: torch.Tensor, by: float = 3.0) -> torch.Tensor:
            return self.scaled(self.inherited(x)) * by + self.shift

        def scaled(self, x: torch.Tensor) -> torch.Tensor:
            return self.turned(x) * 5

        @staticmethod
        def turned(x: torch.Tensor) -> torch.Tensor:
            return -x

        @property
        def shift(self) -> float:
            return 0.5

        def unused(self) -> int:
            return 1

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Part()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(self.part(x))

    return Kinds(Base=Base, Part=Part, Model=Model)


def other(self: Any, x: torch.Tensor) -> torch.Tensor:
    return x * 7


def code(function: Any) -> None:
    function.__code__ = other.__code__


CHANGES: dict[str, Callable[[Kinds], object]] = {
    "forward of a part": lambda k: setattr(k.Part, "forward", other),
    "forward of the model": lambda k: setattr(k.Model, "forward", other),
    "a method": lambda k: setattr(k.Part, "scaled", other),
    "an inherited method": lambda k: setattr(k.Base, "inherited", other),
    "a method in front of an inherited one": lambda k: setattr(k.Part, "inherited", other),
    "a static method": lambda k: setattr(k.Part, "turned", staticmethod(twice)),
    "a property": lambda k: setattr(k.Part, "shift", property(lambda self: 2.5)),
    "code of forward": lambda k: code(k.Part.forward),
    "code of a method": lambda k: code(k.Part.scaled),
    "code of an inherited method": lambda k: code(k.Base.inherited),
    "defaults": lambda k: setattr(k.Part.forward, "__defaults__", (4.0,)),
}


WITHOUT_A_WATCH = ("forward of a part", "code of a method", "a property")


@pytest.mark.parametrize(
    ("name", "watched"), [*((n, True) for n in CHANGES), *((n, False) for n in WITHOUT_A_WATCH)]
)
def test_a_method_that_changes_is_seen(
    name: str, watched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not watched:
        monkeypatch.setattr("splitpoint.capture.watch._kind", lambda: None)
    all_kinds = kinds()
    model = all_kinds.Model().eval()
    compiled = compile(model, Config(max_size=8, backend="eager"))
    x = torch.randn(3, 4)
    torch.testing.assert_close(compiled(x), model(x))
    all_kinds.Part.unused = other  # nothing went through that
    torch.testing.assert_close(compiled(x), model(x))
    CHANGES[name](all_kinds)
    for _ in range(2):
        with pytest.raises(errors.StateChanged, match=r"replaced|other code|guard"):
            compiled(x)
    if not watched:
        compiled.reset()
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("name", ["forward of a part", "code of a method"])
def test_a_warm_start_sees_it_too(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_kinds = kinds()
    model = all_kinds.Model().eval()
    config = Config(max_size=8, linear="inductor", cache_dir=str(tmp_path))
    x = torch.randn(3, 4)
    compile(model, config)(x)
    monkeypatch.setattr("splitpoint.runtime.compiled_model.capture", None)
    warm = compile(model, config)
    torch.testing.assert_close(warm(x), model(x))
    CHANGES[name](all_kinds)
    with pytest.raises(errors.StateChanged, match=r"Part\.(forward|scaled) was replaced"):
        warm(x)


def test_a_class_of_torch_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = kinds().Model().eval()
    compiled = compile(model, Config(max_size=8, backend="eager"))
    x = torch.randn(3, 4)
    torch.testing.assert_close(compiled(x), model(x))
    monkeypatch.setattr(torch.nn.Linear, "forward", other)
    with pytest.raises(errors.StateChanged, match=r"Linear\.forward was replaced"):
        compiled(x)
    monkeypatch.undo()
    torch.testing.assert_close(compiled(x), model(x))


def test_a_function_with_other_code() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return helper(x) + 1

    compiled = compile(model, Config(max_size=8, backend="eager"))
    x = torch.randn(3, 4)
    torch.testing.assert_close(compiled(x), helper(x) + 1)
    before = model.__code__
    model.__code__ = twice.__code__
    with pytest.raises(errors.StateChanged):
        compiled(x)
    model.__code__ = before
    torch.testing.assert_close(compiled(x), helper(x) + 1)
    code_before, helper.__code__ = helper.__code__, twice.__code__
    try:
        with pytest.raises(errors.StateChanged):
            compiled(x)
    finally:
        helper.__code__ = code_before


def helper(x: torch.Tensor) -> torch.Tensor:
    return x - 1


class Settings:
    """Something that is no module."""

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        return x * 3

    @property
    def shift(self) -> float:
        return 0.5


class WithSettings(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.settings = Settings()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.settings.scaled(x) + self.settings.shift


@pytest.mark.parametrize("change", ["method", "code", "property"])
def test_methods_of_other_objects_are_found_by_name(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = WithSettings()
    compiled = compile(model, Config(max_size=8, backend="eager"))
    x = torch.randn(3, 4)
    torch.testing.assert_close(compiled(x), model(x))
    if change == "method":
        monkeypatch.setattr(Settings, "scaled", other)
    elif change == "code":
        monkeypatch.setattr(Settings.scaled, "__code__", other.__code__)
    else:
        monkeypatch.setattr(Settings, "shift", property(lambda self: 1.5))
    with pytest.raises(errors.StateChanged, match=r"Settings\.(scaled|shift) was replaced"):
        compiled(x)
    monkeypatch.undo()
    torch.testing.assert_close(compiled(x), model(x))


def test_what_torch_replaces_when_it_first_compiles_is_no_change() -> None:
    """In a process of its own: torch.compile wraps `nn.Module.__init__` when it first runs."""
    script = """
import torch, splitpoint
from tests import tiny

compiled = splitpoint.compile(
    tiny.model(),
    splitpoint.Config(max_size=8, cache_dir="", backend="eager"),
    dynamic_dims={"input_ids": 1},
)
ids, init = torch.ones(1, 3, dtype=torch.int64), torch.nn.Module.__init__
with torch.no_grad():
    compiled(input_ids=ids, use_cache=False)
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(3))
    assert torch.nn.Module.__init__ is not init, "torch leaves it alone now"
    compiled(input_ids=ids, use_cache=False)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_another_number_of_threads_is_said_by_what_sets_it():
    model = torch.nn.Linear(4, 4).eval().requires_grad_(False)
    compiled = compile(model, Config(max_size=8, backend="eager", cache_dir=""))
    x, threads = torch.randn(3, 4), torch.get_num_threads()
    compiled(x)
    torch.set_num_threads(threads + 1)
    try:
        with pytest.raises(errors.StateChanged, match=r"torch\.set_num_threads\(\) was called\n"):
            compiled(x)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(compiled(x), model(x))
