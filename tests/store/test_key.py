"""Each field of a key is told apart, and what is in no field changes no key.

The tables name every field that there is: a new one without an entry fails.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from splitpoint import Config, api
from splitpoint.capture.capture import capture
from splitpoint.capture.facts import Describer
from splitpoint.compilers.stored import PieceCompiler
from splitpoint.graph.pieces import Piece, split
from splitpoint.passes.base import Pass
from splitpoint.passes.noop import NoopElimination
from splitpoint.ranges import PlannedRange, Range
from splitpoint.runtime import compiled_model
from splitpoint.runtime.model_key import model_fields
from splitpoint.store import key
from splitpoint.store.store import Store
from splitpoint.torch_internals.state import torch_state

Change = Callable[[pytest.MonkeyPatch], object]


@pytest.fixture(autouse=True)
def _software_is_read_anew() -> Iterator[None]:
    yield
    key._software.cache_clear()
    key._processor.cache_clear()


def changed(before: Mapping[str, str], after: Mapping[str, str]) -> set[str]:
    """The fields that differ; the keys do exactly when there are any."""
    assert set(before) == set(after)
    names = {name for name in before if before[name] != after[name]}
    assert (key.digest(before) != key.digest(after)) == bool(names)
    return names


# --- what both kinds of keys have ------------------------------------------------------

ENVIRONMENT: dict[str, Change] = {
    "format": lambda patch: patch.setattr(key, "FORMAT", key.FORMAT + 1),
    "splitpoint": lambda patch: patch.setattr(key, "_sources", lambda *_: iter(())),
    "torch": lambda patch: patch.setattr(torch.version, "git_version", "another"),
    "python": lambda patch: patch.setattr(platform, "python_version", lambda: "3.99.0"),
    "system": lambda patch: patch.setattr(platform, "machine", lambda: "another"),
    "processor": lambda patch: patch.setattr(
        torch.backends.cpu, "get_cpu_capability", lambda: "another"
    ),
    "threads": lambda patch: torch.set_num_threads(2),
    "torch_state": lambda patch: torch.set_float32_matmul_precision("high"),
    "inductor_config": lambda patch: patch.setenv("TORCHINDUCTOR_MAX_AUTOTUNE", "1"),
}


@pytest.fixture
def _restored_torch() -> Iterator[None]:
    precision, mkldnn = torch.get_float32_matmul_precision(), torch._C._get_mkldnn_deterministic()
    yield
    torch.set_float32_matmul_precision(precision)
    torch._C._set_mkldnn_deterministic(mkldnn)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.use_deterministic_algorithms(False)
    torch.set_autocast_enabled("cpu", False)


def test_the_table_names_every_field_of_the_environment() -> None:
    assert set(ENVIRONMENT) == set(key.environment())


@pytest.mark.usefixtures("_restored_torch")
@pytest.mark.parametrize("field", ENVIRONMENT)
def test_a_change_of_the_environment_changes_its_field_alone(
    field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = key.environment()
    ENVIRONMENT[field](monkeypatch)
    key._software.cache_clear()
    key._processor.cache_clear()
    assert changed(before, key.environment()) == {field}


TORCH_STATE: dict[str, Callable[[], object]] = {
    "dtype": lambda: torch.set_default_dtype(torch.float64),
    "device": lambda: torch.set_default_device("meta"),
    "deterministic": lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    "autocast": lambda: torch.set_autocast_enabled("cpu", True),
    "matmul": lambda: torch._C._set_mkldnn_deterministic(True),
    "function_modes": lambda: torch.set_default_device("meta"),
}


@pytest.mark.usefixtures("_restored_torch")
@pytest.mark.parametrize("setting", TORCH_STATE)
def test_each_setting_of_torch_changes_the_key(setting: str) -> None:
    before, fields = torch_state(), key.environment()
    assert set(before) == set(TORCH_STATE)
    TORCH_STATE[setting]()
    assert torch_state()[setting] != before[setting]
    # Where it is imported, one of them is an option of Inductor's too.
    assert changed(fields, key.environment()) - {"inductor_config"} == {"torch_state"}


def test_a_changed_option_of_inductors_changes_the_key_until_it_is_undone() -> None:
    from torch._inductor import config

    before = key.environment()
    with config.patch(epilogue_fusion=not config.epilogue_fusion):
        assert changed(before, key.environment()) == {"inductor_config"}
    assert changed(before, key.environment()) == set()


OWN_FILES = (
    *("torch_internals/inductor.py", "graph/pieces.py", "compilers/wrapper.py"),
    *("passes/linear.py", "compilers/artifact.py", "kernels/build.py", "runtime/native.py"),
    *("runtime/warm_start.py", "ranges.py", "api.py", "runtime/program.py", "runtime/lanes.py"),
    *("runtime/kernel_choice.py", "runtime/packed_weights.py", "runtime/freed_weights.py"),
    *("tuning/linear.py", "collectives/ops.py", "collectives/shm.py", "collectives/seeds.json"),
    *("kernels/linear_packed.h", "runtime/cpp/runner.cpp", "store/__init__.py"),
)
OTHER_FILES = ("cli/verbs.py", "errors.py", "bench/startup.py", "report/plots.py")


def test_own_code_changes_the_key_where_it_decides_what_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "splitpoint"
    shutil.copytree(
        Path(key.__file__).parent.parent, package, ignore=shutil.ignore_patterns("__pycache__")
    )
    before = key.environment()
    monkeypatch.setattr(key, "__file__", str(package / "store" / "key.py"))
    key._software.cache_clear()
    assert changed(before, key.environment()) == set()  # a copy elsewhere is the same
    for names, expected in ((OWN_FILES, {"splitpoint"}), (OTHER_FILES, set())):
        for name in names:
            text = (package / name).read_text()
            (package / name).write_text(text + "\n# another\n")
            key._software.cache_clear()
            assert changed(before, key.environment()) == expected, name
            (package / name).write_text(text)
    for name, expected in (("passes/new.py", {"splitpoint"}), ("bench/new.py", set())):
        (package / name).touch()
        key._software.cache_clear()
        assert changed(before, key.environment()) == expected, name
        (package / name).unlink()


# --- what changes no key ---------------------------------------------------------------

NO_EFFECT: dict[str, Change] = {
    "another HOME": lambda patch: patch.setenv("HOME", "/somewhere"),
    "another folder": lambda patch: patch.chdir("/"),
    "another process id": lambda patch: patch.setattr(os, "getpid", lambda: 1),
    "another hash seed": lambda patch: patch.setenv("PYTHONHASHSEED", "7"),
    "another user name": lambda patch: patch.setenv("USER", "another"),
    "another language": lambda patch: patch.setenv("LANG", "tr_TR.UTF-8"),
    "another place for temporary files": lambda patch: patch.setenv("TMPDIR", "/somewhere"),
    "another cache folder": lambda patch: patch.setenv("SPLITPOINT_CACHE", "/somewhere"),
    "another rank": lambda patch: [
        patch.setenv(name, value)
        for name, value in (("RANK", "3"), ("LOCAL_RANK", "3"), ("WORLD_SIZE", "8"))
    ],
    "where Inductor keeps files": lambda patch: patch.setenv("TORCHINDUCTOR_CACHE_DIR", "/tmp/x"),
    "how many workers Inductor has": lambda patch: patch.setenv(
        "TORCHINDUCTOR_COMPILE_THREADS", "3"
    ),
    "torch's log": lambda patch: patch.setenv("TORCH_LOGS", "+inductor"),
    "the log's level": lambda patch: patch.setattr(
        logging.getLogger("splitpoint"), "level", logging.DEBUG
    ),
    "random numbers drawn": lambda patch: torch.rand(3),
}
"""Of the process. What only a new process shows is in test_another_user.py."""


@pytest.mark.parametrize("what", NO_EFFECT)
def test_where_and_by_whom_it_is_made_changes_no_key(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, piece = Model().fields(), Pieces().fields()
    NO_EFFECT[what](monkeypatch)
    key._software.cache_clear()
    key._processor.cache_clear()
    assert changed(model, Model().fields()) == set()
    assert changed(piece, Pieces().fields()) == set()


# --- keys of models --------------------------------------------------------------------


class Network(torch.nn.Module):
    def __init__(self, width: int = 4, factor: float = 2.0) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(width, width).requires_grad_(False)
        self.factor = factor

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> Any:
        return self.linear(x) * self.factor


@dataclasses.dataclass
class Model:
    """What a model's key is made of."""

    module: torch.nn.Module = dataclasses.field(default_factory=Network)
    arguments: tuple[Any, ...] = (torch.zeros(3, 4),)
    dynamic_dims: Any = None
    config: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {"max_size": 16, "split_points": [4], "compile_sizes": [1]}
    )

    def fields(self) -> dict[str, str]:
        signature = api.signature_of(self.module, self.arguments, {}, self.dynamic_dims)
        roots = compiled_model._roots(self.module)
        found = model_fields(Config(**self.config), signature, roots, Describer())
        assert found is not None
        return found


