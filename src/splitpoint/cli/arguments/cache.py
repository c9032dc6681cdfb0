"""Verbs that look after the store."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .shared import (
    MODEL_HELP,
    Verb,
    byte_count,
    config_arguments,
    layers_argument,
    run_arguments,
    store_argument,
    verb,
)


def add_cache(verbs: Any, run: Mapping[str, Verb]) -> None:
    """Add `splitpoint cache` and what belongs to it."""
    parser = verb(
        verbs,
        "list",
        run["cache list"],
        "what is in the store",
        "Lists models and pieces, those used last first, with their sizes.",
        "examples:\n  splitpoint cache list",
    )
    store_argument(parser)
    parser = verb(
        verbs,
        "verify",
        run["cache verify"],
        "read everything in the store and say what is damaged",
        "Reads every file and compares its hash. Exit code 2 when something is wrong.",
        "examples:\n  splitpoint cache verify --cache-dir /srv/store",
    )
    store_argument(parser)
    parser = verb(
        verbs,
        "prune",
        run["cache prune"],
        "remove what was used longest ago",
        "Removes entries, those used longest ago first, until the rest takes no more than SIZE.",
        "examples:\n  splitpoint cache prune --max-size 500M",
    )
    parser.add_argument(
        "--max-size",
        type=byte_count,
        required=True,
        metavar="SIZE",
        help="bytes; K, M and G are known",
    )
    store_argument(parser)
    parser = verb(
        verbs,
        "export",
        run["cache export"],
        "write the store to a file",
        "Writes all that is sound in the store to a tar file.",
        "examples:\n  splitpoint cache export artifacts.tar",
    )
    parser.add_argument("file", type=Path, metavar="FILE")
    store_argument(parser)
    parser = verb(
        verbs,
        "import",
        run["cache import"],
        "add what 'cache export' wrote to the store",
        """\
Adds the artifacts of a file to the store. They hold code that is run: import files only from
those you trust.""",
        "examples:\n  splitpoint cache import artifacts.tar",
    )
    parser.add_argument("file", type=Path, metavar="FILE")
    store_argument(parser)
    parser = verb(
        verbs,
        "why-miss",
        run["cache why-miss"],
        "say why a model would be compiled anew",
        """\
Compares the key of a model, as it would be started with these flags, with the nearest one in
the store, field by field.""",
        "examples:\n  splitpoint cache why-miss smollm2 --max-size 1024",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    store_argument(parser)
    layers_argument(parser)
    run_arguments(parser)
    config_arguments(parser)
