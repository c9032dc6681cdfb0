"""Which lane serves which size, for the calls with one signature."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..capture.dims import SIZE_ALONE, Dims, Lengths
from ..capture.regions import Regions
from ..capture.signature import Signature
from .lanes import Graph, Lane
from .recorded import Recorder


@dataclass(eq=False)
class Dispatch:
    """The calls of one kind and the lanes that serve them."""

    table: array[int]
    """`table[size]` is the index of what serves a size among a program's runners; 0 for none."""
    signature: Signature | None = None
    """What the arguments are like; None where somebody else sees to that."""
    regions: Regions | None = None
    """Which capture is right at which size; None where nothing was captured."""
    stand_in: Callable[..., Any] | None = None
    """Takes what a stitched function takes and runs the model itself, for `Config.background`;
    without one, calls wait for what they need."""
    notes: Sequence[str] = ()
    """What the plan is to say."""
    known: dict[Lengths, int] = field(default_factory=dict)
    """The same by lengths of several dimensions, for those that calls had."""
    capture_at: Callable[[Lengths], Graph] | None = None
    """Captures for lengths of several dimensions that no graph is right for."""
    lanes: list[Lane] = field(default_factory=list)
    """Those of them that were not split."""
    recorder: Recorder | None = None
    """Records sizes, where the device can and some are asked for."""
    when_compiled: Callable[[Dispatch], None] | None = None
    """Called once, in whatever thread it is, when the last lane was compiled."""

    @property
    def dims(self) -> Dims:
        """The dynamic dimensions."""
        return SIZE_ALONE if self.signature is None else self.signature.dims

    @property
    def arguments(self) -> Signature:
        """The signature, where there is one."""
        assert self.signature is not None
        return self.signature

    def report_compiled(self) -> None:
        """Call `when_compiled` if all lanes are compiled."""
        if self.when_compiled is not None and all(lane.body is not None for lane in self.lanes):
            done, self.when_compiled = self.when_compiled, None
            done(self)


def stand_in_for(module: Callable[..., Any], signature: Signature) -> Callable[..., Any]:
    """The module itself, called as a stitched function is."""

    def run(*given: Any) -> Any:
        count = len(signature.dims.names)
        args, kwargs = signature.with_tensors(given[:count], given[count:])
        return module(*args, **kwargs)

    return run
