"""`compile()`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, overload

from torch import nn

from .capture.signature import DynamicDims, Signature
from .config import Config
from .errors import ConfigError
from .runtime.compiled_model import CompiledModel, Dynamic, forward_of
from .runtime.compiled_module import CompiledModule
from .runtime.dynamo_backend import check_options


@overload
def compile(
    module: nn.Module,
    config: Config | None = None,
    *,
    dynamic_dims: DynamicDims | None = None,
    max_dims: Mapping[str, int] | None = None,
    size: str | None = None,
) -> CompiledModule: ...


@overload
def compile(
    module: Callable[..., Any],
    config: Config | None = None,
    *,
    dynamic_dims: DynamicDims | None = None,
    max_dims: Mapping[str, int] | None = None,
    size: str | None = None,
) -> CompiledModel: ...


def compile(
    module: Callable[..., Any],
    config: Config | None = None,
    *,
    dynamic_dims: DynamicDims | None = None,
    max_dims: Mapping[str, int] | None = None,
    size: str | None = None,
) -> CompiledModel:
    """Compile a module or function once per range of sizes.

    Args:
        module: an `nn.Module`, a bound method of one, or a function, for inference. Nothing
            is done to it until the first call.
        config: the ranges and what they are given. Default: one range, [1,8192].
        dynamic_dims: for each argument that depends on the size its dimension, such as
            `{"input_ids": 1}`; several as a tuple; None for an integer argument that is the
            size itself. Arguments are named as in the signature; a name stands for all
            tensors in a container, `batch['ids']` for one. Where several dimensions change, each
            has a name: `{"input_ids": {0: "batch", 1: "length"}}`, or a `torch.export.Dim`.
            Default: dimension 0 of every tensor argument, and others once a call has shown that
            they change.
        max_dims: the greatest length of each named dimension; `config.max_size` by default.
        size: the size that picks the range, as a sum or product of the names; their product by
            default: the rows of linear layers.

    Returns:
        A callable with the module's signature, attributes and results; a module's is an
        `nn.Module` itself.

    Raises:
        ConfigError: when `config` is not a `Config`, or a part of the module is compiled already.
    """
    if config is not None and not isinstance(config, Config):
        raise ConfigError(
            f"config must be a splitpoint.Config, got {type(config).__name__}: write "
            f"Config(split_points=[...], ...), or Config.from_dict(...)"
        )
    if isinstance(module, CompiledModel):
        raise ConfigError("this model is compiled already: pass its .module to compile it anew")
    if not callable(module):
        raise ConfigError(f"expected a module or function, got {module!r}")
    config = config or Config()
    check_options(config)
    dynamic = Dynamic(dynamic_dims, dict(max_dims or {}), size)
    if isinstance(module, nn.Module):
        for name, child in module.named_modules():
            if isinstance(child, CompiledModule):
                raise ConfigError(
                    f"{name}, a part of this model, is compiled already: put its .module in its "
                    f"place, or leave the rest as it is"
                )
        return CompiledModule(module, config, dynamic)
    return CompiledModel(module, config, dynamic)


def signature_of(
    module: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_dims: DynamicDims | None,
) -> Signature:
    """What a first call with these arguments would fix."""
    return Signature(forward_of(module), args, kwargs, dynamic_dims)
