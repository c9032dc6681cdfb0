"""llama.cpp by the functions that it exports: greedy generation of several rows at once, and a
forward pass."""

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


class LlamaModel:
    """A model of a GGUF file, and room for the keys and values of some tokens."""

    def __init__(self, path: Path, dtype: torch.dtype, threads: int) -> None:
        """Loads it.

        Raises:
            BaselineFailed: when llama.cpp cannot.
        """
        self.api: Any = importlib.import_module("llama_cpp")
        self._threads, self._kind = threads, KINDS[dtype]
        # It must outlive the calls.
        self._silence = self.api.llama_log_callback(lambda level, text, data: None)
        self.api.llama_log_set(self._silence, ctypes.c_void_p(0))
        self.api.llama_backend_init()
        self._model = self.api.llama_model_load_from_file(
            str(path).encode(), self.api.llama_model_default_params()
        )
        if not self._model:
            raise BaselineFailed(f"llama.cpp cannot load {path}")
        self._vocabulary = self.api.llama_vocab_n_tokens(
            self.api.llama_model_get_vocab(self._model)
        )
        self._shape: tuple[int, int] = (0, 0)
        self._context: Any = None

    def start(self, batch: int, length: int) -> None:
        """Make room for sequences of up to `length` tokens, and forget all tokens.

        Raises:
            BaselineFailed: when there is no room.
        """
        if self._shape != (batch, length):
            self._make_room(batch, length)
        self.api.llama_memory_clear(self.api.llama_get_memory(self._context), False)

    def decode(self, batch: Any) -> None:
        """Compute a `llama_batch`.

        Raises:
            BaselineFailed: when llama.cpp cannot.
        """
        if failed := self.api.llama_decode(self._context, batch):
            raise BaselineFailed(f"llama.cpp failed with {failed}")

    def logits(self, at: int) -> Tensor:
        """[vocabulary] of a token of the last batch (-1: the last that was wanted); overwritten by
        the next."""
        logits = self.api.llama_get_logits_ith(self._context, at)
        values = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float * self._vocabulary))
        return torch.frombuffer(values.contents, dtype=torch.float32)

    def close(self) -> None:
        """Free it."""
        if self._context is not None:
            self.api.llama_free(self._context)
        self.api.llama_model_free(self._model)
        self._context = self._model = None

    def _make_room(self, batch: int, length: int) -> None:
        if self._context is not None:
            self.api.llama_free(self._context)
        params = self.api.llama_context_default_params()
        params.n_ctx = batch * (-(-length // 256) * 256)
        params.n_seq_max = batch
        params.n_batch = PART
        params.n_threads = params.n_threads_batch = self._threads
        params.type_k = params.type_v = self._kind
        self._context = self.api.llama_init_from_model(self._model, params)
        if not self._context:
            raise BaselineFailed(f"llama.cpp has no room for {batch} times {length} tokens")
        self._shape = (batch, length)


class LlamaForward:
    """Logits of the last token after all of some ids, as `inputs.Forward`."""

    def __init__(self, path: Path, dtype: torch.dtype, threads: int) -> None:
        """As `LlamaModel`, whose errors it raises."""
        self._model = LlamaModel(path, dtype, threads)

    def __call__(self, ids: Tensor) -> Tensor:
        """ids [1, size] -> [1, vocabulary], float32."""
        size = ids.shape[1]
        self._model.start(1, size)
        tokens = (ctypes.c_int32 * size)(*ids[0].tolist())
        for at in range(0, size, PART):
            count = min(PART, size - at)
            part = ctypes.cast(ctypes.byref(tokens, 4 * at), ctypes.POINTER(ctypes.c_int32))
            self._model.decode(self._model.api.llama_batch_get_one(part, count))
        return self._model.logits(-1).clone()[None]

    def forget(self) -> None:
        """Free the model; it must not be called after."""
        self._model.close()


class LlamaCpp:
    """Greedy generation by a model of a GGUF file."""

    def __init__(self, path: Path, dtype: torch.dtype, threads: int, clock: Clock) -> None:
        """As `LlamaModel`, whose errors it raises."""
        self._model = LlamaModel(path, dtype, threads)
        self._clock = clock
        self._batch = self._model.api.llama_batch_init(PART, 0, 1)

    def __call__(self, ids: Tensor, new_tokens: int) -> Run:
        """Generate; see `Generate`."""
        batch, length = ids.shape
        self._model.start(batch, length + new_tokens)
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
        self._model.decode(batch)
        wanted_at = [(at, row) for at, (_, _, row, wanted) in enumerate(entries) if wanted]
        return {row: int(self._model.logits(at).argmax()) for at, row in wanted_at}