class Doubled(Pass):
    """A pass with a setting."""

    def __init__(self, setting: int) -> None:
        self.setting = setting

    def settings(self) -> Mapping[str, Any]:
        return {"setting": self.setting}

    def __call__(self, graph: torch.fx.Graph) -> int:
        return 0


def tied(tie: bool) -> torch.nn.Module:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    if tie:
        module[1].weight = module[0].weight
    return module


CONFIG_FIELDS: dict[str, Any] = {
    "max_size": 17,
    "split_points": [5],
    "compile_sizes": [2],
    "splitting_ops": (),
    "on_guard": "error",
    "hint": "start",
    "inductor_options": {"epilogue_fusion": False},
    "passes": (),
    "linear": {"1-4": "packed"},
    "attention": "torch",
    "weights": "int4",
    "activations": "int8",
    "max_packed_bytes": 1000,
    "free_original_weights": True,
}
CONFIG_WITHOUT_EFFECT: dict[str, Any] = {
    "on_out_of_plan": "eager",
    "on_break": "error",
    "linear_budget_s": 1.0,
    "max_signatures": 2,
    "compile_workers": 3,
    "lazy": True,
    "background": True,
    "module_guards": "first_call",
    "runner": "python",
    "cache_dir": "/somewhere",
    "cudagraph_capture_sizes": (1,),
    "pad_to_captured": True,
    "mmap_packed_weights": True,
}
WITH_OTHERS = {"batch_invariant": {"passes", "on_guard"}}
"""Fields that set others, too."""
NEVER_KEPT = {"backend"}
"""Only what the Inductor backend compiles is kept: the other has no key."""

