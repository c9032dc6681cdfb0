"""What the benchmark compares with: max-autotune, and freeing what that leaves behind."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from unittest.mock import patch

from .probe import require


@contextmanager
def max_autotune() -> Iterator[None]:
    """Everything that `torch.compile` compiles inside is tuned, weights as constants.

    Inductor's C++ GEMM template and oneDNN's prepacked layers are candidates only where the
    weight is a constant of the graph, which takes freezing; and freezing is read from the global
    configuration, with gradients off: as an option of `torch.compile` it has no effect. The
    report that Inductor prints of every choice is off.
    """
    require("baselines")
    from torch._inductor import config, select_algorithm

    with (
        config.patch(
            freezing=True,
            max_autotune=True,
            max_autotune_gemm_backends="CPP,ATEN",
            max_autotune_report_choices_stats=False,
        ),
        patch.object(select_algorithm, "PRINT_AUTOTUNE", False),
        warnings.catch_warnings(),
    ):
        # Inductor's own use of it.
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
        yield


@contextmanager
def frozen() -> Iterator[None]:
    """What is compiled inside has its weights as constants, which backends lay out anew, and the
    passes that a backend gives Inductor for all that follows are taken back.

    Freezing is read from the global configuration, with gradients off (see `max_autotune`).
    """
    require("baselines")
    from torch._inductor import config

    with config.patch(freezing=True, joint_custom_post_pass=config.joint_custom_post_pass):
        yield


def forget_graphs(function: FunctionType) -> None:
    """Drop the graphs that Dynamo made of a function."""
    require("baselines")
    from torch._dynamo.eval_frame import remove_from_cache

    remove_from_cache(function)


def forget_constants() -> None:
    """Let the weights that frozen graphs hold as constants go, once nothing else uses them.

    They are globals of the modules that Inductor wrote, which stay in `sys.modules`.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith("torch._inductor.runtime.compile_tasks.") and any(
            attribute.startswith("_frozen_param") for attribute in vars(module)
        ):
            del sys.modules[name]
