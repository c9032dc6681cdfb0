"""Ways to generate on a CPU, for `splitpoint bench generate`: what each is, and how it is asked.

Adding one is one entry in `GENERATORS`, its name in `arguments.GENERATORS`, and one test.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import Config
from ..errors import BaselineFailed
from ..integrations.transformers.copies import with_config
from ..tuning.measure import Clock
from .decoder import prepare


@dataclass(frozen=True)
class Run:
    """One generation: greedy, of as many tokens as asked for."""

    tokens: list[list[int]]
    """New ones, by row of the batch."""
    first_s: float
    """Seconds until all rows had their first."""
    step_s: float
    """Seconds of each step after it, which gives a token to each row."""


Generate = Callable[[Tensor, int], Run]
"""(ids [batch, prompt], new tokens, 2 or more) -> what came of it."""


@dataclass(frozen=True)
class Setting:
    """What all entrants are given."""

    model: Any
    """The model of transformers, its end token taken away."""
    name: str
    config: Config
    threads: int
    clock: Clock


@dataclass(frozen=True)
class Generator:
    """One way to generate."""

    name: str
    about: str
    """For the legend of the table."""
    build: Callable[[Setting], Generate]
    package: str | None = None
    """The module that it needs."""
    install: str = ""
    """The argument of pip that brings it."""
    rounds: bool = False
    """Whether it rounds weights in a way of its own, so that its tokens may be any."""

    @property
    def missing(self) -> str | None:
        """What is not there, and how to get it; None where nothing is missing."""
        if self.package is None or importlib.util.find_spec(self.package) is not None:
            return None
        return f"{self.install} is not installed: pip install {self.install}"


# --- transformers, by itself and with what is compiled ---------------------------------


class _Watch:
    """A streamer that notes when tokens come."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.at_s: list[float] = []

    def put(self, value: Tensor) -> None:
        """The prompt, which comes at once, and then each step's tokens."""
        self.at_s.append(self._clock.read())

    def end(self) -> None:
        """Nothing comes any more."""


def by_transformers(model: Any, clock: Clock, **how: Any) -> Generate:
    """A model's own `generate`, with what it is asked for in `how`."""

    def generate(ids: Tensor, new_tokens: int) -> Run:
        watch = _Watch(clock)
        start = clock.read()
        whole = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new_tokens,
            pad_token_id=0,
            streamer=watch,
            **how,
        )
        first, last = watch.at_s[1], watch.at_s[-1]
        tokens: list[list[int]] = whole[:, ids.shape[1] :].tolist()
        return Run(tokens, first - start, (last - first) / (new_tokens - 1))

    return generate


def _eager(setting: Setting) -> Generate:
    return by_transformers(setting.model, setting.clock)


def _static(setting: Setting) -> Generate:
    from transformers import CompileConfig

    # It compiles on accelerators alone unless told otherwise; reduce-overhead, its default, is
    # for these.
    compiling = CompileConfig(mode="default", dynamic=False)
    compiling._compile_all_devices = True
    generate = by_transformers(
        setting.model, setting.clock, cache_implementation="static", compile_config=compiling
    )
    last: tuple[int, ...] = ()

    def each(ids: Tensor, new_tokens: int) -> Run:
        nonlocal last
        if last != (*ids.shape, new_tokens):
            torch.compiler.reset()  # other shapes would count as recompilations, which are limited
            last = (*ids.shape, new_tokens)
        return generate(ids, new_tokens)

    return each


def _ours(setting: Setting) -> Generate:
    model = with_config(setting.model, {})  # the same weights: the other stays as it is
    prepare(model, setting.config)
    return by_transformers(model, setting.clock)


# --- others ----------------------------------------------------------------------------


def _llamacpp(kind: str = "") -> Callable[[Setting], Generate]:
    def build(setting: Setting) -> Generate:
        from .gguf_file import gguf_of
        from .llamacpp import LlamaCpp

        path = gguf_of(setting.model, setting.name, kind)
        return LlamaCpp(path, setting.model.dtype, setting.threads, setting.clock)

    return build


def _openvino(setting: Setting) -> Generate:
    from .gguf_file import gguf_of
    from .openvino_genai import OpenVino

    if setting.model.dtype != torch.bfloat16:
        raise BaselineFailed("OpenVINO GenAI reads neither fp32 nor bf16 from GGUF")
    # fp16 holds what bf16 does, down to 6e-5.
    path = gguf_of(setting.model, setting.name, "F16")
    return OpenVino(path, setting.model.dtype, setting.threads, setting.clock)


EAGER, OURS = "eager", "ours"

GENERATORS = {
    each.name: each
    for each in (
        Generator(EAGER, "transformers, DynamicCache", _eager),
        Generator("static", "transformers, StaticCache, the decode step compiled", _static),
        Generator(
            "llamacpp",
            "llama.cpp, the same weights as GGUF; keys and values in fp16 where others have bf16",
            _llamacpp(),
            "llama_cpp",
            "llama-cpp-python",
        ),
        Generator(
            "openvino",
            "OpenVINO GenAI in bf16, the same weights as GGUF in fp16, which it reads",
            _openvino,
            "openvino_genai",
            "openvino-genai",
        ),
        Generator(OURS, "splitpoint.integrations.transformers", _ours),
        *(
            Generator(
                f"llamacpp-{kind}",
                f"llama.cpp, weights in {kind.upper()}" + ", embeddings in Q8_0" * (kind == "q4_0"),
                _llamacpp(kind.upper()),
                "llama_cpp",
                "llama-cpp-python",
                rounds=True,
            )
            for kind in ("q8_0", "q4_0")
        ),
    )
}
"""All ways, by name."""
