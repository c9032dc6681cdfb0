"""Packed weights as files: the same numbers, one memory for several processes, and never a wrong
byte, whatever happened to a file or to a weight."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import splitpoint
from splitpoint import Config, compile, errors
from splitpoint.cli.verbs import main
from splitpoint.kernels import load
from splitpoint.passes.linear import LAYOUTS
from splitpoint.runtime import packed_files
from splitpoint.runtime.packed_files import KIND, UNKEPT
from splitpoint.runtime.packed_weights import PackedWeights
from splitpoint.store.store import Store

PACKAGE = str(Path(splitpoint.__file__).parents[1])
WIDTH = 192
SIZES = (1, 5, 16)
PLAN: dict[str, Any] = {
    "max_size": 16,
    "split_points": [4],
    "linear": {"1-4": "packed", "5-16": "inductor"},
}


def make(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
    return nn.Sequential(*layers).eval().requires_grad_(False)


def x(size: int) -> Tensor:
    return torch.randn(size, WIDTH, generator=torch.Generator().manual_seed(size))


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that has the model compiled, and no files of weights: by a process, as those have
    other settings that start from it than what other tests may have left here."""
    folder = tmp_path_factory.mktemp("filled") / "kept"
    filling = Running(folder, "serve(); raise SystemExit").process
    _, said = filling.communicate(timeout=200)
    assert filling.returncode == 0, said
    return folder


@pytest.fixture
def kept(filled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(filled, tmp_path / "kept"))


def started(module: nn.Module, kept: Path, **settings: Any) -> Any:
    """Compiled and called once."""
    config = Config(**PLAN | {"cache_dir": str(kept), "mmap_packed_weights": True} | settings)
    made = compile(module, config)
    made(x(1))
    return made


def plain(module: nn.Module, kept: Path, **settings: Any) -> Any:
    return started(module, kept, mmap_packed_weights=False, **settings)


def assert_same(one: Any, other: Any) -> None:
    for size in SIZES:
        assert torch.equal(one(x(size)), other(x(size))), size


def files(kept: Path) -> dict[Path, bytes]:
    """The files of packed weights, and what is in them."""
    store = Store(kept)
    found = {}
    for kind, key, _ in store.entries():
        if kind == KIND:
            entry = store.read(kind, key, use=False)
            assert entry is not None
            (digest,) = entry["objects"]
            found[store.object_path(digest)] = store.object_path(digest).read_bytes()
    return found


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "splitpoint" and record.levelno >= logging.WARNING
    ]


# --- starts ----------------------------------------------------------------------------

