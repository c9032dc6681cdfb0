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
    from ..bench import continuous, generate, generate_check
    from ..bench.picture import check_outputs
    from ..models.catalogue import DTYPES, load

    config = config_of(args)
    asked = [flag for flag in ("check", "requests", "png") if getattr(args, flag)]
    if len(asked) > 1:
        names = " and ".join(f"--{'plot' if flag == 'png' else flag}" for flag in asked)
        raise UsageError(f"{names} ask for different things: leave all but one of them out")
    if args.rate and not args.requests:
        raise UsageError("--rate says how many --requests come a second: give --requests N too")
    check_outputs(png=args.png, json=args.json)
    say(f"loading {args.model} ({args.dtype}) ...")
    model, _ = load(
        args.model, DTYPES[args.dtype], layers=args.layers, random_weights=args.random_weights
    )
    what = model, args.model, config
    how = {"new_tokens": args.new_tokens, "threads": args.threads, "say": say}
    if args.check:
        checked = generate_check.check(*what, prompts=args.check, **how)
        show(checked, args.json)
        checked.require()
    elif args.requests:
        if args.rate:
            how["rate"] = args.rate
        served = continuous.run(*what, requests=args.requests, rounds=args.rounds, **how)
        show(served, args.json)
        served.require()
    else:
        report = generate.run(
            *what,
            prompts=args.prompts,
            batches=args.batches,
            entrants=args.entrants,
            rounds=args.rounds,
            **how,
        )
        show(report, args.json)
        if args.png:
            report.save_picture(args.png)
