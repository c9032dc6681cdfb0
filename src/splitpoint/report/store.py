"""What is in a store, as a table."""

from __future__ import annotations

import json
import time

from ..ranges import Plan, align
from ..store.store import Store


def listing(store: Store) -> str:
    """Models and pieces, those used last first."""
    rows = [("kind", "key", "what", "size KiB", "used")]
    entries = []
    for kind, key, path in store.entries():
        entry = store.read(kind, key, use=False)
        if entry is None:
            continue
        used = path.stat().st_mtime
        paths = [store.object_path(digest) for digest in entry.get("objects", ())]
        sizes = [each.stat().st_size for each in paths if each.exists()]
        entries.append((used, kind, key, entry, path.stat().st_size + sum(sizes)))
    for used, kind, key, entry, size in sorted(entries, key=lambda each: -each[0]):
        rows.append((kind[:-1], key[:12], _what(kind, entry), f"{size / 1024:.0f}", _ago(used)))
    objects = sum(path.stat().st_size for path in store.objects())
    held = f"{objects / 2**20:.1f} MiB of libraries and packed weights"
    total = f"{store.folder}: {len(entries)} entries, {held}"
    return "\n".join([total, *align(rows, right={3})] if entries else [total])


def _what(kind: str, entry: dict[str, object]) -> str:
    if kind == "models":
        plan = Plan.from_json(str(entry["plan"]))
        return f"{len(plan.entries)} ranges up to {plan.max_size}"
    fields = entry["fields"]
    assert isinstance(fields, dict)
    if kind == "weights":
        return f"{len(json.loads(fields['copies']))} packed copies"
    return f"range {fields['range']}, hint {fields['hint']}"


def _ago(when: float) -> str:
    seconds = max(0.0, time.time() - when)
    for length, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= length:
            return f"{seconds / length:.0f} {name} ago"
    return "just now"