MODEL: dict[str, Callable[[Model], object]] = {
    "model": lambda model: setattr(model, "module", Network(5)),
    "arguments": lambda model: setattr(model, "arguments", (torch.zeros(3, 4).double(),)),
    "dims": lambda model: setattr(model, "dynamic_dims", {"x": {0: "rows"}}),
    **{
        name: lambda model, name=name, value=value: model.config.update({name: value})
        for name, value in CONFIG_FIELDS.items()
    },
}


def test_the_tables_name_every_field_of_a_models_key_and_of_a_configuration() -> None:
    assert {*MODEL, *ENVIRONMENT, *WITH_OTHERS} == set(Model().fields())
    named = {*CONFIG_FIELDS, *CONFIG_WITHOUT_EFFECT, *NEVER_KEPT, *WITH_OTHERS}
    assert named == {field.name for field in dataclasses.fields(Config)}


@pytest.mark.parametrize("field", MODEL)
def test_a_change_of_a_model_changes_its_field_alone(field: str) -> None:
    other = Model()
    MODEL[field](other)
    assert changed(Model().fields(), other.fields()) == {field}


@pytest.mark.parametrize("field", WITH_OTHERS)
def test_a_field_that_sets_others_changes_theirs(field: str) -> None:
    plain = {"max_size": 16}
    fields = (Model(config=plain).fields(), Model(config=plain | {field: True}).fields())
    assert changed(*fields) == {field, *WITH_OTHERS[field]}


MODEL_PARTS: dict[str, tuple[str, Model, Model]] = {
    "a dtype": ("model", Model(), Model(Network().bfloat16())),
    "what a parameter requires": ("model", Model(), Model(Network().requires_grad_(True))),
    "a layer more": (
        "model",
        *(Model(torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(n)))) for n in (1, 2)),
    ),
    "a tied weight": ("model", Model(tied(False)), Model(tied(True))),
    "another static dimension": ("arguments", Model(), Model(arguments=(torch.zeros(3, 5),))),
    "another layout": ("arguments", Model(), Model(arguments=(torch.zeros(4, 3).t(),))),
    "an argument more": ("arguments", Model(), Model(arguments=(torch.zeros(3, 4),) * 2)),
    "a setting of a pass": (
        "passes",
        *(Model(config={"passes": (Doubled(setting),)}) for setting in (1, 2)),
    ),
    "which of two kernels counts": (
        "linear",
        Model(config={"linear": {"1-8": "packed", "1-4": "gemv"}}),
        Model(config={"linear": {"1-4": "gemv", "1-8": "packed"}}),
    ),
}
"""More than one thing is in a field."""


@pytest.mark.parametrize("what", MODEL_PARTS)
def test_each_part_of_a_models_field_changes_it(what: str) -> None:
    field, one, other = MODEL_PARTS[what]
    assert changed(one.fields(), other.fields()) == {field}


MODEL_WITHOUT_EFFECT: dict[str, Callable[[Model], object]] = {
    "values of weights": lambda model: [p.normal_() for p in model.module.parameters()],
    "the first call's size": lambda model: setattr(model, "arguments", (torch.ones(9, 4),)),
    "a plain tuple for a list": lambda model: model.config.update(split_points=(4,)),
    **{
        f"{name} of the configuration": lambda model, name=name, value=value: model.config.update(
            {name: value}
        )
        for name, value in CONFIG_WITHOUT_EFFECT.items()
    },
}


