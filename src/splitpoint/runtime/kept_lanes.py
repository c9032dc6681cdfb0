"""Compiled lanes as JSON and files of a store, and lanes of another process made from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import kernels
from ..capture.assumptions import Assumption, runs
from ..capture.dims import SIZE_ALONE
from ..capture.regions import Regions
from ..capture.signature import Signature
from ..compilers.artifact import Libraries, Missing, objects_of
from ..compilers.wrapper import Wrapper
from ..errors import KernelBuildError
from ..graph.overlap import Updates
from ..graph.stitch import Body, PieceSteps
from ..passes.manager import MatchCount
from ..ranges import Plan
from ..store.constants import NotKept, decode, encode
from ..store.store import Store
from ..torch_internals.generated_code import kernel_place
from ..torch_internals.onednn import onednn_linear_op
from .dispatch import Dispatch
from .lanes import Graph, Lane
from .program import Program


def lanes_entry(
    store: Store, lanes: Sequence[Lane], graphs: Sequence[Graph], max_size: int
) -> dict[str, Any]:
    """What lanes, all compiled, do, as JSON; what they need of the store is named there.

    Args:
        store: with the pieces, which gets the library of the kernels too.
        lanes: in the order in which they were added to a program.
        graphs: that they are of; rows name them by index.
        max_size: of the plan.

    Raises:
        NotKept: when another process could not have the same from it.
    """
    pieces: dict[str, Any] = {}
    rows = []
    for lane in lanes:
        body = lane.body
        if body is None:
            raise NotKept(f"{lane.planned.range}, which is not compiled yet")
        names: dict[str, Any] = {}
        for name, value in body.names.items():
            if name.startswith("__") or name == "stitched":
                continue
            if not name.startswith("p_"):
                names[name] = encode(value)
                continue
            piece = lane.artifacts.get(name[2:])
            kept = store.read("pieces", piece) if piece else None
            if piece is None or kept is None:
                raise NotKept(f"a piece that is not kept ({name[2:]} of {lane.planned.range})")
            pieces[piece] = {
                field: kept[field]
                for field in ("source", "operators", "kernels", "matches", "steps")
            }
            names[name] = ["piece", piece]
        rows.append(
            {
                "graph": graphs.index(lane.graph),
                "sizes": [list(run) for run in runs(lane.sizes)],
                "parameters": list(body.parameters),
                "lines": list(body.lines),
                "steps": list(body.steps),
                "names": names,
                "packed": [list(each) for each in body.packed],
                "kernels": {str(s): name for s, name in (lane.kernels or {}).items()},
                "assumptions": [[a.code, a.origin] for a in lane.assumptions],
                "updates": body.updates and body.updates.to_json(),
            }
        )
    libraries = objects_of(at for piece in pieces.values() for at in piece["kernels"].values())
    path = kernels.loaded_library()
    library = store.write_object(path.read_bytes()) if path is not None else None
    return {
        "plan": Plan(max_size, tuple(lane.planned for lane in lanes)).to_json(),
        "lanes": rows,
        "pieces": pieces,
        "library": library,
        "objects": sorted(libraries | ({library} if library else set())),
    }


@dataclass
class LanesLoader:
    """Makes lanes from an entry of `lanes_entry`, ready to run in a program."""

    store: Store
    entry: Mapping[str, Any]
    program: Program
    libraries: Libraries = field(default_factory=Libraries, kw_only=True)

    def start(
        self,
        graphs: Sequence[Graph],
        notes: Sequence[str] = (),
        signature: Signature | None = None,
        regions: Regions | None = None,
    ) -> Dispatch:
        """The lanes, as those of a signature, for graphs without steps.

        Raises:
            Missing: when the store has not all that is needed.
            LookupError: when an operator is not there.
        """
        calls = self.pieces()
        plan = Plan.from_json(self.entry["plan"])
        lanes = []
        bodies = []
        for planned, row in zip(plan.entries, self.entry["lanes"], strict=True):
            sizes = [s for first, last in row["sizes"] for s in range(first, last + 1)]
            lane = Lane(planned, graphs[row["graph"]], sizes, kernels={})
            lane.assumptions = self.assumptions(row["assumptions"], signature)
            lanes.append(lane)
            names = {
                name: calls[value[1]] if value[0] == "piece" else decode(value)
                for name, value in row["names"].items()
            }
            packed = tuple((index, layout) for index, layout in row["packed"])
            text = tuple(row["parameters"]), tuple(row["lines"])
            updates = Updates.from_json(row["updates"]) if row["updates"] else None
            bodies.append(Body(*text, names, packed, tuple(row["steps"]), self.steps(row), updates))
        dispatch = self.program.add(lanes, notes, signature, regions)
        try:
            self.program.start(dispatch, bodies)
        except BaseException:
            self.program.drop(dispatch)
            raise
        self.count(plan)
        return dispatch

    def count(self, plan: Plan) -> None:
        """Count what was loaded."""
        counts = self.program.counts
        for planned, row in zip(plan.entries, self.entry["lanes"], strict=True):
            for name, value in row["names"].items():
                if value[0] == "piece":
                    counts.loads += 1
                    counts.note(
                        MatchCount.from_kept(kept, name[2:], planned.range)
                        for kept in self.entry["pieces"][value[1]]["matches"]
                    )

    def pieces(self) -> dict[str, Callable[..., Any]]:
        """The compiled pieces by key."""
        pieces = self.entry["pieces"]
        operators = {op for piece in pieces.values() for op in piece["operators"].values()}
        if (own := self.entry["library"]) is not None:
            try:
                kernels.load_from(self.library(own))
            except KernelBuildError as error:
                raise Missing(str(error)) from error
        if any(op.startswith("splitpoint_onednn::") for op in operators):
            onednn_linear_op()
        found = {}
        for key, piece in pieces.items():
            wrapper = Wrapper(piece["source"], tuple(piece["kernels"]), piece["operators"])
            # Pieces on other devices than CPU have no steps.
            native = self.program.config.runner == "native" and piece["steps"]
            bind = wrapper.bind_when_called if native else wrapper.bind
            found[key] = bind({name: self.kernel(at) for name, at in piece["kernels"].items()})
        return found

    def steps(self, row: Mapping[str, Any]) -> dict[str, PieceSteps]:
        """What the pieces of a lane do, by name, where the runner can do it."""
        found = {}
        for name, value in row["names"].items():
            if value[0] == "piece" and (steps := self.entry["pieces"][value[1]]["steps"]):
                kernels_ = self.entry["pieces"][value[1]]["kernels"]
                found[name] = self.piece_steps(steps, kernels_)
        return found

    def piece_steps(self, steps: Mapping[str, Any], at: Mapping[str, Sequence[Any]]) -> PieceSteps:
        """What a piece does, with the places of its kernels."""
        called = [self.kernel(at[name]) for name in steps["kernels"]]
        return PieceSteps(steps, lambda: [kernel_place(each) for each in called])

    def kernel(self, at: Sequence[Any]) -> Callable[..., Any]:
        """A kernel of a piece."""
        return self.libraries.kernel(self.store, *at)

    def library(self, digest_: str) -> Path:
        """The path of a library.

        Raises:
            Missing: when the store has it not.
        """
        path = self.store.library(digest_)
        if path is None:
            raise Missing(f"the library {digest_} is not there")
        return path

    @staticmethod
    def assumptions(
        kept: Sequence[Sequence[str]], signature: Signature | None
    ) -> tuple[Assumption, ...]:
        """Assumptions as they were kept."""
        names = (SIZE_ALONE if signature is None else signature.dims).names
        return tuple(Assumption(code, origin, names) for code, origin in kept)
