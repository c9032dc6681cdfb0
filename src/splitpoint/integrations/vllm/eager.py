"""What a model of vLLM that nothing compiles spends beside its kernels, made shorter.

Import it when the kernels are loaded.

Each saves about 2 % of a step of SmolLM2: a compiler would not see any of it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import names
from .kernel import Packed
from .rounded import Rounded, RoundedByRows


def runs_eagerly(vllm_config: Any) -> bool:
    """Whether vLLM compiles nothing, as with `--enforce-eager`."""
    return vllm_config is not None and int(vllm_config.compilation_config.mode or 0) == 0


def shorten(model: nn.Module) -> None:
    """Have a model call attention and this package's linear layers in fewer steps.

    Raises:
        UnsupportedVllm: when vLLM is not what it is taken to be.
    """
    names.check(names.EAGER)
    attention: Any = names.ATTENTION.owner
    linear: Any = names.LINEAR_METHOD.value
    applied = _method(linear)
    for module in model.modules():
        if isinstance(module, attention) and getattr(module, "use_direct_call", None) is False:
            # The functions, and not the operators that are made of them for a compiler.
            module.use_direct_call = True
        elif type(getattr(module, "quant_method", None)) is linear and isinstance(
            getattr(module, "cpu_linear", None), Packed | Rounded | RoundedByRows
        ):
            module.quant_method = applied()


def _method(theirs: Any) -> Any:
    """vLLM's class of how unquantised layers are applied, that asks for nothing each time."""

    class Applied(theirs):  # type: ignore[misc]
        def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
            # vLLM may exchange weights, and then gives a layer a kernel of its own.
            made: Tensor = layer.cpu_linear(x, layer.weight, bias)
            return made

    return Applied
