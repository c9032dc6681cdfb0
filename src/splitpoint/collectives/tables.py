"""Read tables of measured times as `policy.Measurement`s, and write them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch

from ..errors import InvalidPolicy
from .measured import Measurement
from .policy import ALGORITHMS, Algorithm, Key, Quant

OPERATIONS: dict[str, Algorithm] = {
    "standard": "standard",
    "native_compiled": "native",
    "fused_oneshot": "one_shot",
    "fused_twoshot": "two_shot",
}
"""Algorithms by the names that public tables give them."""
QUANTS: dict[str, Quant] = {
    "none": "none",
    "fp8": "fp8_static",
    "fp8_token": "fp8_token",
    "fp4": "nvfp4",
}
DEVICES = {"H100": "sm90", "B200": "sm100"}
"""Capabilities of named devices; others stand for themselves."""


def read_table(path: Path) -> tuple[list[Measurement], str]:
    """The measurements of a JSON table, and its source.

    The table has `source` and `rows` of device, world_size, quant, hidden, tokens, dtype,
    residual, and `ms`: milliseconds by operation.

    Raises:
        InvalidPolicy: when the file is no such table.
    """
    try:
        data = json.loads(path.read_text())
        rows = [_measurement(row) for row in data["rows"]]
        return rows, str(data["source"])
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise InvalidPolicy(
            f"{path} is not a table of measurements ({error}): give what --json wrote"
        ) from error


def _measurement(row: dict[str, object]) -> Measurement:
    dtype = getattr(torch, str(row["dtype"]))
    hidden, tokens, world_size = (int(str(row[n])) for n in ("hidden", "tokens", "world_size"))
    key = Key(
        DEVICES.get(str(row["device"]), str(row["device"])),
        world_size,
        str(row["dtype"]),
        bool(row["residual"]),
        QUANTS[str(row["quant"])],
        hidden,
    )
    given = {OPERATIONS[name]: float(ms) / 1e3 for name, ms in row["ms"].items()}  # type: ignore[attr-defined]
    seconds = tuple((a, given[a]) for a in ALGORITHMS if a in given)
    return Measurement(key, tokens * hidden * dtype.itemsize, seconds)


def table_json(rows: Iterable[Measurement], source: str) -> str:
    """A table that `read_table` reads, one row a line."""
    operations = {a: name for name, a in OPERATIONS.items()}
    quants = {quant: name for name, quant in QUANTS.items()}
    lines = []
    for row in rows:
        key = row.key
        assert key.dtype is not None
        assert key.quant is not None
        assert key.hidden is not None
        itemsize = getattr(torch, key.dtype).itemsize
        record = {
            "device": key.device,
            "world_size": key.world_size,
            "quant": quants[key.quant],
            "hidden": key.hidden,
            "tokens": row.nbytes // (key.hidden * itemsize),
            "dtype": key.dtype,
            "residual": key.residual,
            "ms": {operations[a]: round(1e3 * t, 6) for a, t in row.seconds},
        }
        lines.append(json.dumps(record))
    return "\n".join([f'{{"source": {json.dumps(source)}, "rows": [', ",\n".join(lines), "]}"])
