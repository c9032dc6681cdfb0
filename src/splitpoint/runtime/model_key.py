"""What the key of a model in a store is made from."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

import torch

from ..capture.code import short
from ..capture.facts import Describer, Roots, Unprovable
from ..capture.leaves import ConstantLeaf, Leaf, SizeLeaf
from ..capture.signature import Signature
from ..config import Config
from ..errors import PassError
from ..kernels.devices import common_device
from ..store.key import NoIdentity, environment
from ..torch_internals.tensors import memory_of

log = logging.getLogger("splitpoint")


def model_fields(
    config: Config, signature: Signature, roots: Roots, describer: Describer
) -> dict[str, str] | None:
    """What a program's key is made from; None when it cannot be kept, which the log says."""
    try:
        dims = signature.dims
        arguments = [_leaf(leaf, describer, len(dims.names)) for leaf in signature.leaves]
        return {
            **environment(common_device((leaf.path, leaf.device) for leaf in signature.tensors)),
            "model": _structure(roots, describer),
            "arguments": json.dumps([_parameters(signature), str(signature.spec), arguments]),
            "dims": str([dims.names, dims.largest, dims.size]),
            "max_size": str(config.max_size),
            "split_points": str(list(config.split_points)),
            "compile_sizes": str(list(config.compile_sizes)),
            "splitting_ops": str(list(config.splitting_ops)),
            "on_guard": config.on_guard,
            "hint": config.hint,
            "inductor_options": json.dumps(
                {k: dict(v) if isinstance(v, Mapping) else v for k, v in _options(config)},
                sort_keys=True,
            ),
            "passes": json.dumps([each.uuid() for each in config.passes]),
            "linear": _by_range(config.linear),
            "attention": _by_range(config.attention),
            "weights": str(config.weights),
            "activations": str(config.activations),
            "batch_invariant": str(config.batch_invariant),
            "max_packed_bytes": str(config.max_packed_bytes),
            "free_original_weights": str(config.free_original_weights),
        }
    except (NoIdentity, Unprovable, TypeError, PassError) as why:
        log.info("store: the model is not kept: %s", why)
        return None


def _options(config: Config) -> list[tuple[str, Any]]:
    return sorted(config.inductor_options.items())


def _by_range(given: str | Mapping[str, str]) -> str:
    # A mapping in order: the first that fits counts.
    return given if isinstance(given, str) else str(list(given.items()))


def _parameters(signature: Signature) -> list[list[str]]:
    return [[name, str(p.kind)] for name, p in signature.parameters.parameters.items()]


def _leaf(leaf: Leaf, describer: Describer, count: int) -> Any:
    if isinstance(leaf, ConstantLeaf):
        return [leaf.path, describer.describe(leaf.value)]
    if isinstance(leaf, SizeLeaf):
        return [leaf.path, "size", leaf.which]
    strides = [leaf.stride_at(dim, count) for dim in range(len(leaf.shape))]
    shape = leaf.described([str(which) for which in range(count)])
    return [leaf.path, str(leaf.dtype), str(leaf.device), shape, leaf.dynamic, strides]


def _structure(roots: Roots, describer: Describer) -> str:
    """A digest of a module tree: classes, their code, and the kinds of tensors."""
    rows: list[str] = []
    if roots.owner is None or not isinstance(roots.owner, torch.nn.Module):
        return short(json.dumps(describer.describe(roots.function)))
    rows.append(getattr(roots.function, "__name__", ""))
    seen: dict[int, tuple[int, int]] = {}
    classes: dict[type, str] = {}

    def visit(module: torch.nn.Module, path: str) -> None:
        kind = type(module)
        if kind not in classes:
            classes[kind] = json.dumps(describer.describe(kind))
        rows.append(f"{path} {classes[kind]}")
        for holder in (module._parameters, module._buffers):
            for name, tensor in holder.items():
                rows.append(f"{path}.{name} {_meta(tensor, seen)}")
        for name, child in module._modules.items():
            if child is not None:
                visit(child, f"{path}.{name}")

    visit(roots.owner, "")
    return short("\n".join(rows))


def _meta(tensor: torch.Tensor | None, seen: dict[int, tuple[int, int]]) -> str:
    if tensor is None:
        return "None"
    memory = memory_of(tensor)
    start = 0 if memory is None else int(tensor.storage_offset()) * tensor.element_size()
    alias, first = seen.setdefault(memory or id(tensor), (len(seen), start))
    return f"{tensor_kind(tensor)} {alias} {start - first}"


def tensor_kind(tensor: torch.Tensor) -> str:
    """What compiled code relies on of a tensor of the module."""
    return (
        f"{type(tensor).__qualname__} {tensor.dtype} {tensor.device} {tuple(tensor.shape)} "
        f"{tensor.stride() if tensor.layout is torch.strided else tensor.layout} "
        f"{tensor.requires_grad}"
    )