WAYS: list[dict[str, Any]] = [
    {},
    {"runner": "python"},
    {"module_guards": "first_call"},
    {"weights": "int8", "linear": "auto"},
    {"weights": "int4", "linear": "auto"},
    {"lazy": True},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_later_start_packs_nothing_and_gives_the_same_bits(
    tmp_path: Path, way: dict[str, Any]
) -> None:
    kept = tmp_path / "empty"
    first = started(make(), kept, **way)
    for size in SIZES:
        first(x(size))
    second = started(make(), kept, **way)
    third = started(make(), kept, **way)
    for made in (first, second, third):
        assert_same(made, plain(make(), kept, **way))
    stats = third.stats()
    assert stats.compilations == 0
    assert (stats.packings, stats.mapped_bytes) == (0, stats.packed_bytes)
    assert stats.mapped_bytes > WIDTH * WIDTH
    assert f"{stats.mapped_bytes / 2**20:.1f} of them mapped" in str(stats)
    if not way.get("lazy"):  # which comes to the store once all is compiled
        assert first.stats().mapped_bytes == stats.mapped_bytes
        assert second.stats().packings == 0
    assert Store(kept).verify() == []


def test_a_copy_of_onednn_s_is_packed_at_each_start(kept: Path) -> None:
    linear = {"1-4": "packed", "5-16": "onednn"}
    for _ in range(2):
        made = started(make(), kept, linear=linear)
    stats = made.stats()
    assert stats.packings == 2
    assert 0 < stats.mapped_bytes < stats.packed_bytes
    assert_same(made, plain(make(), kept, linear=linear))


def test_originals_are_freed_beside_files(kept: Path) -> None:
    linear = {"1-16": "packed"}
    for _ in range(2):
        module = make()
        made = started(module, kept, linear=linear, free_original_weights=True)
        assert made.stats().freed_bytes == 4 * WIDTH * WIDTH * 4
        assert_same(made, plain(make(), kept, linear=linear))
    before = files(kept)
    module.load_state_dict(make(1).state_dict())
    assert_same(made, plain(make(1), kept, linear=linear))
    assert made.stats().freed_bytes == 4 * WIDTH * WIDTH * 4
    assert files(kept) == before


def test_a_changed_weight_has_a_file_of_its_own(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_files, "FILE_BYTES", 1)  # a file for each
    started(make(), kept)
    other = make()
    other[2].weight[3, 5] += 1
    made = started(other, kept)
    assert made.stats().packings == 1
    assert len(files(kept)) == 3
    assert_same(made, plain(other, kept))


# --- copies ----------------------------------------------------------------------------

MATRIX_LAYOUTS = sorted(
    {*LAYOUTS} - {"plain", "float32", "quads_of_packed", "quads", "quads_t", *UNKEPT}
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3)), min_size=1, max_size=4),
    layouts=st.lists(st.sampled_from(MATRIX_LAYOUTS), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    file_bytes=st.sampled_from([1, 100_000, 1 << 30]),
    staged=st.sampled_from([64, 4096, 1 << 20]),
    seed=st.integers(0, 3),
)
def test_copies_from_files_are_those_that_are_packed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shapes: list[tuple[int, int]],
    layouts: list[str],
    dtype: torch.dtype,
    file_bytes: int,
    staged: int,
    seed: int,
) -> None:
    load()
    monkeypatch.setattr(packed_files, "FILE_BYTES", file_bytes)
    monkeypatch.setattr(packed_files, "STAGED_BYTES", staged)
    generator = torch.Generator().manual_seed(seed)
    wanted = [
        (torch.randn(128 * n, 128 * k, generator=generator).to(dtype), layout)
        for n, k in shapes
        for layout in layouts
    ]
    for again in (False, True):
        weights, direct = PackedWeights(Store(tmp_path / "kept")), PackedWeights()
        weights.add(wanted)
        for weight, layout in wanted:
            copy = weights.get(weight, layout)
            want = direct.get(weight, layout)
            assert (copy.dtype, copy.shape, copy.stride()) == (
                want.dtype,
                want.shape,
                want.stride(),
            )
            assert torch.equal(copy.view(torch.uint8), want.view(torch.uint8))
            assert copy.data_ptr() % 64 == 0
        assert weights.mapped_bytes == weights.nbytes == direct.nbytes
        assert not (again and weights.packings)


def test_equal_bytes_of_another_dtype_or_shape_are_another_weight(kept: Path) -> None:
    load()
    one = torch.zeros(64, 32)
    for other in (torch.zeros(32, 64), torch.zeros(64, 64, dtype=torch.bfloat16)):
        first, second = PackedWeights(Store(kept)), PackedWeights(Store(kept))
        first.add([(one, "packed")])
        second.add([(other, "packed")])
        assert second.packings == 1
        assert second.get(other, "packed").dtype == other.dtype
        first.add([(one, "int8")])
        assert first.get(one, "int8").dtype == torch.int8


def test_a_weight_that_lies_otherwise_is_found_by_its_values(kept: Path) -> None:
    load()
    weight = torch.randn(64, 96)
    PackedWeights(Store(kept)).add([(weight, "packed")])
    later = PackedWeights(Store(kept))
    later.add([(weight.t().contiguous().t(), "packed")])
    assert later.packings == 0


# --- changes of weights ----------------------------------------------------------------


def test_an_update_in_place_is_followed_and_stays_out_of_the_file(kept: Path) -> None:
    started(make(), kept)
    module = make()
    made = started(module, kept)
    before = files(kept)
    module[0].weight.mul_(-2)
    module[2].weight.data = torch.randn(WIDTH, 2 * WIDTH)
    assert_same(made, plain(module, kept))
    assert made.stats().mapped_bytes == 0
    assert files(kept) == before
    assert Store(kept).verify() == []
    other = started(make(), kept)  # maps the same file, in the same process
    assert other.stats().packings == 0
    assert_same(other, plain(make(), kept))


# --- damage ----------------------------------------------------------------------------


def rewrite(path: Path, data: bytes) -> None:
    """Write to a file itself, which is made so that it is not done by accident."""
    assert path.stat().st_mode & 0o777 in (0o400, 0o600)
    path.chmod(0o600)
    path.write_bytes(data)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    rewrite(path, data)


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


