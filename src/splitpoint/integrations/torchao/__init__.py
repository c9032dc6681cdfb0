"""torchao: linear layers whose weights it quantised, for this package's kernels.

quantize_(model, Int8WeightOnlyConfig())      # torchao's
splitpoint.integrations.torchao.convert(model)
compiled = splitpoint.compile(model)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UnsupportedModel


class Int8Linear(nn.Module):
    """A linear layer over an int8 weight with one factor a column: what torchao computes.

    Args:
        weight: int8 [n, k].
        scale: [n], of the dtype that the layer computes in.
        bias: [n] or None.
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight: Tensor
        self.scale: Tensor
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., k] to [..., n]."""
        y = F.linear(x, self.weight.to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias


def convert(model: nn.Module) -> nn.Module:
    """Put layers that compile into this package's kernels in the place of those that torchao
    quantised to int8 weights with one factor a column (`Int8WeightOnlyConfig`), in place. They
    compute the same; the int8 values are torchao's own tensors and take no more memory.

    Returns:
        The model.

    Raises:
        UnsupportedModel: for weights in another of torchao's formats, or another layer with one;
            the message names the weight, and nothing has changed then.
    """
    found: dict[nn.Module, Int8Linear] = {}
    for path, module in model.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            if type(weight).__module__.split(".")[0] == "torchao":
                where = f"{path}.{name}" if path else name
                found[module] = _converted(module, name, weight, where)
    if model in found:
        return found[model]
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in found:
                parent._modules[name] = found[child]
    return model


def _converted(module: nn.Module, name: str, weight: Any, where: str) -> Int8Linear:
    why = _why_not(module, name, weight)
    if why is not None:
        raise UnsupportedModel(
            f"{where} is a {type(weight).__name__} of torchao that {why}: quantise with "
            f"Int8WeightOnlyConfig(), or leave weights as they are and give compile() "
            f"Config(weights='int8' or 'int4')"
        )
    bias: Any = module.bias
    scale = weight.scale.detach().flatten().to(weight.dtype)
    made = Int8Linear(weight.qdata.detach(), scale, bias)
    return made.train(module.training)


def _why_not(module: nn.Module, name: str, weight: Any) -> str | None:
    """Why a weight cannot be taken; None where it can."""
    if type(module) is not nn.Linear or name != "weight":
        return f"belongs to a {type(module).__name__}, and only those of nn.Linear are taken"
    if type(weight).__name__ != "Int8Tensor" or weight.qdata.dtype != torch.int8:
        return "is not int8"
    if list(weight.block_size) != [1, weight.shape[1]]:
        return f"has a factor for each {list(weight.block_size)} values, not for each column"
    if weight.act_quant_kwargs is not None or weight.act_pre_scale is not None:
        return "rounds or scales activations"
    if weight.zero_point is not None and bool(weight.zero_point.any()):
        return "has zero points"
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return f"stands for {weight.dtype}"
    return None
