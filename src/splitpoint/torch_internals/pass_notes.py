"""Notes that passes leave with the graph that Inductor compiles, found again in its caches."""

from __future__ import annotations

from .probe import fits

_NOTE = "splitpoint "


def keep_note(text: str) -> None:
    """Keep a text with the graph that Inductor compiles now: `take_notes` returns it after the
    compile, and after each that takes the graph from Inductor's caches instead. They count
    what they do by name, and keep the counts with a graph; a note is such a name."""
    if not fits("notes of passes"):
        return
    from torch._dynamo.utils import counters

    counters["inductor"][_NOTE + text] += 1


def take_notes() -> dict[str, int]:
    """The notes of the graphs compiled or loaded since the last call, with how often each was
    kept; forgets them."""
    if not fits("notes of passes"):
        return {}
    from torch._dynamo.utils import counters

    own = counters["inductor"]
    names = [name for name in own if name.startswith(_NOTE)]
    return {name.removeprefix(_NOTE): own.pop(name) for name in names}
