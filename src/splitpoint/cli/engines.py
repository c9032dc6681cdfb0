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
        if _rounding(args):
            raise UsageError(
                "--check compares equal weights: leave --weights and --activations out"
            )
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
        rounding=_rounding(args),
        others=args.others,
        say=say,
    )
    show(report, args.json)


def _rounding(args: argparse.Namespace) -> dict[str, str]:
    given = {"weights": args.weights, "activations": args.activations}
    if args.activations and not args.weights:
        raise UsageError("--activations go with --weights int8 or int4: give both")
    return {name: kind for name, kind in given.items() if kind}


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
        rounding=_rounding(args),
        others=args.others,
        client=args.client,
        say=say,
    )
    show(report, args.json)
    if args.png:
        save_picture(report, args.png)
