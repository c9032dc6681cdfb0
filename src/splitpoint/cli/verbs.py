"""The command line: one verb a function, no logic."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import Config
from ..errors import SplitpointError, StoreError
from ..store import open_store
from ..store.store import Store
from .arguments import make_parser
from .config_file import config_of
from .engines import bench_serve, bench_vllm
from .generating import bench_generate, generate
from .output import say as _say
from .output import show as _show
from .perplexity import bench_perplexity

if TYPE_CHECKING:
    from ..bench.collective_report import CollectiveReport


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the answer is the exit code."""
    try:
        args = make_parser(VERBS).parse_args(argv)
        with _insistent_interrupts():
            args.verb(args)
    except SplitpointError as error:
        print(f"splitpoint: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("splitpoint: interrupted", file=sys.stderr)
        return 130
    return 0


@contextmanager
def _insistent_interrupts() -> Iterator[None]:
    """Let Ctrl-C come again each second until it gets through: Python drops what is raised in
    finalizers and callbacks, and some libraries drop it while they are imported."""
    if threading.current_thread() is not threading.main_thread() or sys.platform == "win32":
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        raise KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGALRM)
    before = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


# --- the verbs -------------------------------------------------------------------------


def env(args: argparse.Namespace) -> None:
    """`splitpoint env`."""
    from .. import __version__
    from ..report.environment import software

    config = Config() if args.cache_dir is None else Config(cache_dir=str(args.cache_dir))
    print(software(open_store(config), __version__, args.names))


def demo(args: argparse.Namespace) -> None:
    """`splitpoint demo`."""
    from ..bench.demo import run
    from ..bench.picture import check_outputs

    check_outputs(png=args.png)
    run(
        config_of(args),
        dtype=args.dtype,
        threads=args.threads,
        prompt=args.prompt,
        png=args.png,
        say=_say,
    )


def plan(args: argparse.Namespace) -> None:
    """`splitpoint plan`."""
    from ..models.catalogue import describe
    from ..runtime.dynamo_backend import check_options

    config = config_of(args)
    check_options(config)
    print(describe(args.model, layers=args.layers))
    print(config.plan())


def run(args: argparse.Namespace) -> None:
    """`splitpoint run`."""
    from .run import Job, read_policy, run

    job = Job(
        args.model,
        args.dtype,
        config_of(args).to_json(),
        read_policy(args.policy).to_json(),
        args.collectives,
        args.prompt,
        args.tokens,
        args.layers,
    )
    answer = run(job, tp=args.tp, threads=args.threads)
    if answer is not None:
        print(answer)


def bench_forward(args: argparse.Namespace) -> None:
    """`splitpoint bench forward`."""
    from ..bench.forward import check_sizes, run
    from ..bench.picture import check_outputs, save_picture
    from ..models.catalogue import DTYPES, load
    from .isa import as_if_avx2

    config = config_of(args)
    check_sizes(args.sizes, config)
    check_outputs(png=args.png, json=args.json)
    if args.isa == "avx2":
        as_if_avx2()
    _say(f"loading {args.model} ({args.dtype}) ...")
    model, _ = load(
        args.model, DTYPES[args.dtype], layers=args.layers, random_weights=args.random_weights
    )
    report = run(
        model,
        args.model,
        config,
        sizes=args.sizes,
        threads=args.threads,
        budget_s=args.seconds,
        singles=args.singles,
        baselines=args.baselines,
        say=_say,
    )
    _show(report, args.json)
    if args.png:
        save_picture(report, args.png)


def bench_dispatch(args: argparse.Namespace) -> None:
    """`splitpoint bench dispatch`."""
    from ..bench.dispatch import run
    from ..bench.picture import check_outputs

    check_outputs(json=args.json)
    report = run(layers=args.layers, budget_s=args.seconds)
    _show(report, args.json)


def bench_encode(args: argparse.Namespace) -> None:
    """`splitpoint bench encode`."""
    import functools

    from ..bench.encode import run
    from ..bench.picture import check_outputs
    from ..models.catalogue import DTYPES, load_encoder

    check_outputs(json=args.json)
    report = run(
        functools.partial(load_encoder, args.model),
        args.model,
        DTYPES[args.dtype],
        count=args.texts,
        rounds=args.rounds,
        threads=args.threads,
        say=_say,
    )
    _show(report, args.json)


def bench_linear(args: argparse.Namespace) -> None:
    """`splitpoint bench linear`."""
    from ..bench.linear_report import run, save_picture
    from ..bench.picture import check_outputs
    from ..models.catalogue import DTYPES
    from .isa import as_if_avx2

    check_outputs(png=args.png, json=args.json)
    if args.isa == "avx2":
        as_if_avx2()
    report = run(
        args.n,
        args.k,
        DTYPES[args.dtype],
        sizes=args.sizes,
        threads=args.threads,
        budget_s=args.seconds,
        weights=args.weights,
    )
    _show(report, args.json)
    if args.png:
        save_picture(report, args.png)


def bench_tuner(args: argparse.Namespace) -> None:
    """`splitpoint bench tuner`."""
    from ..bench.picture import check_outputs
    from ..bench.tuner import run
    from ..models.catalogue import DTYPES, load

    config = config_of(args)
    check_outputs(json=args.json)
    _say(f"loading {args.model} ({args.dtype}) ...")
    model, _ = load(args.model, DTYPES[args.dtype], layers=args.layers)
    report = run(
        model,
        args.model,
        config,
        runs=args.runs,
        load=args.load,
        threads=args.threads,
        budget_s=args.seconds,
        say=_say,
    )
    _show(report, args.json)