@pytest.mark.parametrize("what", MODEL_WITHOUT_EFFECT)
def test_what_no_code_depends_on_changes_no_models_key(what: str) -> None:
    other = Model()
    MODEL_WITHOUT_EFFECT[what](other)
    assert changed(Model().fields(), other.fields()) == set()


# --- keys of pieces --------------------------------------------------------------------


@functools.cache
def captured_piece(factor: float, width: int, seed: int) -> Piece:
    torch.manual_seed(seed)
    forward = Network(width, factor).forward
    found = capture(forward, api.signature_of(forward, (torch.zeros(3, width),), {}, None), (3,))
    (piece,) = split(found.graph_module, (), found.symbols).pieces.values()
    return piece


@dataclasses.dataclass
class Pieces:
    """What a piece's key is made of."""

    factor: float = 2.0
    width: int = 4
    seed: int = 0
    piece: dict[str, Any] = dataclasses.field(default_factory=dict)
    planned: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {"range": Range(1, 8), "hint": 8, "options": {"a": 1, "b": 2}}
    )
    passes: tuple[Pass, ...] = (NoopElimination(), Doubled(1))
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    trusted: tuple[int, ...] = (1, 2)
    store: str = "/nowhere"

    def fields(self) -> dict[str, str]:
        whole = captured_piece(self.factor, self.width, self.seed)
        piece = dataclasses.replace(whole, **self.piece)
        compiler = PieceCompiler(Store(Path(self.store)), self.passes)
        named = compiler._key(piece, PlannedRange(**self.planned), self.options, self.trusted)
        assert named is not None
        digest, fields = named
        assert digest == key.digest(fields)
        return fields


PIECE: dict[str, list[Callable[[Pieces], object]]] = {
    "piece": [
        lambda piece: setattr(piece, "factor", 3.0),
        lambda piece: setattr(piece, "width", 5),
    ],
    "takes": [lambda piece: piece.piece.update(takes=())],
    "lengths": [lambda piece: piece.planned.update(lengths=(("batch", 1, 2, 1),))],
    "range": [
        lambda piece: piece.planned.update(range=Range(1, 9)),
        lambda piece: piece.planned.update(range=Range(2, 8)),
    ],
    "hint": [lambda piece: piece.planned.update(hint=7)],
    "passes": [
        lambda piece: setattr(piece, "passes", ()),
        lambda piece: setattr(piece, "passes", (NoopElimination(), Doubled(2))),
        lambda piece: setattr(piece, "passes", (Doubled(1), NoopElimination())),
    ],
    "options": [
        lambda piece: piece.planned.update(options={"a": 1, "b": 3}),
        lambda piece: piece.options.update(size_asserts=False),
    ],
    "unchecked_inputs": [lambda piece: setattr(piece, "trusted", (1,))],
}

PIECE_WITHOUT_EFFECT: dict[str, Callable[[Pieces], object]] = {
    "values of weights": lambda piece: setattr(piece, "seed", 1),
    "the name it has in this process": lambda piece: piece.piece.update(fingerprint="another"),
    "options in another order": lambda piece: piece.planned.update(options={"b": 2, "a": 1}),
    "unchecked inputs in another order": lambda piece: setattr(piece, "trusted", (2, 1)),
    "why the range is there": lambda piece: piece.planned.update(note="a guard"),
    "the sizes that it serves": lambda piece: piece.planned.update(only=((1, 3), (5, 8))),
    "what is shown of the passes": lambda piece: piece.planned.update(
        passes=("a",), linear={"4->4": "packed"}, attention={"a": "b"}, collectives=("c",)
    ),
    "where the store is": lambda piece: setattr(piece, "store", "/elsewhere"),
}


def test_the_table_names_every_field_of_a_pieces_key() -> None:
    assert set(PIECE) | set(ENVIRONMENT) == set(Pieces().fields())


@pytest.mark.parametrize(("field", "index"), [(f, i) for f in PIECE for i in range(len(PIECE[f]))])
def test_a_change_of_a_piece_changes_its_field_alone(field: str, index: int) -> None:
    other = Pieces()
    PIECE[field][index](other)
    assert changed(Pieces().fields(), other.fields()) == {field}


@pytest.mark.parametrize("what", PIECE_WITHOUT_EFFECT)
def test_what_no_code_depends_on_changes_no_pieces_key(what: str) -> None:
    other = Pieces()
    PIECE_WITHOUT_EFFECT[what](other)
    assert changed(Pieces().fields(), other.fields()) == set()


def test_options_in_another_order_change_no_models_key() -> None:
    one, other = (
        Model(config={"inductor_options": options})
        for options in ({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"d": 3, "c": 2}, "a": 1})
    )
    assert changed(one.fields(), other.fields()) == set()
