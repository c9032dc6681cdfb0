"""The verbs that generate text, and time or check it."""

from __future__ import annotations

import argparse

from ..errors import UsageError
from .config_file import config_of
from .output import say, show


def generate(args: argparse.Namespace) -> None:
    """`splitpoint generate`."""
    from ..bench.answer import Sampling
    from ..bench.picture import check_outputs
    from .generate import run

    check_outputs(json=args.json)
    sampling = None
    if args.sample or args.temperature is not None:
        sampling = Sampling(args.temperature or 1.0, args.seed)
    generated = run(
        args.model,
        args.prompt,
        config_of(args),
        dtype=args.dtype,
        threads=args.threads,
        new_tokens=args.max_new_tokens,
        raw=args.raw,
        sampling=sampling,
        layers=args.layers,
        say=say,
    )
    say(str(generated))
    if args.json:
        args.json.write_text(generated.to_json() + "\n")


def bench_generate(args: argparse.Namespace) -> None:
    """`splitpoint bench generate`."""
    from ..bench.generate import run
    from ..bench.generate_check import check
    from ..bench.picture import check_outputs
    from ..models.catalogue import DTYPES, load

    config = config_of(args)
    if args.check and args.png:
        raise UsageError("--plot draws times, and --check takes none: leave one of them out")
    check_outputs(png=args.png, json=args.json)
    say(f"loading {args.model} ({args.dtype}) ...")
    model, _ = load(
        args.model, DTYPES[args.dtype], layers=args.layers, random_weights=args.random_weights
    )
    if args.check:
        checked = check(
            model,
            args.model,
            config,
            prompts=args.check,
            new_tokens=args.new_tokens,
            threads=args.threads,
            say=say,
        )
        show(checked, args.json)
        checked.require()
        return
    report = run(
        model,
        args.model,
        config,
        prompts=args.prompts,
        new_tokens=args.new_tokens,
        batches=args.batches,
        entrants=args.entrants,
        rounds=args.rounds,
        threads=args.threads,
        say=say,
    )
    show(report, args.json)
    if args.png:
        report.save_picture(args.png)
