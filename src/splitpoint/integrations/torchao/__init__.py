"""torchao: linear layers whose weights it quantised, for this package's kernels.

quantize_(model, Int8WeightOnlyConfig())      # torchao's; or in 4 bits:
quantize_(model, IntxWeightOnlyConfig(torch.int4, PerGroup(64)))
splitpoint.integrations.torchao.convert(model)
compiled = splitpoint.compile(model)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UnsupportedModel
from ...kernels.memory import Streamed
from ...models.quantised.decoded import Decoded, even_groups, packed_linear


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
    quantised, in place: to int8 with one factor a column (`Int8WeightOnlyConfig`), whose values are
    torchao's own tensors and take no more memory; and to 1 to 8 bits (`IntxWeightOnlyConfig`), of
    which up to 4 are held in 4, in groups of multiples of 32, and more in 8, with one factor a
    column. They compute the same.

    Returns:
        The model.

    Raises:
        UnsupportedModel: for weights in another of torchao's formats, or another layer with one;
            the message names the weight, and nothing has changed then.
    """
    found: dict[nn.Module, nn.Module] = {}
    memory = Streamed()
    for path, module in model.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            if type(weight).__module__.split(".")[0] == "torchao":
                where = f"{path}.{name}" if path else name
                found[module] = _converted(module, name, weight, where, memory)
    if model in found:
        return found[model]
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in found:
                parent._modules[name] = found[child]
    return model


def _converted(
    module: nn.Module, name: str, weight: Any, where: str, memory: Streamed
) -> nn.Module:
    try:
        if type(module) is not nn.Linear or name != "weight":
            raise UnsupportedModel(
                f"belongs to a {type(module).__name__}, and only those of nn.Linear are taken"
            )
        if weight.dtype not in (torch.float32, torch.bfloat16):
            raise UnsupportedModel(f"stands for {weight.dtype}")
        made = _TAKEN.get(type(weight).__name__, _other)(weight, module.bias, memory)
    except UnsupportedModel as why:
        raise UnsupportedModel(
            f"{where} is a {type(weight).__name__} of torchao that {why}: quantise with "
            f"Int8WeightOnlyConfig() or IntxWeightOnlyConfig(torch.int4, PerGroup(64)), or leave "
            f"weights as they are and give compile() Config(weights='int8' or 'int4')"
        ) from None
    return made.train(module.training)


def _int8(weight: Any, bias: nn.Parameter | None, memory: Streamed) -> nn.Module:
    if weight.qdata.dtype != torch.int8:
        raise UnsupportedModel("is not int8")
    if list(weight.block_size) != [1, weight.shape[1]]:
        raise UnsupportedModel(
            f"has a factor for each {list(weight.block_size)} values, not for each column"
        )
    if weight.act_quant_kwargs is not None or weight.act_pre_scale is not None:
        raise UnsupportedModel("rounds or scales activations")
    if weight.zero_point is not None and bool(weight.zero_point.any()):
        raise UnsupportedModel("has zero points")
    scale = weight.scale.detach().flatten().to(weight.dtype)
    return Int8Linear(weight.qdata.detach(), scale, bias)


def _intx(weight: Any, bias: nn.Parameter | None, memory: Streamed) -> nn.Module:
    if weight.activation_quantization is not None:
        raise UnsupportedModel("rounds or scales activations")
    rows, group = weight.block_size
    scales, zeros = weight.scale.detach().float(), weight.zero_point.detach().float()
    bits = 4 if weight.target_dtype in _UP_TO_4_BITS else 8
    if rows != 1:
        raise UnsupportedModel(f"has a factor for each {[rows, group]} values")
    if not torch.equal(zeros, zeros.round()) or bool((zeros.abs() > 2 ** (bits - 1)).any()):
        raise UnsupportedModel("has zero points that are no whole steps")
    group_of = even_groups(weight.shape[1], group, scales.shape[1])
    decoded = Decoded(bits, weight.qdata.detach(), scales, zeros.to(torch.int8), group_of)
    return packed_linear(decoded, bias, memory)


def _other(weight: Any, bias: nn.Parameter | None, memory: Streamed) -> nn.Module:
    zeros = getattr(weight, "zero_point", getattr(weight, "scale_and_zero", None))
    if isinstance(zeros, Tensor) and zeros.is_floating_point():
        raise UnsupportedModel("has zero points that are no whole steps")
    raise UnsupportedModel("is in a format that is not taken")


_UP_TO_4_BITS = tuple(getattr(torch, f"int{bits}") for bits in (1, 2, 3, 4))

_TAKEN: dict[str, Callable[[Any, nn.Parameter | None, Streamed], nn.Module]] = {
    "Int8Tensor": _int8,
    "IntxUnpackedToInt8Tensor": _intx,
}
"""By torchao's names of tensors."""
