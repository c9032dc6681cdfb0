"""The table of every private name of torch that this package uses, by what it is used for.

An entry of a use is written `module:qualified.name`. In brackets follows how it is called here:
the number of arguments by position, then those by keyword. `Class@name` is an attribute that
instances have. `probe` compares the table with the torch that is installed.

Longer than 500 lines because it is one table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CHECKED = ("2.11.0", "2.13.0", "2.14.1", "2.15.0")
"""The versions of torch that the test suite was run on with every entry of the table."""

Kind = Literal["needed", "safety", "speed", "words"]
"""What a use is for. Without what is *needed* there is no compiled model and `UnsupportedTorch`
is raised; *safety* guards against what other programs and threads do; *speed* and *words* (what
is said to the user) are left out where their names do not fit."""


@dataclass(frozen=True)
class Use:
    """What some private names are used for, all of them together."""

    key: str
    kind: Kind
    purpose: str
    without: str
    """What happens where a name is missing, or takes other arguments."""
    entries: tuple[str, ...]
    until: str = ""
    """The first version that does by itself what this is for; "" where none does."""


_CONVERT = "torch._dynamo.convert_frame"
_SHAPES = "torch.fx.experimental.symbolic_shapes"
_SCHEMAS = "torch._functorch._aot_autograd.schemas"
_CACHE = "torch._inductor.codecache"
_GENERATED = "torch._C._dynamo.guards"

USES = (
    # --- at every start ----------------------------------------------------------------
    Use(
        "trees",
        "needed",
        "take arguments and results apart and put them together",
        "raises UnsupportedTorch",
        (
            "torch.utils._pytree:tree_flatten(1)",
            "torch.utils._pytree:tree_unflatten(2)",
            "torch.utils._pytree:tree_flatten_with_path(1)",
            "torch.utils._pytree:keystr(1)",
            "torch.utils._pytree:treespec_dumps(1)",
            "torch.utils._pytree:treespec_loads(1)",
            "torch.utils._pytree:TreeSpec",
        ),
    ),
    Use(
        "operators",
        "needed",
        "tell operators apart, and find them by name",
        "raises UnsupportedTorch",
        (
            "torch._ops:OpOverload.name(1)",
            "torch._ops:OpOverload@_schema",
            "torch._ops:OpOverload@_overloadname",
            "torch._ops:OpOverload@_overloadpacket",
            "torch._ops:OpOverloadPacket.overloads(1)",
            "torch._ops:OpOverloadPacket@_qualified_op_name",
            "torch._ops:HigherOrderOperator.name(1)",
            "torch._C:_nn",
            "torch._C:_VariableFunctions",
            "torch.amp.autocast_mode:_enter_autocast",
            "torch.amp.autocast_mode:_exit_autocast",
            "torch.autograd.grad_mode:_enter_inference_mode",
            "torch.autograd.grad_mode:_exit_inference_mode",
        ),
    ),
    Use(
        "state of torch",
        "needed",
        "see that modes and settings are as they were at capture",
        "raises UnsupportedTorch",
        (
            "torch._C:_len_torch_function_stack",
            "torch._C:_len_torch_dispatch_stack",
            "torch._C:_is_torch_function_enabled",
            "torch:UntypedStorage@_cdata",
        ),
    ),
    Use(
        "shapes at a length of 1",
        "needed",
        "see that a graph has the shapes that the model has at a length of 1",
        "raises UnsupportedTorch",
        ("torch._subclasses.fake_tensor:FakeTensorMode",),
    ),
    Use(
        "dispatch modes",
        "safety",
        "check guards as they were made, without a mode that sees operators",
        "calls under a TorchDispatchMode may raise StateChanged",
        ("torch.utils._python_dispatch:_disable_current_modes",),
    ),
    Use(
        "settings of Inductor",
        "speed",
        "leave settings of Inductor that were not changed out of a store's keys",
        "all settings are in the keys: a store is used again with exactly the same ones",
        ("torch._inductor.config:_config", "torch._inductor.config:_is_default(1)"),
    ),
    Use(
        "grad mode",
        "speed",
        "switch gradients off around a call in 50 ns, and drop what a model switches",
        "torch.set_grad_enabled does it, in 500 ns; a model that switches gradients is refused",
        ("torch._C:_set_grad_enabled",),
    ),
    Use(
        "operators without Python",
        "speed",
        "call an operator past the Python method in front of it",
        "0.3 us more for each operator that a range calls from Python",
        ("torch._ops:OpOverload@_op",),
    ),
    Use(
        "addresses of tensors",
        "speed",
        "watch tensors from C++ for being exchanged",
        "Dynamo's guards are checked at every call",
        ("torch:Tensor@_cdata",),
    ),
    Use(
        "generated code",
        "speed",
        "run what Inductor wrote around its kernels as a function of our own",
        "Inductor's and AOTAutograd's wrappers stay, at 10 to 20 us a piece, and nothing is kept "
        "in the store",
        (
            f"{_GENERATED}:_empty_strided_cpu",
            f"{_GENERATED}:_empty_strided_cuda",
            f"{_GENERATED}:_reinterpret_tensor",
            f"{_GENERATED}:assert_size_stride",
            f"{_GENERATED}:assert_alignment",
            f"{_GENERATED}:_torchinductor_pyobject_tensor_data_ptr",
        ),
    ),
    Use(
        "duties of wrappers",
        "speed",
        "see that AOTAutograd's and Inductor's wrappers around a graph have nothing to do",
        "as without generated code: the wrappers stay, and nothing is kept in the store",
        (
            f"{_SCHEMAS}:PlainTensorMeta@unwrapped_idx",
            f"{_SCHEMAS}:ViewAndMutationMeta@input_info",
            f"{_SCHEMAS}:ViewAndMutationMeta@subclass_inp_meta",
            f"{_SCHEMAS}:ViewAndMutationMeta@subclass_fw_graph_out_meta",
            f"{_SCHEMAS}:ViewAndMutationMeta@num_mutated_inp_runtime_indices",
            f"{_SCHEMAS}:ViewAndMutationMeta@num_outputs_aliased",
            f"{_SCHEMAS}:ViewAndMutationMeta@num_intermediate_bases",
            f"{_SCHEMAS}:ViewAndMutationMeta@tokens",
            f"{_SCHEMAS}:ViewAndMutationMeta@is_rng_op_functionalized",
            f"{_SCHEMAS}:ViewAndMutationMeta@num_graphsafe_rng_states",
            f"{_SCHEMAS}:ViewAndMutationMeta@grad_enabled_mutation",
            f"{_SCHEMAS}:ViewAndMutationMeta@mutated_graph_handled_indices",
            "torch._inductor.output_code:CompiledFxGraph",
            "torch._inductor.output_code:CompiledFxGraph@current_callable",
            "torch._inductor.output_code:CompiledFxGraph@source_code",
            "torch._inductor.output_code:CompiledFxGraph@inputs_to_check",
            "torch._inductor.output_code:CompiledFxGraph@constants",
            "torch._inductor.output_code:CompiledFxGraph@frozen_param_names",
            "torch._inductor.output_code:CompiledFxGraph@torchbind_constants",
            "torch._inductor.output_code:CompiledFxGraph@opaque_value_type_classes",
            "torch._inductor.output_code:CompiledFxGraph@_wrap_compiled_regions",
            "torch._inductor.output_code:CompiledFxGraph@device_types",
            "torch._inductor.output_code:CompiledFxGraph@device_idxs",
            "torch._inductor.output_code:CompiledFxGraph@cudagraph_info",
            "torch._guards:TracingContext@fw_metadata",
            "torch._C:_is_any_autocast_enabled",
        ),
    ),
    Use(
        "Triton kernels",
        "speed",
        "keep the kernels that Inductor writes for CUDA, with what Triton made of them, in the "
        "store",
        "what is compiled for CUDA is not kept",
        (
            "torch._inductor.async_compile:AsyncCompile.triton(3, device_str)",
            "torch._inductor.output_code:CompiledFxGraph@_triton_bundle",
            "torch._inductor.triton_bundler:TritonBundle(2)",
            "torch._inductor.triton_bundler:TritonBundler.read_and_emit(1)",
            "torch._inductor.triton_bundler:TritonKernelArtifact(2)",
            "torch._inductor.triton_bundler:TritonKernelArtifacts(3)",
            "torch._inductor.config:compile_threads",
        ),
    ),
    # --- capture -----------------------------------------------------------------------
    Use(
        "capture",
        "needed",
        "trace a callable as one graph",
        "raises UnsupportedTorch",
        (
            f"{_CONVERT}:fullgraph_capture(3)",
            f"{_CONVERT}:get_traced_fn(1)",
            f"{_CONVERT}:_get_frame(3)",
            f"{_CONVERT}:compile_lock",
            f"{_CONVERT}:CaptureOutput@backend_input",
            f"{_CONVERT}:CaptureOutput@graph_capture_output",
            f"{_CONVERT}:CaptureOutput.forward_callable(1, compiled_fn, extra_globals)",
            f"{_CONVERT}:BackendInput@graph_module",
            f"{_CONVERT}:BackendInput@fake_mode",
            f"{_CONVERT}:BackendInput@tensor_to_context",
            f"{_CONVERT}:GraphCaptureOutput@output_graph",
            f"{_CONVERT}:GraphCaptureOutput@traced_code",
            f"{_CONVERT}:GraphCaptureOutput@f_globals",
            f"{_CONVERT}:GraphCaptureOutput.build_guards(2, hooks)",
            "torch._dynamo:maybe_mark_dynamic(2)",
            "torch._dynamo.exc:TorchDynamoException",
            "torch._dynamo.source:TensorProperty.SIZE",
            "torch._dynamo.source:TensorPropertySource@prop",
            "torch._dynamo.source:TensorPropertySource@base",
            "torch._dynamo.source:TensorPropertySource@idx",
            "torch._dynamo.hooks:Hooks(0)",
            "torch._dynamo.utils:get_metrics_context(0)",
            "torch._dynamo.utils:dynamo_timed(1, log_pt2_compile_event)",
            "torch._dynamo.config:specialize_float",
            "torch._dynamo.config:assume_static_by_default",
            "torch._dynamo.config:automatic_dynamic_shapes",
            "torch._dynamo.config:replay_side_effects",
            "torch._dynamo.config:side_effect_replay_policy",
            "torch._dynamo.config:skip_nnmodule_hook_guards",
            "torch._dynamo.config:use_recursive_dict_tags_for_guards",
            "torch._dynamo.config:skip_tensor_guards_with_matching_dict_tags",
            "torch._dynamo.config:skip_guards_on_constant_func_defaults",
            "torch._guards:TracingContext(1)",
            "torch._guards:tracing(1)",
            "torch.fx.experimental._config:backed_size_oblivious",
            "torch.fx.experimental._config:use_duck_shape",
        ),
    ),
    Use(
        "single guards",
        "speed",
        "check at a call only those of Dynamo's guards that a watch does not see, and write them "
        "down for the store",
        "all guards are checked at every call, and models are not kept in the store",
        (
            "torch._dynamo.guards:make_guard_filter_entry(2)",
            "torch._dynamo.guards:_get_closure_vars(0)",
            "torch._dynamo.output_graph:OutputGraphCommon@_guards",
            "torch._dynamo.output_graph:OutputGraphCommon@local_scope",
            "torch._dynamo.output_graph:OutputGraphCommon@global_scope",
            "torch._guards:GuardsSet(1)",
            "torch._guards:Guard@guard_types",
            "torch._guards:Guard@guarded_class_weakref",
            "torch._guards:Guard@code_list",
            "torch._guards:Guard@obj_weakref",
            "torch._guards:Guard@originating_source",
            "torch._guards:Guard@create_fn",
            "torch._guards:Guard.sort_key(1)",
            "torch.utils._ordered_set:OrderedSet(1)",
        ),
    ),
    Use(
        "tracing in one thread",
        "safety",
        "let other threads call functions of torch.compile while this one traces",
        "with background=True such calls raise an error of torch's meanwhile",
        (
            "torch._dynamo:disable(1)",
            "torch._dynamo.eval_frame:TorchPatcher.patch(0)",
            "torch._dynamo.eval_frame:innermost_fn(1)",
            "torch.fx._symbolic_trace:_is_fx_tracing_flag",
            "torch.fx._symbolic_trace:Tracer.trace(3)",
        ),
        until="2.14",
    ),
    # --- sizes -------------------------------------------------------------------------
    Use(
        "sizes",
        "needed",
        "give a range symbolic sizes of its own, and read back what was assumed of them",
        "raises UnsupportedTorch",
        (
            f"{_SHAPES}:ShapeEnv(0, specialize_zero_one, duck_shape)",
            f"{_SHAPES}:ShapeEnv.create_symbol"
            "(2, source, dynamic_dim, constraint_dim, do_not_specialize_zero_one)",
            f"{_SHAPES}:ShapeEnv.create_symintnode(2, hint, source)",
            f"{_SHAPES}:ShapeEnv@guards",
            f"{_SHAPES}:ShapeEnv@replacements",
            f"{_SHAPES}:ShapeEnv@deferred_runtime_asserts",
            f"{_SHAPES}:ShapeEnv@var_to_range",
            f"{_SHAPES}:ShapeEnv@var_to_sources",
            f"{_SHAPES}:DimDynamic.DYNAMIC",
            f"{_SHAPES}:StrictMinMaxConstraint(0, warn_only, vr)",
            f"{_SHAPES}:statically_known_true(1)",
            "torch._dynamo.source:ConstantSource(1)",
            "torch._subclasses.fake_tensor:FakeTensor",
            "torch._subclasses.fake_tensor:FakeTensorMode(0, shape_env, allow_non_fake_inputs)",
            "torch._subclasses.fake_tensor:unset_fake_temporarily(0)",
            "torch.utils._sympy.value_ranges:ValueRanges(2)",
            "torch.utils._sympy.functions:FloorDiv(2)",
            "torch.utils._sympy.printers:PythonPrinter(0)",
            "torch.utils._sympy.interp:sympy_interp(3)",
            "torch.utils._sympy.reference:PythonReferenceAnalysis",
        ),
    ),
    # --- compiling ---------------------------------------------------------------------
    Use(
        "compile",
        "needed",
        "compile a graph with Inductor for one range, with passes",
        "raises UnsupportedTorch",
        (
            "torch._inductor:standalone_compile(2, dynamic_shapes, options)",
            "torch._inductor:list_options(0)",
            "torch._inductor.compile_fx:compile_fx_inner(2)",
            "torch._inductor.custom_graph_pass:CustomGraphPass.uuid(1)",
            "torch._inductor.config:post_grad_custom_pre_pass",
            "torch._inductor.config:fx_graph_cache",
            "torch._inductor.pattern_matcher:stable_topological_sort(1)",
            "torch._inductor.utils:clear_caches(0)",
            "torch._functorch.config:enable_autograd_cache",
            "torch.compiler.config:cache_key_tag",
        ),
    ),
    Use(
        "artifact's function",
        "speed",
        "call a compiled graph past the method that forwards to it",
        "1 us more for each piece whose wrappers stay",
        ("torch._inductor.standalone_compile:CompiledArtifact@_compiled_fn",),
    ),
    Use(
        "code for graphs that compute nothing",
        "speed",
        "have Inductor write code for a graph that returns what it was given, which can be kept",
        "models with such a piece are captured and compiled at each start",
        ("torch._functorch.config:bundled_autograd_cache",),
    ),
    Use(
        "where graphs are cut",
        "words",
        "name the line at which torch.compile ended a graph",
        "the plan of a model that was cut names the first such line only",
        ("torch._dynamo.output_graph:GraphCompileReason",),
    ),
    Use(
        "graphs without ranges",
        "speed",
        "compile graphs of a model that was cut, where they have several sizes",
        "they run as they are",
        ("torch._dynamo:lookup_backend(1)",),
    ),
    Use(
        "what a capture failed with",
        "words",
        "tell an operator that refuses its inputs from a break of the graph",
        "either counts as a break: torch.compile is tried, and raises the operator's own error",
        ("torch._dynamo.exc:TorchRuntimeError",),
    ),
    Use(
        "one compile for several ranges",
        "speed",
        "see what a compile asks about the size, so that ranges share it where nothing differs",
        "each range is compiled on its own",
        (
            f"{_SHAPES}:ShapeEnv._maybe_evaluate_static"
            "(2, unbacked_only, compute_hint, size_oblivious, axioms, var_to_range)",
            f"{_SHAPES}:_sym_node_hint_disproves(2)",
            "torch._inductor.sizevars:statically_known_true(4)",
            "torch._inductor.index_propagation:statically_known_true(4)",
            "torch._inductor.sizevars:SizeVarAllocator.optimization_hint(3)",
            "torch._inductor.sizevars:SizeVarAllocator.remove_precomputed_replacements(2)",
            "torch._inductor.codegen.cpp:CppKernelProxy.codegen_functions",
            "torch._inductor.codegen.cpp:CppKernel.decide_parallel_depth",
        ),
    ),
    Use(
        "kernels in one file",
        "speed",
        "build the C++ kernels of all ranges in one run of the compiler",
        "Inductor builds each kernel by itself, 1.5 CPU s each",
        (
            "torch._inductor.async_compile:AsyncCompile.cpp_pybinding(3)",
            f"{_CACHE}:CppPythonBindingsCodeCache.load_async(2, submit_fn)",
            f"{_CACHE}:CppPythonBindingsCodeCache._load_library_inner(2)",
            f"{_CACHE}:CppPythonBindingsCodeCache._get_uncompiled_header(1)",
            f"{_CACHE}:CppPythonBindingsCodeCache.suffix_template",
            f"{_CACHE}:_HEADER_DIR",
            f"{_GENERATED}:_torchinductor_pyobject_tensor_data_ptr",
            "torch._inductor.config:compile_threads",
            "torch._inductor.exc:CppCompileError",
        ),
    ),
    Use(
        "quick checks of instruction sets",
        "speed",
        "ask the C++ compiler about an instruction set in 20 ms",
        "Inductor asks by building a file with all vector headers for each: 6 CPU s a process",
        (
            "torch._inductor.cpu_vec_isa:VecISA.check_build(2)",
            "torch._inductor.cpu_vec_isa:VecISA.build_arch_flags(1)",
            "torch._inductor.cpp_builder:get_cpp_compiler(0)",
        ),
    ),
    Use(
        "instruction sets of the CPU",
        "words",
        "let another program take this CPU for one with AVX2 alone, in a benchmark",
        "bench vllm --isa avx2 raises UnsupportedTorch",
        (
            "torch.cpu:_is_avx512_supported(0)",
            "torch.cpu:_is_avx512_bf16_supported(0)",
            "torch.cpu:_is_amx_tile_supported(0)",
            "torch.cpu:_is_amx_fp16_supported(0)",
        ),
    ),
    Use(
        "whole files",
        "safety",
        "put libraries into Inductor's cache whole or not at all",
        "a compile that is killed may leave half a library there, which later ones fail on",
        (
            "torch._inductor.cpp_builder:CppBuilder.build(1)",
            "torch._inductor.cpp_builder:CppBuilder.get_target_file_path(1)",
            "torch._inductor.cpp_builder:CppBuilder@_output",
            "torch._inductor.cpp_builder:CppBuilder@_use_relative_path",
            f"{_CACHE}:_worker_compile_cpp(2)",
            f"{_CACHE}:LOCK_TIMEOUT",
            "torch.utils._filelock:FileLock",
        ),
    ),
    Use(
        "Inductor's C++ compiler",
        "speed",
        "build our kernels with the compiler that Inductor installs by conda",
        "CXX names it, else g++",
        (
            "torch._inductor.cpp_builder:get_cpp_compiler(0)",
            "torch._inductor.exc:InvalidCxxCompiler",
        ),
    ),
    Use(
        "the name of Inductor's C++ compiler",
        "speed",
        "build our kernels with the compiler that Inductor was configured for",
        "CXX names it, else g++",
        ("torch._inductor.config:cpp.cxx",),
    ),
    Use(
        "kept captures",
        "speed",
        "give who keeps what Dynamo captured, as vLLM does, a function that can be kept with it",
        "Dynamo runs at every start of vLLM; only pieces come from the store",
        ("torch._dynamo.aot_compile:SerializableCallable",),
    ),
    Use(
        "notes of passes",
        "words",
        "tell what a pass matched in a graph that came from Inductor's caches",
        "stats() does not count matches in such graphs",
        ("torch._dynamo.utils:counters",),
    ),
    Use(
        "oneDNN",
        "speed",
        "linear layers over weights in oneDNN's own layout",
        "the variant onednn is not offered",
        (
            "torch._C:_has_mkldnn",
            "torch.ops.mkldnn:_reorder_linear_weight",
            "torch.ops.mkldnn:_linear_pointwise",
            "torch.ops.mkldnn:_is_mkldnn_bf16_supported",
        ),
    ),
    # --- where they are asked for ------------------------------------------------------
    Use(
        "process groups",
        "needed",
        "collectives by the name of a process group",
        "raises UnsupportedTorch where collectives are used",
        (
            "torch._C._distributed_c10d:_resolve_process_group",
            "torch.distributed.distributed_c10d:_world",
            "torch.distributed:GroupName",
            "torch.ops._c10d_functional:all_reduce",
            "torch.ops._c10d_functional:reduce_scatter_tensor",
            "torch.ops._c10d_functional:all_gather_into_tensor",
            "torch.ops._c10d_functional:wait_tensor",
        ),
    ),
    Use(
        "baselines",
        "needed",
        "time torch.compile and max-autotune beside Splitpoint (bench)",
        "raises UnsupportedTorch where they are timed",
        (
            "torch._inductor.config:freezing",
            "torch._inductor.config:joint_custom_post_pass",
            "torch._inductor.config:max_autotune",
            "torch._inductor.config:max_autotune_gemm_backends",
            "torch._inductor.config:max_autotune_report_choices_stats",
            "torch._inductor.select_algorithm:PRINT_AUTOTUNE",
            "torch._dynamo.eval_frame:remove_from_cache(1)",
        ),
    ),
)
