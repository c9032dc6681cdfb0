"""Greedy generation by OpenVINO GenAI, of a GGUF file."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BaselineFailed
from ..tuning.measure import Clock
from .generators import Run

PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}


class OpenVino:
    """A model of a GGUF file."""

    def __init__(self, path: Path, dtype: torch.dtype, threads: int, clock: Clock) -> None:
        """Loads it.

        Raises:
            BaselineFailed: when OpenVINO cannot.
        """
        self._genai: Any = importlib.import_module("openvino_genai")
        self._core: Any = importlib.import_module("openvino")
        self._clock = clock
        precision = PRECISIONS[dtype]
        scheduling = self._genai.SchedulerConfig()
        scheduling.enable_prefix_caching = False  # each run has the same prompt
        try:
            self._pipeline = self._genai.LLMPipeline(
                str(path),
                "CPU",
                {
                    "INFERENCE_NUM_THREADS": threads,
                    "INFERENCE_PRECISION_HINT": precision,
                    "KV_CACHE_PRECISION": precision,
                    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
                    "scheduler_config": scheduling,
                },
            )
        except RuntimeError as error:
            said = str(error).strip().splitlines()
            raise BaselineFailed(f"OpenVINO GenAI cannot load {path}: {said[-1]}") from error

    def __call__(self, ids: Tensor, new_tokens: int) -> Run:
        """Generate; see `Generate`. It is asked for one token first, as it says nothing of several
        rows' tokens while they come."""
        start = self._clock.read()
        self._generate(ids, 1)
        first = self._clock.read() - start
        start = self._clock.read()
        tokens = self._generate(ids, new_tokens)
        whole = self._clock.read() - start
        return Run(tokens, first, (whole - first) / (new_tokens - 1))

    def _generate(self, ids: Tensor, new_tokens: int) -> list[list[int]]:
        mask = torch.ones_like(ids)
        inputs = self._genai.TokenizedInputs(
            self._core.Tensor(ids.numpy()), self._core.Tensor(mask.numpy())
        )
        config = self._genai.GenerationConfig()
        config.max_new_tokens = new_tokens
        config.ignore_eos = True
        config.do_sample = False
        try:
            found = self._pipeline.generate(inputs, config)
        except RuntimeError as error:
            said = str(error).strip().splitlines()
            raise BaselineFailed(f"OpenVINO GenAI failed: {said[-1]}") from error
        return [list(row) for row in found.tokens]
