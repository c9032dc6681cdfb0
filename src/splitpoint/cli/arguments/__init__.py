"""The arguments of the command line: how they are spelled, what they default to, their help."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Mapping
from typing import Any, NoReturn

from ... import __version__
from . import cache, engines, generate, measure, models, tuner
from .shared import COMPILE_SIZES, EXIT_CODES, MAX_SIZE, SPLIT_POINTS, Verb

__all__ = ["COMPILE_SIZES", "MAX_SIZE", "SPLIT_POINTS", "make_parser"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"splitpoint: error: {message} (see {self.prog} --help)\n")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        import torch

        print(
            f"splitpoint {__version__} (torch {torch.__version__}, "
            f"Python {platform.python_version()})"
        )
        parser.exit()


def make_parser(verbs_by_name: Mapping[str, Verb]) -> argparse.ArgumentParser:
    """The parser of `splitpoint`; what it parses has the verb to run as `verb`."""
    parser = _Parser(
        prog="splitpoint",
        description="Compile a PyTorch model once per range of sizes (numbers of tokens) and "
        "send each call to the graph of its range.",
        epilog=EXIT_CODES + " Each verb has its own --help.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print versions and exit")
    verbs = parser.add_subparsers(required=True, metavar="VERB", title="verbs")

    models.add_demo(verbs, verbs_by_name["demo"])
    generate.add_generate(verbs, verbs_by_name["generate"])
    models.add_plan(verbs, verbs_by_name["plan"])
    models.add_run(verbs, verbs_by_name["run"])
    models.add_compile(verbs, verbs_by_name["compile"])
    models.add_env(verbs, verbs_by_name["env"])
    caches = verbs.add_parser(
        "cache", help="look after the store", description="Look after the store of artifacts."
    )
    whats = caches.add_subparsers(required=True, metavar="WHAT", title="what to do")
    cache.add_cache(whats, verbs_by_name)
    bench = verbs.add_parser("bench", help="measurements", description="Measurements.")
    benches = bench.add_subparsers(required=True, metavar="WHAT", title="what to measure")
    measure.add_bench_forward(benches, verbs_by_name["bench forward"])
    generate.add_bench_generate(benches, verbs_by_name["bench generate"])
    measure.add_bench_dispatch(benches, verbs_by_name["bench dispatch"])
    measure.add_bench_encode(benches, verbs_by_name["bench encode"])
    measure.add_bench_linear(benches, verbs_by_name["bench linear"])
    tuner.add_bench_tuner(benches, verbs_by_name["bench tuner"])
    generate.add_bench_perplexity(benches, verbs_by_name["bench perplexity"])
    measure.add_bench_collective(benches, verbs_by_name["bench collective"])
    measure.add_bench_parallel(benches, verbs_by_name["bench parallel"])
    engines.add_bench_vllm(benches, verbs_by_name["bench vllm"])
    engines.add_bench_serve(benches, verbs_by_name["bench serve"])
    tune = verbs.add_parser(
        "tune", help="choices by measuring", description="Choices by measuring."
    )
    tunes = tune.add_subparsers(required=True, metavar="WHAT", title="what to choose")
    measure.add_tune_collective(tunes, verbs_by_name["tune collective"])
    measure.add_bench_startup(benches, verbs_by_name["bench startup"])
    return parser
