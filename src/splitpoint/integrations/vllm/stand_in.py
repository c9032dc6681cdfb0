"""What is called in the place of vLLM's functions while it loads a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import names
from .fence import fence

if TYPE_CHECKING:
    from .loading import Loading


def install() -> None:
    """Put a `StandIn` in the place of vLLM's functions.

    Raises:
        UnsupportedVllm: when they are not what it takes them to be.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    names.check()
    stand_in = StandIn()
    names.PROCESS.replace(stand_in.process_weights_after_loading)
    names.DISPATCH.replace(stand_in.dispatch_cpu_unquantized_gemm)
    names.BACKEND.replace(backend_by_name(names.BACKEND.value))


def backend_by_name(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's function that looks a backend up, which finds `ranges.backend` as "splitpoint": under
    that name torch.compile has the one that knows nothing of vLLM."""

    def init_backend(
        self: Any, vllm_config: Any, prefix: str = "", is_encoder: bool = False
    ) -> Any:
        found = theirs(self, vllm_config, prefix, is_encoder)
        if found != "splitpoint":
            return found
        from . import ranges

        return ranges.backend

    return init_backend


class StandIn:
    """Calls vLLM's functions, and lets a `Loading` have the layers that they go through."""

    def __init__(self) -> None:
        self._process = names.PROCESS.value
        self._dispatch = names.DISPATCH.value
        self._loading: Loading | None = None

    def process_weights_after_loading(
        self, model: Any, model_config: Any, target_device: Any
    ) -> None:
        """vLLM's own, and kernels for the layers that were put off meanwhile."""
        with fence():
            from .loading import Loading  # with torch and the kernels, which take their time

            self._loading = Loading(self._dispatch)
        try:
            self._process(model, model_config, target_device)
        finally:
            loading, self._loading = self._loading, None
        if loading is not None:
            with fence():
                loading.take_over()
            loading.leave_the_rest()

    def dispatch_cpu_unquantized_gemm(self, layer: Any, remove_weight: bool) -> None:
        """vLLM's own, put off for layers that there are kernels for. At another time than after
        loading, as when weights are exchanged, a layer is left to vLLM."""
        if self._loading is None or not self._loading.puts_off(layer, remove_weight):
            self._dispatch(layer, remove_weight)
