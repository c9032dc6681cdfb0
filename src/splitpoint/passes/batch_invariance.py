"""Refuse what sums in another order when there are more or fewer rows.

A library's product divides its work by all of its sizes, so that the same row may have other bits
beside other rows. The model's own layers have kernels of this package that do not
(`passes.linear`); what Inductor makes loops of adds up each element of a result in one order,
which is that of the one piece of code for all sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from torch import fx

from ..errors import NotBatchInvariant
from ..torch_internals.operators import op_name
from ..torch_internals.sizes import statically_equal
from .base import Pass

PRODUCT = "a library divides this product by how many rows there are"
LAPACK = "a library divides this by how many rows or matrices there are"
ATTENTION = "a library divides this attention by how many queries there are"
SHARED = "the order in which ranks are summed depends on how many rows there are"

VARIES: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "aten::mm",
            "aten::addmm",
            "aten::addmv",
            "aten::mv",
            "aten::dot",
            "aten::vdot",
            "aten::bmm",
            "aten::baddbmm",
            "aten::linear",
            "aten::_int_mm",
            "aten::_scaled_mm",
            "aten::_grouped_mm",
            "aten::_weight_int8pack_mm",
            "aten::_weight_int4pack_mm_for_cpu",
            "aten::convolution",
            "aten::_convolution",
            "mkldnn::_linear_pointwise",
            "mkldnn::_convolution_pointwise",
            "mkl::_mkl_linear",
            "aten::addbmm",
            "aten::_trilinear",
            "aten::bilinear",
            "aten::matmul",
            "aten::einsum",
            "aten::tensordot",
            "aten::_cdist_forward",
            "aten::_euclidean_dist",
            "aten::cdist",
            "aten::_sparse_mm",
            "aten::_sparse_addmm",
            "aten::mkldnn_rnn_layer",
        ),
        PRODUCT,
    ),
    **dict.fromkeys(
        (
            "aten::_linalg_det",
            "aten::_linalg_eigh",
            "aten::_linalg_eigvals",
            "aten::_linalg_slogdet",
            "aten::_linalg_solve_ex",
            "aten::_linalg_svd",
            "aten::linalg_cholesky_ex",
            "aten::linalg_eig",
            "aten::linalg_eigvals",
            "aten::linalg_householder_product",
            "aten::linalg_inv_ex",
            "aten::linalg_ldl_factor_ex",
            "aten::linalg_ldl_solve",
            "aten::linalg_lstsq",
            "aten::linalg_lu",
            "aten::linalg_lu_factor_ex",
            "aten::linalg_lu_solve",
            "aten::linalg_matrix_exp",
            "aten::linalg_pinv",
            "aten::linalg_qr",
            "aten::linalg_solve_triangular",
            "aten::_cholesky_solve_helper",
            "aten::cholesky",
            "aten::cholesky_inverse",
            "aten::cholesky_solve",
            "aten::geqrf",
            "aten::inverse",
            "aten::lu_solve",
            "aten::ormqr",
            "aten::svd",
            "aten::triangular_solve",
        ),
        LAPACK,
    ),
    **dict.fromkeys(
        (
            "aten::scaled_dot_product_attention",
            "aten::_scaled_dot_product_flash_attention_for_cpu",
            "aten::_scaled_dot_product_fused_attention_overrideable",
        ),
        ATTENTION,
    ),
    **dict.fromkeys(
        (
            "_c10d_functional::all_reduce",
            "_c10d_functional::all_reduce_",
            "_c10d_functional::reduce_scatter_tensor",
            "splitpoint::all_reduce",
            "splitpoint::allreduce_rmsnorm",
        ),
        SHARED,
    ),
}
"""By operator of a graph after AOTAutograd: why a row's result may have other bits beside other
rows."""


class BatchInvariance(Pass):
    """Refuse graphs in which a row's result may have other bits beside other rows.

    Raises:
        NotBatchInvariant: for the first operator of `VARIES`.
    """

    asks_torch = True

    def __call__(self, graph: fx.Graph) -> int:
        """Look at each operator; nothing is rewritten, so that the count is 0."""
        for node in graph.nodes:
            if node.op == "call_function" and not _adds_nothing(node):
                refuse(node.target, str(node))
        return 0


def _adds_nothing(node: fx.Node) -> bool:
    """Whether it is a product over one k, as that of positions and frequencies is."""
    if op_name(node.target) not in ("aten::mm", "aten::bmm"):
        return False
    (first, *_) = node.args
    assert isinstance(first, fx.Node)
    return statically_equal(first.meta["val"].shape[-1], 1)


def refuse(target: object, name: str) -> None:
    """Refuse an operator of `VARIES`.

    Raises:
        NotBatchInvariant: for one; the message has the name of its node.
    """
    called = op_name(target)
    why = VARIES.get(called) or VARIES.get(called.partition(".")[0])
    if why is not None:
        raise _refusal(f"{name} is {called}, and {why}")


def refuse_attention(name: str) -> NoReturn:
    """Refuse attention between pieces that no kernel of this package computes.

    Raises:
        NotBatchInvariant: always; the message has what the attention is called.
    """
    raise _refusal(f"attention {name} stays torch's, and {ATTENTION}")


def refuse_layer(name: str) -> NoReturn:
    """Refuse a linear layer that no batch-invariant kernel fits.

    Raises:
        NotBatchInvariant: always; the message has the layer's shape.
    """
    raise _refusal(f"no kernel of {name} adds in one order at all sizes, in 4 bits there is none")


def _refusal(why: str) -> NotBatchInvariant:
    return NotBatchInvariant(
        f"batch_invariant=True cannot be kept: {why}\n"
        f"expected layers over the model's own weights, and attention that is a splitting op\n"
        f"leave batch_invariant out, or rewrite that step"
    )
