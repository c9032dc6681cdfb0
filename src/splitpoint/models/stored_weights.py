"""Weights in a folder of safetensors, read slice by slice: nothing is read before it is asked for.

The layout is Hugging Face's: `model.safetensors`, or several files and an index of which tensor
is in which (`model.safetensors.index.json`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelNotFound

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    """What it is read as; the file may have another."""

    def narrow(self, dim: int, start: int, length: int) -> Tensor:
        """A part along a dimension, in memory of its own; as `Tensor.narrow` otherwise.

        Raises:
            ModelNotFound: when the file cannot be read.
        """
        # Opened for each: pages of a mapped file count as memory until it is closed.
        with _opened(self.path) as file:
            index = (*[slice(None)] * dim, slice(start, start + length))
            part: Tensor = file.get_slice(self.name)[index]
            return part.to(self.dtype, copy=True, memory_format=torch.contiguous_format)

    def whole(self) -> Tensor:
        """All of it.

        Raises:
            ModelNotFound: when the file cannot be read.
        """
        return self.narrow(0, 0, self.shape[0])


def stored_weights(folder: Path, dtype: torch.dtype) -> Mapping[str, StoredTensor] | None:
    """The tensors of a folder by name, to be read as `dtype`; None where it has no safetensors.

    Raises:
        ModelNotFound: when a file is damaged, or one that the index names is not there.
    """
    index = folder / INDEX
    if (folder / ONE_FILE).exists():
        paths = [folder / ONE_FILE]
    elif index.exists():
        try:
            files = json.loads(index.read_text())["weight_map"].values()
        except (OSError, ValueError, LookupError, AttributeError) as error:
            raise ModelNotFound(f"cannot read {index}: {error}") from error
        paths = [folder / name for name in sorted(set(files))]
    else:
        return None
    found = {}
    for path in paths:
        with _opened(path) as file:
            names: list[str] = file.keys()
            for name in names:
                shape = tuple(file.get_slice(name).get_shape())
                found[name] = StoredTensor(path, name, shape, dtype)
    return found


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ModelNotFound(
            f"cannot read the weights in {path} ({error}): copy or download them again"
        ) from error
