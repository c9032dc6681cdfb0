"""What AOTAutograd's and Inductor's wrappers around a compiled graph have to do at a call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from .probe import fits


def _are_subclasses(metadata: Any) -> bool:
    from torch._functorch._aot_autograd.schemas import PlainTensorMeta

    plain = [*metadata.subclass_inp_meta, *metadata.subclass_fw_graph_out_meta]
    indices = [getattr(each, "unwrapped_idx", None) for each in metadata.subclass_inp_meta]
    return not all(type(each) is PlainTensorMeta for each in plain) or indices != list(
        range(len(metadata.input_info))
    )


_OF_METADATA: dict[str, Callable[[Any], object]] = {
    "inputs to copy back to": lambda it: it.num_mutated_inp_runtime_indices,
    "outputs that are views of inputs": lambda it: it.num_outputs_aliased,
    "bases of views": lambda it: it.num_intermediate_bases,
    "effect tokens": lambda it: it.tokens,
    "random state": lambda it: it.is_rng_op_functionalized or it.num_graphsafe_rng_states,
    "grad mode": lambda it: it.grad_enabled_mutation is not None,
    # The first is torch 2.13's name, the second 2.14's.
    "collectives to wait for": lambda it: (
        getattr(it, "act_input_indices", ()) or getattr(it, "act_input_paths", ())
    ),
    "tensor subclasses": _are_subclasses,
}
"""By duty: whether AOTAutograd's metadata asks for it."""


def is_cuda(graph: Any) -> bool:
    """Whether all of a compiled graph is on one CUDA device."""
    return set(graph.device_types) == {"cuda"} and len(graph.device_idxs) == 1


_OF_GRAPH: dict[str, Callable[[Any], object]] = {
    "inputs to align": lambda it: it.inputs_to_check and not is_cuda(it),
    "constants": lambda it: it.constants or it.frozen_param_names,
    "objects": lambda it: it.torchbind_constants or it.opaque_value_type_classes,
    "compiled regions": lambda it: it._wrap_compiled_regions,
    "devices": lambda it: set(it.device_types) != {"cpu"} and not is_cuda(it),
    # CUDA's wrappers run what Inductor recorded, and know of memory that is written in place.
    "Inductor's CUDA graphs": lambda it: is_cuda(it) and it.cudagraph_info is not None,
}
"""By duty: whether Inductor's compiled graph asks for it."""

_READ_ABOVE = """
num_intermediate_bases tokens num_graphsafe_rng_states grad_enabled_mutation act_input_indices
act_input_paths input_info subclass_inp_meta subclass_fw_graph_out_meta
inputs_to_check constants frozen_param_names torchbind_constants opaque_value_type_classes
_wrap_compiled_regions device_types device_idxs cudagraph_info
"""

_NOTHING_AT_A_CALL = """
output_info keep_input_mutations traced_tangents traced_tangents_descs subclass_tangent_meta
is_train traced_tangent_metas num_symints_saved_for_bw num_tensors_saved_with_no_vc_check
num_opaque_objects_saved_for_bw deterministic static_input_indices
indices_of_inputs_that_requires_grad_with_mutations_in_bw bw_donated_idxs num_backward_tokens
graphsafe_rng_state_index graphsafe_rng_device mutated_inp_stream_indices compile_id_str
tangent_source_stack_traces saved_tensor_is_graph_input
_fx_graph_cache_key _fx_graph_cache_debug_lines _time_taken_ns current_callable
recursively_apply_fns compiled_fn_runner cache_key source_code runnable_graph_str
inductor_post_grad_graph_str cache_linemap mutated_inputs mutated_input_idxs
output_strides disabled_cudagraphs_reason metrics_deltas counter_deltas guards_expr
extern_libs_key inductor_provenance_mapping_str inductor_provenance_stack_traces_str
kernel_free_cudagraph partition_maps has_uncaptured_partition
compile_region_name fx_kwargs _boxed_call _triton_bundle _defers_input_alignment
_compile_context _original_gm _serialized_original_gm
"""
"""About gradients, caches, CUDA graphs and logs, or the way to the function."""

_FIELDS = frozenset(f"{_READ_ABOVE} {_NOTHING_AT_A_CALL}".split())
"""The fields of both in the versions of torch that this was read in."""


def duties(graph: Any, metadata: Any) -> str:
    """What the wrappers around a graph have to do at a call; "" when that is nothing.

    A field that no known version has counts as a duty unless it is empty. One thing that wrappers
    do is left out: counting up the version of inputs updated in place.
    """
    if not (fits("generated code") and fits("duties of wrappers")):
        return "what this version of torch does not say"
    from torch._inductor.output_code import CompiledFxGraph

    if metadata is None or not isinstance(graph, CompiledFxGraph):
        return "a graph of another kind"
    found = [name for name, asks in _OF_METADATA.items() if asks(metadata)]
    found += [name for name, asks in _OF_GRAPH.items() if asks(graph)]
    if torch._C._is_any_autocast_enabled():
        found.append("autocast")
    for given in (metadata, graph):
        found += [
            f"a field {each.name} that is not known"
            for each in dataclasses.fields(given)
            if each.name not in _FIELDS and getattr(given, each.name, None)
        ]
    return ", ".join(found)
