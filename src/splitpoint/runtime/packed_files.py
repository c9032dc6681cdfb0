"""Packed copies of weights in files of the store, mapped by all processes that read them.

A file holds the copies of weights one after the other, those of about `FILE_BYTES` of originals: in
files of many megabytes the pages are huge ones where the file system has them, in one file for each
weight they would not be. Its key is made of the values of the weights, which are hashed at each
start, the layouts, and what packing depends on, so that neither a changed weight nor another
version of this package finds it. It is mapped as the store checked it (`Store.mapped`).

Of processes that start together one packs and writes a file, and the others wait for it.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..kernels.memory import HUGE_PAGE, streamed_bytes
from ..store.key import digest, packing_environment
from ..store.store import Store

log = logging.getLogger("splitpoint")

KIND = "weights"

FILE_BYTES = 512 << 20
"""Most bytes of original weights whose copies one file holds, unless one weight alone has more."""

LEAST_DIMENSIONS = 2
"""Of weights whose copies are kept; what else is packed is small, and packed at once."""

UNKEPT = frozenset(("onednn", "onednn_t"))
"""Layouts that only their library can read and write."""

STAGED_BYTES = 16 * HUGE_PAGE
"""Bytes that are written at a time: many, as the file system has larger pages for them then."""

_LINE = 64

Wanted = Sequence[tuple[Tensor, str]]
"""Weights and the layouts that they are wanted in."""

Pack = Callable[[Tensor, str], Tensor]


class PackedFiles:
    """Copies of weights that are files of a store.

    Args:
        store: where they are.
        pack: makes a copy of a weight in a layout.
    """

    def __init__(self, store: Store, pack: Pack) -> None:
        self._store = store
        self._pack = pack

    def copies(self, wanted: Wanted) -> dict[tuple[int, str], Tensor]:
        """Copies by id of their weight and layout, from files, which are written where they are
        not there. What cannot be kept is left out.

        Writing to a copy changes this process's memory only.
        """
        found: dict[tuple[int, str], Tensor] = {}
        environment = packing_environment()
        kept = [each for each in wanted if _is_kept(*each)]
        weights = {id(weight): weight for weight, _ in kept}
        content = {key: _digest(weight) for key, weight in weights.items()}
        for part in _parts(kept):
            copies = [[content[id(weight)], layout] for weight, layout in part]
            fields = {**environment, "copies": json.dumps(copies)}
            key = digest(fields)
            made = self._mapped(key, part)
            if made is None:
                with self._store.lock(key):
                    made = self._mapped(key, part)  # another process was first
                    if made is None and self._write(key, fields, part):
                        made = self._mapped(key, part)
            found |= made or {}
        log.info("store: %d of %d copies of weights are in files", len(found), len(wanted))
        return found

    def _mapped(self, key: str, part: Wanted) -> dict[tuple[int, str], Tensor] | None:
        entry = self._store.read(KIND, key)
        memory = None if entry is None else self._store.mapped(entry["objects"][0])
        if entry is None or memory is None:
            return None
        with torch.inference_mode(False), torch.no_grad():
            whole = torch.frombuffer(memory, dtype=torch.uint8)
            return {
                (id(weight), layout): whole[start : start + count]
                .view(getattr(torch, dtype))
                .view(shape)
                for (weight, layout), (start, count, dtype, shape) in zip(
                    part, entry["copies"], strict=True
                )
            }

    def _write(self, key: str, fields: dict[str, str], part: Wanted) -> bool:
        rows: list[tuple[int, int, str, list[int]]] = []
        written = self._store.write_stream(self._content(part, rows))
        if written is None:
            return False
        entry = {"fields": fields, "copies": rows, "objects": [written]}
        return self._store.write(KIND, key, entry)

    def _content(
        self, part: Wanted, rows: list[tuple[int, int, str, list[int]]]
    ) -> Iterator[memoryview]:
        """The bytes of a file, and in `rows` where which copy lies: start, count, dtype, shape."""
        staged = streamed_bytes(STAGED_BYTES)
        used = total = 0
        for weight, layout in part:
            packed = self._pack(weight, layout).contiguous()
            kind = str(packed.dtype).removeprefix("torch.")
            rows.append((total, packed.nbytes, kind, list(packed.shape)))
            rest = packed.view(-1).view(torch.uint8)
            while rest.nbytes:
                here = rest[: STAGED_BYTES - used]
                staged[used : used + here.nbytes] = here
                rest = rest[here.nbytes :]
                used += here.nbytes
                if used == STAGED_BYTES:
                    yield _memory(staged)
                    used = 0
            padding = -packed.nbytes % _LINE  # a whole number of lines are staged
            staged[used : used + padding] = 0
            used += padding
            total += packed.nbytes + padding
        if used:
            yield _memory(staged[:used])


def _is_kept(weight: Tensor, layout: str) -> bool:
    return layout not in UNKEPT and weight.dim() >= LEAST_DIMENSIONS and weight.numel() > 0


def _parts(wanted: Wanted) -> Iterator[Wanted]:
    """What goes into a file each."""
    part: list[tuple[Tensor, str]] = []
    held = 0
    for weight, layout in wanted:
        if part and held + weight.nbytes > FILE_BYTES:
            yield part
            part, held = [], 0
        part.append((weight, layout))
        held += weight.nbytes
    if part:
        yield part


def _digest(weight: Tensor) -> str:
    """A digest of a weight's values, dtype and shape."""
    with torch.inference_mode(False), torch.no_grad():
        whole = weight.detach().contiguous()
        hashed = hashlib.sha256(_memory(whole))
    hashed.update(f"{whole.dtype} {list(whole.shape)}".encode())
    return hashed.hexdigest()


def _memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, which has to live as long."""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
