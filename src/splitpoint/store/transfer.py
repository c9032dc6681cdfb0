"""A store as one file, to carry to another machine."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from ..errors import StoreError
from .folder import Damaged
from .store import ENTRY, OBJECT, Store, decode_entry

LARGEST = 1 << 34
"""No file of a store is larger than this."""


def export(store: Store, path: Path) -> int:
    """Write all sound files of a store to a tar file, equal for equal stores; their number.

    Raises:
        StoreError: when the file cannot be written.
    """
    bad = {problem.path for problem in store.verify()}
    paths = [*store.objects(), *(path for _, _, path in store.entries())]
    count = 0
    try:
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
            for each in paths:
                if each in bad:
                    continue
                try:
                    data = store.content(each)
                except (Damaged, FileNotFoundError):  # since it was verified
                    continue
                header = tarfile.TarInfo(each.relative_to(store.folder).as_posix())
                header.size, header.mode = len(data), 0o600
                archive.addfile(header, io.BytesIO(data))
                count += 1
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or error}") from error
    return count


def import_file(store: Store, path: Path) -> tuple[int, int]:
    """Add the entries of a file that `export` wrote. What is in it is run later: import only
    files from those you trust.

    Returns:
        Files added, and files left out because they are damaged or none of a store's.

    Raises:
        StoreError: when it is no such file, or the store cannot be written.
    """
    added = refused = 0
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                data = _content(archive, member)
                if data is None:
                    refused += 1
                elif not _add(store, member.name, data):
                    raise StoreError(f"the store {store.folder} cannot be written")
                else:
                    added += 1
    except (OSError, tarfile.TarError) as error:
        raise StoreError(f"{path} is not a file that 'cache export' wrote: {error}") from error
    return added, refused


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
    """The bytes of an archived file; None when they are not those of a store's file."""
    if not member.isreg() or member.size > LARGEST:
        return None
    file = archive.extractfile(member)
    data = file.read() if file is not None else b""
    if (match := ENTRY.fullmatch(member.name)) and match["head"] == match["name"][:2]:
        try:
            decode_entry(data, match["kind"], match["name"])
        except Damaged:
            return None
        return data
    if (match := OBJECT.fullmatch(member.name)) and match["head"] == match["name"][:2]:
        return data if Store.digest(data) == match["name"] else None
    return None


def _add(store: Store, name: str, data: bytes) -> bool:
    if OBJECT.fullmatch(name):
        return store.write_object(data) is not None
    match = ENTRY.fullmatch(name)
    assert match is not None
    entry = decode_entry(data, match["kind"], match["name"])
    return store.write(match["kind"], match["name"], entry)
