"""What is called in the place of vLLM's functions while it loads a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import names
from .fence import OWN, fence, log

if TYPE_CHECKING:
    from .loading import Loading
    from .norms import Norms

OWN_NORMS = "vLLM's own norms are used"


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
        self._norms: Norms | None = None
        with fence(OWN_NORMS):
            from .norms import Norms

            self._norms = Norms()

    def process_weights_after_loading(
        self, model: Any, model_config: Any, target_device: Any
    ) -> None:
        """vLLM's own, and kernels for the layers that were put off meanwhile."""
        self._loading = self._start()
        try:
            self._process(model, model_config, target_device)
        finally:
            loading, self._loading = self._loading, None
        if loading is not None:
            weights = loading.settings.weights
            with fence(f"not all weights are rounded to {weights}: {OWN}" if weights else OWN):
                loading.take_over(model)
            with fence("what vLLM keeps of compiled models may not fit the next start"):
                loading.note()
            loading.leave_the_rest()
            with fence("a step stays as it is beside linear layers and norms"):
                self._shorten(model)

    def _shorten(self, model: Any) -> None:
        from .eager import runs_eagerly, shorten

        if not runs_eagerly(names.CONFIG.value()):
            return
        if self._norms is not None:
            with fence(OWN_NORMS):
                log.info("Splitpoint: %s", self._norms.take_over(model))
        shorten(model)

    def _start(self) -> Loading | None:
        """What takes the layers; None where vLLM keeps all, which was said then."""
        given = None
        with fence():
            from .settings import settings

            given = settings()
        if given is None:
            return None
        with fence(f"weights are not rounded to {given.weights}: {OWN}" if given.weights else OWN):
            from .loading import Loading  # with torch and the kernels, which take their time

            return Loading(self._dispatch, given)
        return None

    def dispatch_cpu_unquantized_gemm(self, layer: Any, remove_weight: bool) -> None:
        """vLLM's own, put off for layers that there are kernels for. At another time than after
        loading, as when weights are exchanged, a layer is left to vLLM."""
        if self._loading is None or not self._loading.puts_off(layer, remove_weight):
            self._dispatch(layer, remove_weight)