def bench_collective(args: argparse.Namespace) -> None:
    """`splitpoint bench collective`."""
    from ..bench.collective_report import save_pictures
    from ..bench.picture import check_outputs

    check_outputs(png=args.png, json=args.json)
    report = _measure_collectives(args, args.baselines, args.policy)
    _show(report, args.json)
    if args.png:
        for path in save_pictures(report, args.png):
            _say(f"wrote {path}")


def bench_parallel(args: argparse.Namespace) -> None:
    """`splitpoint bench parallel`."""
    from ..bench.forward import check_sizes
    from ..bench.parallel import run
    from ..bench.picture import check_outputs
    from .run import read_policy

    config = config_of(args)
    check_sizes(args.sizes, config)
    check_outputs(json=args.json)
    report = run(
        args.model,
        config,
        read_policy(args.policy),
        ranks=args.tp,
        dtype=args.dtype,
        sizes=args.sizes,
        threads=args.threads,
        budget_s=args.seconds,
        layers=args.layers,
        starts=args.starts,
        say=_say,
    )
    _show(report, args.json)


def bench_startup(args: argparse.Namespace) -> None:
    """`splitpoint bench startup`."""
    from ..bench.picture import check_outputs
    from ..bench.startup import run

    check_outputs(json=args.json)
    report = run(
        args.model,
        config_of(args),
        layers=args.layers,
        dtype=args.dtype,
        threads=args.threads,
        warm_starts=args.warm_starts,
        torch_compile=not args.no_torch_compile,
        say=_say,
    )
    _show(report, args.json)


def tune_collective(args: argparse.Namespace) -> None:
    """`splitpoint tune collective`."""
    from ..bench.collective_tune import from_report, from_table
    from ..bench.picture import check_outputs

    for path in (args.policy, args.json):
        check_outputs(json=path)
    tuned = (
        from_table(args.table) if args.table else from_report(_measure_collectives(args, ["gloo"]))
    )
    print(tuned)
    args.policy.write_text(tuned.policy.to_json() + "\n")
    if args.json:
        args.json.write_text(tuned.to_table() + "\n")


def compile_model(args: argparse.Namespace) -> None:
    """`splitpoint compile`."""
    from .prebuild import fill

    print(fill(args.model, _store_config(args), args.dtype, args.threads, args.layers))


def cache_list(args: argparse.Namespace) -> None:
    """`splitpoint cache list`."""
    from ..report.store import listing

    print(listing(_store(args)))


def cache_verify(args: argparse.Namespace) -> None:
    """`splitpoint cache verify`."""
    store = _store(args)
    problems = store.verify()
    for problem in problems:
        print(problem)
    if problems:
        raise StoreError(
            f"{len(problems)} files of {store.folder} are not sound; they are not used"
        )
    print(f"{store.folder}: {sum(1 for _ in store.entries())} entries, all sound")


def cache_prune(args: argparse.Namespace) -> None:
    """`splitpoint cache prune`."""
    removed, freed = _store(args).prune(args.max_size)
    print(f"removed {removed} files, {freed / 2**20:.1f} MiB")


def cache_export(args: argparse.Namespace) -> None:
    """`splitpoint cache export`."""
    from ..store.transfer import export

    print(f"{args.file}: {export(_store(args), args.file)} files")


def cache_import(args: argparse.Namespace) -> None:
    """`splitpoint cache import`."""
    from ..store.transfer import import_file

    added, refused = import_file(_store(args), args.file)
    print(f"added {added} files")
    if refused:
        raise StoreError(f"{refused} files in {args.file} are damaged or foreign; left out")


def cache_why_miss(args: argparse.Namespace) -> None:
    """`splitpoint cache why-miss`."""
    from .prebuild import why_miss

    print(why_miss(args.model, _store_config(args), args.dtype, args.threads, args.layers))


VERBS = {
    "env": env,
    "demo": demo,
    "generate": generate,
    "plan": plan,
    "run": run,
    "bench forward": bench_forward,
    "bench generate": bench_generate,
    "bench dispatch": bench_dispatch,
    "bench encode": bench_encode,
    "bench linear": bench_linear,
    "bench perplexity": bench_perplexity,
    "bench tuner": bench_tuner,
    "bench collective": bench_collective,
    "bench parallel": bench_parallel,
    "tune collective": tune_collective,
    "bench startup": bench_startup,
    "bench vllm": bench_vllm,
    "bench serve": bench_serve,
    "compile": compile_model,
    "cache list": cache_list,
    "cache verify": cache_verify,
    "cache prune": cache_prune,
    "cache export": cache_export,
    "cache import": cache_import,
    "cache why-miss": cache_why_miss,
}


# --- what their arguments mean ---------------------------------------------------------


def _measure_collectives(
    args: argparse.Namespace, baselines: Sequence[str], policy: Path | None = None
) -> CollectiveReport:
    from ..bench.collective_report import DTYPES, run
    from .run import read_policy

    return run(
        ranks=args.ranks,
        hidden=args.hidden,
        tokens=args.tokens,
        dtype=DTYPES[args.dtype],
        residual={"with": [True], "without": [False], "both": [True, False]}[args.residual],
        quants=args.quants,
        threads=args.threads,
        budget_s=args.seconds,
        say=_say,
        policy=read_policy(policy),
        baselines=baselines,
        starts=args.starts,
    )


def _store_config(args: argparse.Namespace) -> Config:
    folder = None if args.cache_dir is None else str(args.cache_dir)
    return replace(config_of(args), cache_dir=folder)


def _store(args: argparse.Namespace) -> Store:
    folder = None if args.cache_dir is None else str(args.cache_dir)
    store = open_store(Config(cache_dir=folder))
    if store is None:
        raise StoreError("there is no store to look after here")
    return store