DAMAGE: dict[str, Any] = {
    "flipped": flip,
    "cut off": lambda path: rewrite(path, path.read_bytes()[: 4096 + 17]),
    "empty": lambda path: rewrite(path, b""),
    "longer": lambda path: rewrite(path, path.read_bytes() + bytes(64)),
    "a link": link,
    "open to others": lambda path: path.chmod(0o666),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("what", DAMAGE)
@pytest.mark.parametrize("of", ["file", "entry"])
def test_what_is_damaged_is_set_aside_and_packed_anew(
    kept: Path, what: str, of: str, caplog: pytest.LogCaptureFixture
) -> None:
    started(make(), kept)
    (path,) = files(kept)
    if of == "entry":
        (path,) = (path for kind, _, path in Store(kept).entries() if kind == KIND)
        if what == "cut off":
            return  # an entry is shorter
    DAMAGE[what](path)
    caplog.clear()
    made = started(make(), kept)
    assert made.stats().packings == 2
    assert_same(made, plain(make(), kept))
    assert len(said(caplog)) == (what != "gone")
    assert all("it is not used" in line and "\n" not in line for line in said(caplog))
    again = started(make(), kept)
    assert again.stats().packings == 0
    assert len(said(caplog)) == (what != "gone")


def test_a_file_that_is_pruned_while_it_is_mapped_is_read_on(
    kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started(make(), kept)
    made = started(make(), kept)
    assert main(["cache", "prune", "--max-size", "0", "--cache-dir", str(kept)]) == 0
    assert not files(kept)
    assert not list(Store(kept).objects())
    assert_same(made, plain(make(), kept))


def test_commands_that_look_after_the_store_know_the_files(
    kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started(make(), kept)
    store, other = ["--cache-dir", str(kept)], ["--cache-dir", str(tmp_path / "other")]
    assert main(["cache", "list", *store]) == 0
    assert re.search(r"weight +[0-9a-f]{12} +2 packed copies +57\d", capsys.readouterr().out)
    assert main(["cache", "export", str(tmp_path / "all.tar"), *store]) == 0
    assert main(["cache", "import", str(tmp_path / "all.tar"), *other]) == 0
    assert main(["cache", "verify", *other]) == 0
    assert started(make(), tmp_path / "other").stats().packings == 0
    (path,) = files(kept)
    flip(path)
    capsys.readouterr()
    assert main(["cache", "verify", *store]) == 2
    assert "does not have the content" in capsys.readouterr().out


# --- processes -------------------------------------------------------------------------

RUN = """
import json, logging, os, re, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from splitpoint import Config, compile
from splitpoint.store.store import Store
sys.path.insert(0, {tests!r})
from tests.runtime.test_packed_files import PLAN, SIZES, files, make, x

lines = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: lines.append(record.getMessage())
logging.getLogger("splitpoint").addHandler(handler)

def serve(**settings):
    made = compile(make(), Config(**PLAN | {{"cache_dir": sys.argv[1]}} | settings))
    return made, [made(x(size)) for size in SIZES]

def mapped():
    "KiB of the file of packed weights in this process: resident, by share, written to."
    found, names = {{}}, [path.name for path in files(Path(sys.argv[1]))]
    for block in re.split(r"\\n(?=[0-9a-f]+-[0-9a-f]+ )", open("/proc/self/smaps").read()):
        if block.partition("\\n")[0].endswith(tuple(names)):
            for name, value in re.findall(r"(Rss|Pss|Private_Dirty): +(\\d+) kB", block):
                found[name] = found.get(name, 0) + int(value)
    return found

{change}
made, results = serve(mmap_packed_weights=True)
print("ready", flush=True)
sys.stdin.readline()
shares = mapped()
print("measured", flush=True)
sys.stdin.readline()
stats = made.stats()
_, want = serve()
print(json.dumps(dict(equal=all(map(torch.equal, results, want)), packings=stats.packings,
    packed=stats.packed_bytes, mapped=stats.mapped_bytes, lines=lines, **shares)))
"""


class Running:
    """A process that serves the model with files."""

    def __init__(self, kept: Path, change: str = "") -> None:
        tests = str(Path(__file__).parents[2])
        code = RUN.format(change=textwrap.dedent(change), tests=tests)
        env = {**os.environ, "PYTHONPATH": PACKAGE, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(kept)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )

    def say(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def hear(self, word: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == f"{word}\n", self.process.communicate()[1]

    def answer(self) -> dict[str, Any]:
        out, err = self.process.communicate("\n\n", timeout=200)
        assert self.process.returncode == 0, err
        answer: dict[str, Any] = json.loads(out.splitlines()[-1])
        assert answer["equal"]
        return answer


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/smaps")
def test_two_processes_share_the_pages(kept: Path) -> None:
    Running(kept).answer()
    both = [Running(kept), Running(kept)]
    for each in both:
        each.hear("ready")
    for each in both:
        each.say()
        each.hear("measured")
    for answer in [each.answer() for each in both]:
        assert (answer["packings"], answer["mapped"]) == (0, answer["packed"])
        assert answer["Rss"] * 1024 >= answer["mapped"]
        assert answer["Pss"] <= answer["Rss"] * 0.55
        assert answer["Private_Dirty"] == 0


def test_processes_that_start_together_end_with_the_same_files(kept: Path) -> None:
    together = [Running(kept) for _ in range(3)]
    for each in together:
        each.hear("ready")
    for each in together:
        each.say()
        each.hear("measured")
    answers = [each.answer() for each in together]
    assert all(answer["mapped"] == answer["packed"] for answer in answers)
    assert sorted(answer["packings"] for answer in answers) == [0, 0, 2]
    assert all(answer["Pss"] <= answer["Rss"] * 0.4 for answer in answers)
    assert not any(answer["lines"] for answer in answers)
    assert len(files(kept)) == 1
    assert Store(kept).verify() == []
    assert not list(kept.glob("**/tmp-*"))


KILLED = """
def die(self, step):
    self.steps = [*getattr(self, "steps", ()), step]
    if step == {step!r} and "part" in self.steps:
        os.kill(os.getpid(), signal.SIGKILL)
Store._step = property(lambda self: lambda step: die(self, step), lambda self, value: None)
"""


@pytest.mark.parametrize("step", ["part", "folder"])
def test_a_process_killed_while_it_writes_leaves_nothing_half(kept: Path, step: str) -> None:
    process = Running(kept, KILLED.format(step=step)).process
    process.communicate("\n\n", timeout=200)
    assert process.returncode == -9
    assert Store(kept).verify() == []
    assert not files(kept)  # the entry comes last
    answer = Running(kept).answer()
    assert (answer["packings"], answer["mapped"]) == (2, answer["packed"])
    assert not answer["lines"]
    assert Running(kept).answer()["packings"] == 0


NO_ROOM = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
"""


@pytest.mark.parametrize("limit", [0, 4096, 400_000])
def test_where_nothing_can_be_written_weights_lie_in_memory(kept: Path, limit: int) -> None:
    answer = Running(kept, NO_ROOM.format(limit=limit)).answer()
    assert answer["mapped"] == 0
    assert len(answer["lines"]) == 1
    assert "cannot write to" in answer["lines"][0]
    assert not list(kept.glob("**/tmp-*"))
    assert not files(kept)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m,mode=700", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_store_that_cannot_be_written_to_is_read(
    kept: Path, disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(kept, disk / "kept")
    started(make(), disk / "kept")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    caplog.clear()
    made = started(make(), disk / "kept")
    assert made.stats().packings == 0
    assert_same(made, plain(make(), disk / "kept"))
    assert not said(caplog)
    other = started(make(1), disk / "kept")
    assert (other.stats().packings, other.stats().mapped_bytes) == (2, 0)
    assert len(said(caplog)) == 1
    assert_same(other, plain(make(1), disk / "kept"))


# --- where it is refused ---------------------------------------------------------------


def test_without_a_store_it_is_refused() -> None:
    with pytest.raises(errors.InvalidField, match="cache_dir"):
        Config(mmap_packed_weights=True, cache_dir="")


def test_it_is_not_for_torch_compile(kept: Path) -> None:
    options = {**PLAN, "cache_dir": str(kept), "mmap_packed_weights": True}
    by_dynamo = torch.compile(make(), backend="splitpoint", options=options)
    with pytest.raises(Exception, match=r"not for torch\.compile") as raised:
        by_dynamo(x(3))
    causes = [raised.value, raised.value.__cause__, getattr(raised.value, "inner_exception", None)]
    assert any(isinstance(cause, errors.ConfigError) for cause in causes)
