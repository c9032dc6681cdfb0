"""What of a step is beside the layers, where a model of vLLM runs without a compiler.

A compiler makes one of a norm's operators, and calls attention from its own code; both are left to
it where there is one.
"""

from __future__ import annotations

from typing import Any

from . import names
from .fence import fence, log
from .norms import Norms


class Eager:
    """Norms by kernels, and attention that is called as a function, for models of one process."""

    def __init__(self) -> None:
        self._norms: Norms | None = None

    def take_over(self, model: Any) -> None:
        """Change a model that vLLM has just loaded, if it runs eagerly."""
        if not runs_eagerly(names.CONFIG.value()):
            return
        with fence("norms stay as they are"):
            if self._norms is None:
                self._norms = Norms()
            log.info("Splitpoint: %s", self._norms.take_over(model))
        with fence("attention is called as it was"):
            call_directly(model)


def runs_eagerly(vllm_config: Any) -> bool:
    """Whether vLLM compiles nothing, as with `--enforce-eager`."""
    return vllm_config is not None and int(vllm_config.compilation_config.mode or 0) == 0


def call_directly(model: Any) -> int:
    """Have layers of attention call vLLM's functions and not the operators that are made of these
    for a compiler, each of which passes torch's dispatcher twice; how many there are.

    Raises:
        UnsupportedVllm: when layers are not what they are taken to be.
    """
    names.check((names.ATTENTION,))
    kind = names.ATTENTION.owner
    layers = [
        module
        for module in model.modules()
        if isinstance(module, kind) and module.use_direct_call is False
    ]
    for layer in layers:
        layer.use_direct_call = True
    return len(layers)
