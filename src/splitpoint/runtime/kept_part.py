"""One of Dynamo's graphs, compiled, as bytes that another process starts from.

For who keeps what Dynamo captured: neither Dynamo nor a compiler runs then.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..capture.module_state import ModuleState
from ..compilers.artifact import Missing
from ..config import Config
from ..graph.pieces import Split
from ..store import open_store
from ..store.constants import NotKept
from ..store.key import environment
from .dynamo_backend import Part
from .kept_lanes import LanesLoader, lanes_entry
from .lanes import Graph
from .program import Program


def save_part(part: Part, about: Mapping[str, Any]) -> bytes:
    """Keep a part whose ranges are all compiled.

    Args:
        part: whose inputs are all arguments of its calls.
        about: JSON that `load_part` must be given too.

    Raises:
        NotKept: when another process could not have the same from it.
    """
    program = part.program
    if program.store is None:
        raise NotKept("no store for its pieces")
    (dispatch,) = program.dispatches
    graphs = list({id(lane.graph): lane.graph for lane in dispatch.lanes}.values())
    if any(graph.bound for graph in graphs):
        raise NotKept("tensors that are no arguments")
    entry = {
        "about": about,
        "environment": _environment(),
        "place": part.place,
        "graphs": [
            {
                "arguments": graph.argument_count,
                "pieces": graph.piece_count,
                "unique": list(graph.unique),
                "names": list(graph.argument_names),
            }
            for graph in graphs
        ],
        **lanes_entry(program.store, dispatch.lanes, graphs, program.config.max_size),
    }
    return json.dumps(entry).encode()


def load_part(data: bytes, about: Mapping[str, Any], config: Config) -> Part:
    """The part of `save_part`, ready to run.

    Args:
        data: what `save_part` returned.
        about: as it was given then; where something is otherwise, the part is not used.
        config: as the part had it.

    Raises:
        Missing: when it was made for something else, or the store has not all of it any more.
    """
    entry = json.loads(data)
    now = {"about": json.loads(json.dumps(about)), "environment": _environment()}
    for what, fields in now.items():
        names = sorted(fields.keys() | entry[what].keys())
        if other := [name for name in names if fields.get(name) != entry[what].get(name)]:
            raise Missing(f"what was kept is for another {', '.join(other)}")
    store = open_store(config)
    if store is None:
        raise Missing("there is no store")
    place = None if entry["place"] is None else tuple(entry["place"])
    if place is None:
        config = replace(config, max_size=1, split_points=(), compile_sizes=())
    graphs = [
        Graph(
            Split((), (), (), {}),
            (),
            each["arguments"],
            None,
            ModuleState(),
            each["pieces"],
            unique=tuple(each["unique"]),
            argument_names=each["names"],
            is_loaded=True,
        )
        for each in entry["graphs"]
    ]
    program = Program(config, store)
    try:
        dispatch = LanesLoader(store, entry, program).start(graphs)
    except (LookupError, ImportError, OSError, AttributeError) as why:
        raise Missing(str(why)) from why
    return Part.of(program, dispatch, place)


def _environment() -> dict[str, str]:
    """What the code of any part depends on. Settings of torch's are not in it: they are other ones
    while a part is compiled, and in the keys of its pieces."""
    settings = ("torch_state", "inductor_config")
    return {name: value for name, value in environment().items() if name not in settings}
