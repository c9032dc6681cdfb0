"""What was compiled for a graph of Dynamo's runs in another process, without a compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from splitpoint.compilers.artifact import Missing
from splitpoint.config import Config
from splitpoint.errors import SizeOutOfPlan
from splitpoint.runtime.dynamo_backend import Part, part_of
from splitpoint.runtime.kept_part import load_part, save_part
from splitpoint.store.constants import NotKept

pytestmark = pytest.mark.slow

OPTIONS: dict[str, Any] = {"max_size": 32, "split_points": [8], "compile_sizes": [1]}
ABOUT = {"options": OPTIONS, "kernels": ["a", "b"]}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.two(torch.nn.functional.silu(self.one(x)))


def captured(config: Config) -> tuple[Part, list[torch.Tensor], nn.Module]:
    """A part, the weights that its calls are given, and the model itself."""
    torch.manual_seed(0)
    model = Block().requires_grad_(False)
    parts: list[Part] = []
    arguments: list[Any] = []

    def backend(graph, inputs):
        parts.append(part_of(graph, config))

        def run(*args):
            arguments[:] = args
            return parts[0].run(*args)

        return run

    x = torch.randn(5, 16)
    torch._dynamo.mark_dynamic(x, 0)
    torch.compile(model, backend=backend)(x)
    return parts[0], arguments, model


def called(part: Part, arguments: list[Any], x: torch.Tensor) -> torch.Tensor:
    """A call with another x."""

    def now(each: Any) -> Any:
        if isinstance(each, torch.Tensor):
            return x if tuple(each.shape) == (5, 16) else each
        return len(x)  # the size, which Dynamo passes too

    (made,) = part.run(*map(now, arguments))
    return made


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config.from_dict({**OPTIONS, "cache_dir": str(tmp_path / "store")})


def test_another_process_runs_it_without_a_compiler(config: Config, tmp_path: Path) -> None:
    part, arguments, model = captured(config)
    data = save_part(part, ABOUT)
    sizes = (1, 3, 8, 9, 32)
    inputs = [torch.randn(size, 16) for size in sizes]
    torch.save((data, arguments, inputs), tmp_path / "kept")
    code = f"""if True:
    import json, sys, torch
    from tests.runtime.test_kept_part import ABOUT, called
    from splitpoint.config import Config
    from splitpoint.runtime.kept_part import load_part
    data, arguments, inputs = torch.load({str(tmp_path / "kept")!r}, weights_only=False)
    part = load_part(data, ABOUT, Config.from_dict(json.loads(sys.argv[1])))
    made = [called(part, arguments, x) for x in inputs]
    assert part.program.counts.compilations == 0
    torch.save(made, {str(tmp_path / "made")!r})
    """
    given = json.dumps({**OPTIONS, "cache_dir": str(tmp_path / "store")})
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}", "CXX": "/no/compiler"}
    done = subprocess.run(
        [sys.executable, "-c", code, given], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for x, made in zip(inputs, torch.load(tmp_path / "made"), strict=True):
        assert torch.equal(made, called(part, arguments, x))
        torch.testing.assert_close(made, model(x))


def test_it_is_used_for_what_it_was_made_for_only(config: Config) -> None:
    part, arguments, model = captured(config)
    data = save_part(part, ABOUT)
    loaded = load_part(data, ABOUT, config)
    x = torch.randn(7, 16)
    torch.testing.assert_close(called(loaded, arguments, x), model(x))
    with pytest.raises(SizeOutOfPlan, match=r"size 33 is outside"):
        called(loaded, arguments, torch.randn(33, 16))
    with pytest.raises(SizeOutOfPlan, match="size 0 is outside"):  # there is no graph to run itself
        called(loaded, arguments, torch.randn(0, 16))
    for other in ({**ABOUT, "kernels": ["a"]}, {"options": OPTIONS}, {**ABOUT, "more": 1}):
        with pytest.raises(Missing, match=r"for another (kernels|more)"):
            load_part(data, other, config)
    entry = json.loads(data)
    entry["environment"]["processor"] = "another one"
    with pytest.raises(Missing, match="for another processor"):
        load_part(json.dumps(entry).encode(), ABOUT, config)


def test_without_its_files_it_is_not_used(config: Config, tmp_path: Path) -> None:
    part, _, _ = captured(config)
    data = save_part(part, ABOUT)
    for path in (tmp_path / "store" / "objects").rglob("*"):
        if path.is_file():
            path.unlink()
    with pytest.raises(Missing):
        load_part(data, ABOUT, config)


def test_without_a_store_nothing_is_kept() -> None:
    part, _, _ = captured(Config.from_dict({**OPTIONS, "cache_dir": ""}))
    with pytest.raises(NotKept, match="no store"):
        save_part(part, ABOUT)
