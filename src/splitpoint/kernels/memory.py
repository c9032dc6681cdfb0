"""Memory for what is read again and again in the order in which it lies: on huge pages.

With pages of 4 KiB a core that streams weights waits for an address translation every 64 cache
lines, and a prefetch that crosses into a page not yet translated does so too. With 2 MiB pages
the kernels of linear layers read weights as fast as memory delivers them (`splitpoint bench
linear` prints both).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import sys

import torch
from torch import Tensor

CHUNK_BYTES = 32 << 20
"""What `Streamed` asks the operating system for at a time."""

_LINE = 64

HUGE_PAGE = 2 << 20
"""Bytes of a huge page on x86-64, and on AArch64 with pages of 4 KiB."""


def streamed_bytes(count: int) -> Tensor:
    """`count` bytes (uint8, zeros) that start at a multiple of `HUGE_PAGE`.

    They lie on huge pages where the operating system grants them (Linux, unless
    /sys/kernel/mm/transparent_hugepage/enabled says "never") and on ordinary ones elsewhere. Only
    pages that are written to take memory. It is the process's own: a forked child has a copy.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(count, dtype=torch.uint8)
    # Shared memory, the default, is governed by another setting, which is off as a rule.
    region = mmap.mmap(-1, count + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without huge pages
        region.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(region, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE
    return whole[start : start + count]


def mapped_file(handle: int) -> mmap.mmap:
    """The whole of a file, by its descriptor, which may be closed afterwards, with all its pages
    in memory. What is written to goes to pages of this process's own and never to the file.

    They lie on huge pages where the file system keeps large folios (ext4 since Linux 6.16, XFS,
    Btrfs), and on ordinary ones elsewhere.

    Raises:
        OSError: when it cannot be read or mapped.
        ValueError: when it is empty.
    """
    memory = mmap.mmap(handle, 0, access=mmap.ACCESS_COPY)
    for advice in (getattr(mmap, "MADV_HUGEPAGE", None), _POPULATE_READ):
        try:
            if advice is not None:
                memory.madvise(advice)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a kernel that does not know it
                raise
    return memory


_POPULATE_READ = 22 if sys.platform == "linux" else None
"""MADV_POPULATE_READ of Linux 5.14: what cannot be read, or was cut off, is then an error here and
no SIGBUS later. MAP_POPULATE would copy the pages, as they may be written to."""


def give_back() -> None:
    """Return memory that was freed to the operating system, where it is the C library's habit to
    keep it (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


class Streamed:
    """Tensors laid one after the other: what a kernel fetches beyond the end of one is then the
    start of the next."""

    def __init__(self) -> None:
        self._rest = torch.empty(0, dtype=torch.uint8)
        """What is left of the current chunk."""

    def placed(self, tensor: Tensor) -> Tensor:
        """A contiguous copy at the end of the current chunk, or in a new one; the tensor itself
        if it is opaque, as only its kernel may copy it then."""
        if tensor.layout != torch.strided:
            return tensor
        room = -(-tensor.nbytes // _LINE) * _LINE
        with torch.inference_mode(False), torch.no_grad():
            if room > self._rest.nbytes:
                self._rest = streamed_bytes(max(room, CHUNK_BYTES))
            place, self._rest = self._rest[: tensor.nbytes], self._rest[room:]
            return place.view(tensor.dtype).view(tensor.shape).copy_(tensor)
