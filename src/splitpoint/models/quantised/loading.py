"""Load a quantised checkpoint with transformers, its layers with their weights as they are.

transformers builds the model and reads all tensors, as it does for quantisation methods of its own;
what it needs other packages for, the layers themselves, is put in here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...errors import UnsupportedModel
from ...kernels.memory import Streamed
from ...kernels.packed_linear import PackedLinear
from ..whole import check_whole
from .decoded import packed_linear
from .formats import FORMATS, Format, Settings

METHOD = "splitpoint"
"""The name under which transformers finds what is here."""

_DTYPES = {
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}
"""Of tensors that are read as they are, by their names in safetensors. Floats are read as
float32, which holds all of them exactly."""


def settings_of(config: Any) -> Settings | None:
    """The quantization_config of a model's configuration, if its method is one of `FORMATS`.

    Raises:
        UnsupportedModel: when it asks for what is not taken; the message names it.
    """
    found = getattr(config, "quantization_config", None)
    settings = found if isinstance(found, dict) or found is None else found.to_dict()
    if settings is None or settings.get("quant_method") not in FORMATS:
        return None
    method = settings["quant_method"]
    refused = list(dict.fromkeys(FORMATS[method].refusals(settings)))
    if refused:
        raise UnsupportedModel(
            f"a checkpoint of {method} with {'; '.join(refused)} is not taken: load one that was "
            f"not quantised, and give compile() Config(weights='int8' or 'int4')"
        )
    return dict(settings)


def load_quantised(model_class: Any, path: str, config: Any, **how: Any) -> Any:
    """`model_class.from_pretrained(path, config=config, **how)` of a quantised checkpoint in
    safetensors.

    Raises:
        UnsupportedModel: for what is not taken, and for layers that are no `nn.Linear`; the message
            names the layer.
        ModelNotFound: when the checkpoint has no weights for a part of the model.
    """
    settings = settings_of(config)
    assert settings is not None
    config.quantization_config = {"quant_method": METHOD, "settings": settings}
    model, found = model_class.from_pretrained(path, config=config, output_loading_info=True, **how)
    check_whole(path, found)
    model.is_quantized = False  # transformers refuses .float() of others; packed ones stay as exact
    names = {name for name, _ in model.named_modules()}
    for key in sorted(found["unexpected_keys"]):
        module, _, name = key.rpartition(".")
        if module in names and ("scale" in name or "zero" in name):
            raise UnsupportedModel(
                f"{key} of a checkpoint of {settings['quant_method']} belongs to a part that this "
                f"model computes without: load a checkpoint that was not quantised"
            )
    return model


def dense_state(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state of a model with the weights that packed ones stand for in their places."""
    packed = {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    state = {
        name: value
        for name, value in model.state_dict().items()
        if name.rpartition(".")[0] not in packed or name.endswith(".bias")
    }
    return state | {f"{name}.weight": layer.weight(dtype) for name, layer in packed.items()}


class _Waiting(nn.Module):
    """A layer whose tensors are still to be read."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.n, self.k = layer.weight.shape


@register_quantization_config(METHOD)
class _Config(QuantizationConfigMixin):  # type: ignore[misc]
    """What is known of a checkpoint's quantisation."""

    def __init__(self, settings: Settings, **_: Any) -> None:
        self.quant_method = METHOD
        self.settings = settings

    @property
    def format(self) -> Format:
        """The checkpoint's."""
        return FORMATS[self.settings["quant_method"]]


@register_quantizer(METHOD)
class _Quantizer(HfQuantizer):  # type: ignore[misc]
    """Puts layers that wait for a format's tensors into a model, and packed ones in their place
    when it has them."""

    requires_calibration = True  # so that transformers does not try to quantise by it

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Packed weights are in a layout of this machine's kernels."""
        return False

    @property
    def is_trainable(self) -> bool:
        """There are no gradients."""
        return False

    def _process_model_before_weight_loading(self, model: Any, **how: Any) -> Any:
        made: Format = self.quantization_config.format
        tensors = _stored(how.get("checkpoint_files"))
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        for name, module in list(model.named_modules()):
            if made.mark not in tensors.get(name, {}):
                continue
            if type(module) is not nn.Linear or f"{name}.weight" in tied:
                what = "shares its weight" if type(module) is nn.Linear else "is no nn.Linear"
                raise UnsupportedModel(
                    f"{name}, a {type(module).__name__} that {what}, is quantised in the "
                    f"checkpoint, and only layers by themselves are taken: load one where it is not"
                )
            waiting = _Waiting(module)
            for each, (shape, kind) in tensors[name].items():
                if each in made.tensors or each == "bias":
                    dtype = _DTYPES.get(kind, torch.float32)
                    dtype = module.weight.dtype if each == "bias" else dtype
                    waiting.register_buffer(each, torch.empty(shape, dtype=dtype, device="meta"))
            model.set_submodule(name, waiting)
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        config, memory = self.quantization_config, Streamed()
        for name, module in list(model.named_modules()):
            if not isinstance(module, _Waiting):
                continue
            given = dict(module.named_buffers())
            bias = given.pop("bias", None)
            try:
                weight = config.format.decode(given, config.settings, module.n, module.k)
                model.set_submodule(name, packed_linear(weight, bias, memory))
            except UnsupportedModel as why:
                raise UnsupportedModel(
                    f"{name} of a checkpoint of {config.settings['quant_method']} cannot be taken: "
                    f"{why}"
                ) from None
        return model


def _stored(files: Iterable[str] | None) -> Mapping[str, dict[str, tuple[list[int], str]]]:
    """What checkpoint files hold: by layer and name, shapes and dtypes."""
    from safetensors import safe_open

    found: dict[str, dict[str, tuple[list[int], str]]] = {}
    for path in files or ():
        if Path(path).suffix != ".safetensors":
            raise UnsupportedModel(
                f"{path} is a quantised checkpoint that is not in safetensors: load one that is"
            )
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118, as it is no mapping
                layer, _, name = key.rpartition(".")
                each = file.get_slice(key)
                found.setdefault(layer, {})[name] = each.get_shape(), each.get_dtype()
    return found
