"""`splitpoint bench perplexity`: the verb."""

from __future__ import annotations

import argparse
import sys


def bench_perplexity(args: argparse.Namespace) -> None:
    """`splitpoint bench perplexity`."""
    from ..bench.perplexity import run
    from ..bench.picture import check_outputs

    check_outputs(json=args.json)
    report = run(
        args.model,
        args.text,
        weights=[None if kind == "none" else kind for kind in args.weights],
        activations=[kind for kind in args.activations if kind != "none"],
        dtype=args.dtype,
        threads=args.threads,
        tokens=args.tokens,
        window=args.window,
        layers=args.layers,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(report)
    if args.json:
        args.json.write_text(report.to_json() + "\n")
