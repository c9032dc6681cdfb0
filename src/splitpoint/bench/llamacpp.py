"""Greedy generation by llama.cpp, of several rows at once, by the functions that it exports."""

from __future__ import annotations

import ctypes
import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BaselineFailed
from ..tuning.measure import Clock
from .generators import Run

PART = 2048
"""Tokens that are handed over at a time; it computes parts of 512 of them."""

KINDS = {torch.float32: 0, torch.bfloat16: 1}
"""Its numbers for the elements of keys and values: fp32, and fp16, which is its default."""


class LlamaCpp:
    """A model of a GGUF file."""

    def __init__(self, path: Path, dtype: torch.dtype, threads: int, clock: Clock) -> None:
        """Loads it.

        Raises:
            BaselineFailed: when llama.cpp cannot.
        """
        self._api: Any = importlib.import_module("llama_cpp")
        self._clock, self._threads, self._kind = clock, threads, KINDS[dtype]
        # It must outlive the calls.
        self._silence = self._api.llama_log_callback(lambda level, text, data: None)
        self._api.llama_log_set(self._silence, ctypes.c_void_p(0))
        self._api.llama_backend_init()
        self._model = self._api.llama_model_load_from_file(
            str(path).encode(), self._api.llama_model_default_params()
        )
        if not self._model:
            raise BaselineFailed(f"llama.cpp cannot load {path}")
        self._vocabulary = self._api.llama_vocab_n_tokens(
            self._api.llama_model_get_vocab(self._model)
        )
        self._shape: tuple[int, int] = (0, 0)
        self._context: Any = None
        self._batch = self._api.llama_batch_init(PART, 0, 1)

    def __call__(self, ids: Tensor, new_tokens: int) -> Run:
        """Generate; see `Generate`."""
        batch, length = ids.shape
        self._make_room(batch, length + new_tokens)
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), False)
        start = self._clock.read()
        steps = [self._prompt(ids.tolist())]
        first = self._clock.read()
        for place in range(length, length + new_tokens - 1):
            entries = [(token, place, row, True) for row, token in enumerate(steps[-1])]
            found = self._decode(entries)
            steps.append([found[row] for row in range(batch)])
        last = self._clock.read()
        tokens = [list(row) for row in zip(*steps, strict=True)]
        return Run(tokens, first - start, (last - first) / (new_tokens - 1))

    def _make_room(self, batch: int, length: int) -> None:
        if self._shape == (batch, length):
            return
        if self._context is not None:
            self._api.llama_free(self._context)
        params = self._api.llama_context_default_params()
        params.n_ctx = batch * (-(-length // 256) * 256)
        params.n_seq_max = batch
        params.n_batch = PART
        params.n_threads = params.n_threads_batch = self._threads
        params.type_k = params.type_v = self._kind
        self._context = self._api.llama_init_from_model(self._model, params)
        if not self._context:
            raise BaselineFailed(f"llama.cpp has no room for {batch} times {length} tokens")
        self._shape = (batch, length)

    def _prompt(self, rows: list[list[int]]) -> list[int]:
        last = len(rows[0]) - 1
        entries = [
            (token, place, row, place == last)
            for row, tokens in enumerate(rows)
            for place, token in enumerate(tokens)
        ]
        found: dict[int, int] = {}
        for at in range(0, len(entries), PART):
            found |= self._decode(entries[at : at + PART])
        return [found[row] for row in range(len(rows))]

    def _decode(self, entries: list[tuple[int, int, int, bool]]) -> dict[int, int]:
        """The likeliest token after each of (token, place, row, is wanted) that is wanted, by
        row."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for at, (token, place, row, wanted) in enumerate(entries):
            batch.token[at] = token
            batch.pos[at] = place
            batch.n_seq_id[at] = 1
            batch.seq_id[at][0] = row
            batch.logits[at] = wanted
        if failed := self._api.llama_decode(self._context, batch):
            raise BaselineFailed(f"llama.cpp failed with {failed}")
        found = {}
        for at, (_, _, row, wanted) in enumerate(entries):
            if wanted:
                logits = self._api.llama_get_logits_ith(self._context, at)
                values = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float * self._vocabulary))
                found[row] = int(torch.frombuffer(values.contents, dtype=torch.float32).argmax())
        return found
