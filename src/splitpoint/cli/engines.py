"""The verbs about other programs that this package is used in."""

from __future__ import annotations

import argparse

from ..errors import UsageError
from .output import say, show


def bench_vllm(args: argparse.Namespace) -> None:
    """`splitpoint bench vllm`."""
    from ..bench.engine import check, run
    from ..bench.picture import check_outputs

    check_outputs(json=args.json)
    if args.check:
        if args.weights:
            raise UsageError("--check compares equal weights: leave --weights out")
        checked = check(
            args.model,
            dtype=args.dtype,
            threads=args.threads,
            prompts=args.check,
            eager=not args.compiled,
            say=say,
        )
        show(checked, args.json)
        checked.require()
        return
    report = run(
        args.model,
        dtype=args.dtype,
        threads=args.threads,
        batches=args.batches,
        prompt=args.prompt,
        starts=args.starts,
        eager=not args.compiled,
        isa=args.isa,
        weights=args.weights,
        others=args.others,
        say=say,
    )
    show(report, args.json)


def bench_serve(args: argparse.Namespace) -> None:
    """`splitpoint bench serve`."""
    from ..bench.picture import check_outputs
    from ..bench.serve import run
    from ..bench.serve_report import save_picture

    check_outputs(png=args.png, json=args.json)
    report = run(
        args.model,
        dtype=args.dtype,
        threads=args.threads,
        rates=args.rates,
        inputs=args.inputs,
        outputs=args.outputs,
        requests=args.requests,
        ranks=args.tp,
        rounds=args.rounds,
        mode="compiled" if args.compiled else "eager",
        split_points=args.ranges,
        weights=args.weights,
        others=args.others,
        client=args.client,
        say=say,
    )
    show(report, args.json)
    if args.png:
        save_picture(report, args.png)
