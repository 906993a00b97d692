# SPDX-License-Identifier: Apache-2.0
"""Every symbol of vLLM that this package builds on, and why.

A contract test reads the sources of a vLLM version, without importing it, and checks that each of
them is there with the names relied on. It also checks that ``adapter/`` imports nothing else. To
move to a new vLLM: run that test on its sources, then repair ``adapter/`` and this list together.
"""

from typing import NamedTuple

END_TO_END_VERSIONS = ("0.32.0",)
"""Versions that the whole test suite ran on."""

CONTRACT_VERSIONS = ("0.32.0", "0.33.0")
"""Versions whose sources satisfy this list."""


class Symbol(NamedTuple):
    """Something of vLLM.

    Attributes:
        module: where it is found; it may be imported there.
        name: qualified name inside the module.
        relies_on: of a function, parameters in this order; of a class or of an object, attributes.
        reason: what we do with it.
        exact: ``relies_on`` is the whole signature, ``self`` or ``cls`` included, because we
            override or wrap the function with that signature.
        returns: the annotated result, where its shape matters.
    """

    module: str
    name: str
    relies_on: tuple[str, ...]
    reason: str
    exact: bool = False
    returns: str | None = None


class Call(NamedTuple):
    """A call inside vLLM whose form we rely on.

    Attributes:
        module, caller: function that contains the call.
        callee: last name of what is called.
        keywords: passed by keyword.
        reason: what we do with it.
    """

    module: str
    caller: str
    callee: str
    keywords: tuple[str, ...]
    reason: str


COMMAND_LINE = (
    Symbol(
        "vllm.engine.arg_utils",
        "EngineArgs",
        ("additional_config", "block_size", "worker_extension_cls"),
        "carry our settings to every process, choose small CPU blocks, make workers load us",
    ),
    Symbol(
        "vllm.engine.arg_utils",
        "EngineArgs.add_cli_args",
        ("parser",),
        "wrapped: adds our flags",
        exact=True,
    ),
    Symbol(
        "vllm.engine.arg_utils",
        "EngineArgs.from_cli_args",
        ("cls", "args"),
        "wrapped: moves our flags into additional_config",
        exact=True,
    ),
    Symbol(
        "vllm.engine.arg_utils",
        "EngineArgs.create_engine_config",
        (),
        "wrapped: checks the settings against the engine",
        returns="VllmConfig",
    ),
    Symbol("vllm.platforms", "current_platform", (), "tells whether this is the CPU build"),
    Symbol("vllm.platforms.interface", "Platform", ("is_cpu",), "see current_platform"),
)

CONFIGURATION = (
    Symbol(
        "vllm.config",
        "VllmConfig",
        (
            "additional_config",
            "attention_config",
            "cache_config",
            "compilation_config",
            "kv_transfer_config",
            "model_config",
            "parallel_config",
            "scheduler_config",
            "speculative_config",
            "use_v2_model_runner",
        ),
        "where the settings travel, and what compression cannot be combined with",
    ),
    Symbol(
        "vllm.config",
        "get_current_vllm_config_or_none",
        (),
        "the engine whose layers are being built",
    ),
    Symbol(
        "vllm.config",
        "ModelConfig",
        ("is_encoder_decoder", "max_model_len", "runner_type", "use_mla"),
        "refusals; widest block table",
    ),
    Symbol(
        "vllm.config",
        "ParallelConfig",
        (
            "decode_context_parallel_size",
            "pipeline_parallel_size",
            "prefill_context_parallel_size",
            "rank",
            "use_ubatching",
        ),
        "refusals; the first rank counts",
    ),
    Symbol(
        "vllm.config",
        "CacheConfig",
        ("block_size", "cache_dtype", "kv_sharing_fast_prefill"),
        "refusals",
    ),
    Symbol("vllm.config", "SchedulerConfig", ("max_num_seqs",), "size of per-request state"),
    Symbol(
        "vllm.config",
        "CompilationConfig",
        ("max_cudagraph_capture_size",),
        "size of FlashAttention's buffers for a virtual batch",
    ),
    Symbol("vllm.config", "AttentionConfig", ("use_non_causal",), "refusals"),
)

SCHEDULER = (
    Symbol(
        "vllm.v1.core.kv_cache_manager",
        "KVCacheManager",
        ("kv_cache_config", "num_kv_cache_groups"),
        "finds the compressed group",
    ),
    Symbol(
        "vllm.v1.core.kv_cache_manager",
        "KVCacheManager.get_computed_blocks",
        ("self", "request"),
        "wrapped: caps prefix-cache hits, because compaction writes into the blocks behind the cap",
        returns="tuple[KVCacheBlocks, int, int]",
    ),
    Symbol(
        "vllm.v1.core.single_type_kv_cache_manager",
        "FullAttentionManager",
        ("block_pool", "req_to_blocks"),
        "base of our manager",
    ),
    Symbol(
        "vllm.v1.core.single_type_kv_cache_manager",
        "FullAttentionManager.__init__",
        ("self", "kv_cache_spec"),
        "overridden: reads our spec",
    ),
    Symbol(
        "vllm.v1.core.single_type_kv_cache_manager",
        "FullAttentionManager.remove_skipped_blocks",
        ("self", "request_id", "processed_computed_tokens", "num_prompt_tokens"),
        "overridden: frees the blocks that compaction emptied",
        exact=True,
    ),
    Symbol(
        "vllm.v1.core.single_type_kv_cache_manager",
        "FullAttentionManager._remove_blocks_in_range",
        ("self", "request_id", "first_block", "last_block"),
        "replaces freed blocks by null blocks, as sliding windows do",
        exact=True,
    ),
    Symbol(
        "vllm.v1.core.single_type_kv_cache_manager",
        "FullAttentionManager.cache_blocks",
        ("self", "request", "num_tokens"),
        "overridden: keeps private blocks out of the prefix cache",
    ),
    Symbol(
        "vllm.v1.core.single_type_kv_cache_manager",
        "FullAttentionManager.find_longest_cache_hit",
        ("cls", "block_hashes", "max_length"),
        "overridden: applies the cap",
    ),
    Symbol("vllm.v1.core.block_pool", "BlockPool", ("get_num_free_blocks",), "counts freed blocks"),
    Symbol("vllm.v1.core.kv_cache_utils", "KVCacheBlock", ("is_null",), "blocks freed before"),
    Symbol("vllm.v1.request", "Request", ("num_prompt_tokens",), "the plan follows from it"),
    Symbol(
        "vllm.v1.kv_cache_spec_registry",
        "KVCacheSpecRegistry.register",
        ("cls", "kvcache_spec_cls", "manager_class", "uniform_type_base_spec"),
        "joins our spec and our manager",
    ),
    Symbol(
        "vllm.v1.kv_cache_spec_registry",
        "KVCacheSpecRegistry._ensure_registered",
        ("cls",),
        "vLLM's own specs must be registered first",
    ),
    Symbol(
        "vllm.v1.kv_cache_interface",
        "FullAttentionSpec",
        ("block_size", "num_kv_heads"),
        "base of our spec",
    ),
    Symbol(
        "vllm.v1.kv_cache_interface",
        "FullAttentionSpec.merge",
        ("cls", "specs"),
        "overridden: it would drop our fields",
        exact=True,
    ),
    Symbol(
        "vllm.v1.kv_cache_interface",
        "UniformTypeKVCacheSpecs",
        ("kv_cache_specs",),
        "refused: layers of different shapes in one group",
    ),
    Symbol("vllm.v1.kv_cache_interface", "KVCacheConfig", ("kv_cache_groups",), "finds our group"),
    Symbol("vllm.v1.kv_cache_interface", "KVCacheGroupSpec", ("kv_cache_spec",), "finds our group"),
    Symbol(
        "vllm.v1.kv_cache_interface",
        "KVCacheLayout",
        ("LBHNC",),
        "blocks, then heads, then tokens: the layout that has head pages",
    ),
)

BACKENDS = (
    Symbol(
        "vllm.model_executor.layers.attention.attention",
        "get_attn_backend",
        ("attn_type", "has_sliding_window"),
        "wrapped: gives full-attention layers our subclass of their backend",
    ),
    Symbol(
        "vllm.model_executor.models.utils",
        "extract_layer_index",
        ("layer_name",),
        "order of layers",
    ),
    Symbol(
        "vllm.v1.attention.backend",
        "AttentionBackend.get_name",
        (),
        "tells whether we have a subclass",
    ),
    Symbol("vllm.v1.attention.backend", "AttentionType", ("DECODER",), "layers we compress"),
    Symbol(
        "vllm.v1.attention.backend",
        "AttentionBackend.customize_spec",
        ("cls", "spec"),
        "overridden: turns the layer's spec into ours",
        exact=True,
    ),
    Symbol(
        "vllm.v1.attention.backend",
        "AttentionBackend.supported_kv_cache_layouts",
        ("cls",),
        "overridden: asks for head pages",
        exact=True,
    ),
    Symbol(
        "vllm.v1.attention.backend",
        "AttentionCGSupport",
        ("UNIFORM_SINGLE_TOKEN_DECODE",),
        "full graphs hold decode steps only",
    ),
    Symbol(
        "vllm.v1.attention.backend",
        "CommonAttentionMetadata",
        (
            "block_table_tensor",
            "is_prefilling",
            "max_query_len",
            "max_seq_len",
            "num_actual_tokens",
            "num_reqs",
            "query_start_loc",
            "query_start_loc_cpu",
            "req_idx",
            "seq_lens",
            "seq_lens_cpu_upper_bound",
        ),
        "rewritten into the natural and the virtual part of a batch",
    ),
    Symbol(
        "vllm.v1.attention.backend",
        "AttentionMetadataBuilder",
        ("device", "layer_names", "supports_update_block_table"),
        "base of our builders",
    ),
    Symbol(
        "vllm.v1.attention.backend",
        "AttentionMetadataBuilder.__init__",
        ("self", "kv_cache_spec", "layer_names", "vllm_config", "device"),
        "overridden; also called for the builder of virtual batches",
        exact=True,
    ),
    Symbol(
        "vllm.v1.attention.backend",
        "AttentionMetadataBuilder.build",
        ("self", "common_prefix_len", "common_attn_metadata", "fast_build"),
        "overridden: splits the batch",
        exact=True,
    ),
    Symbol(
        "vllm.v1.attention.backend",
        "AttentionMetadataBuilder.build_for_cudagraph_capture",
        ("self", "common_attn_metadata"),
        "overridden: captures a virtual batch",
        exact=True,
    ),
    Symbol(
        "vllm.v1.attention.backend",
        "AttentionMetadataBuilder.get_cudagraph_support",
        ("cls", "vllm_config", "kv_cache_spec"),
        "overridden: see AttentionCGSupport",
        exact=True,
    ),
    Symbol(
        "vllm.v1.attention.backend",
        "AttentionImpl",
        ("head_size", "num_heads", "num_kv_heads", "scale"),
        "base of our implementations",
    ),
    Symbol(
        "vllm.utils.torch_utils",
        "async_tensor_h2d",
        ("data", "device"),
        "uploads index arrays without waiting",
    ),
    Symbol("vllm.logger", "init_logger", ("name",), "banner and interval line"),
    Symbol("vllm.logger", "_VllmLogger", ("info_once",), "banner"),
)

_IMPL_ATTRIBUTES = (
    "alibi_slopes",
    "head_size",
    "kv_sharing_target_layer_name",
    "logits_soft_cap",
    "num_heads",
    "num_kv_heads",
    "num_queries_per_kv",
    "scale",
    "sinks",
)
_FORWARD = (
    "self",
    "layer",
    "query",
    "key",
    "value",
    "kv_cache",
    "attn_metadata",
    "output",
    "output_scale",
    "output_block_scale",
)

CPU = (
    Symbol(
        "vllm.v1.attention.backends.cpu_attn",
        "CPUAttentionBackend",
        ("get_builder_cls", "get_impl_cls"),
        "base of our backend",
    ),
    Symbol(
        "vllm.v1.attention.backends.cpu_attn",
        "CPUAttentionBackendImpl",
        _IMPL_ATTRIBUTES,
        "base of our implementation",
    ),
    Symbol(
        "vllm.v1.attention.backends.cpu_attn",
        "CPUAttentionBackendImpl.forward",
        _FORWARD,
        "overridden, and called with one KV head",
        exact=True,
    ),
    Symbol(
        "vllm.v1.attention.backends.cpu_attn",
        "CPUAttentionMetadataBuilder",
        ("block_size", "dtype", "head_dim", "isa", "num_heads", "num_kv_heads"),
        "base of our builder",
    ),
    Symbol(
        "vllm._custom_ops",
        "cpu_attn_reshape_and_cache",
        ("key", "value", "key_cache", "value_cache", "slot_mapping", "isa"),
        "shows where the kernel keeps each element of a page",
        exact=True,
    ),
)

CUDA = (
    Symbol(
        "vllm.v1.attention.backends.flash_attn",
        "FlashAttentionBackend",
        ("get_builder_cls", "get_impl_cls"),
        "base of our backend",
    ),
    Symbol(
        "vllm.v1.attention.backends.flash_attn",
        "FlashAttentionImpl",
        _IMPL_ATTRIBUTES,
        "base of our implementation",
    ),
    Symbol(
        "vllm.v1.attention.backends.flash_attn",
        "FlashAttentionImpl.forward",
        _FORWARD,
        "overridden, and called with one KV head",
        exact=True,
    ),
    Symbol(
        "vllm.v1.attention.backends.flash_attn",
        "FlashAttentionMetadataBuilder",
        ("block_size", "headdim", "num_heads_q"),
        "base of our builder",
    ),
)

WORKER = (
    Symbol(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner",
        ("input_batch", "vllm_config"),
        "runner V1: rows of a step",
    ),
    Symbol(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner.execute_model",
        ("self", "scheduler_output"),
        "wrapped: knows which requests run and which have left",
    ),
    Symbol(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner.initialize_kv_cache",
        ("self", "kv_cache_config"),
        "wrapped: an engine that would not compress must stop",
    ),
    Symbol(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._determine_batch_execution_and_padding",
        (
            "self",
            "num_tokens",
            "num_reqs",
            "num_scheduled_tokens_np",
            "force_uniform_decode",
        ),
        "wrapped: keeps steps that need our Python out of full graphs",
    ),
    Symbol(
        "vllm.v1.worker.gpu_input_batch",
        "InputBatch",
        ("num_computed_tokens_cpu", "num_prompt_tokens", "num_reqs", "req_ids"),
        "runner V1: facts of each row",
    ),
    Symbol(
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner",
        ("req_states", "vllm_config"),
        "runner V2: rows of a step",
    ),
    Symbol(
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner.execute_model",
        ("self", "scheduler_output", "intermediate_tensors", "dummy_run"),
        "wrapped: knows which requests run and which have left",
    ),
    Symbol(
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner.initialize_kv_cache",
        ("self", "kv_cache_config"),
        "wrapped: an engine that would not compress must stop",
    ),
    Symbol(
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner.gather_batch_req_state",
        ("self", "scheduler_output", "dummy_run"),
        "wrapped: keeps steps that need our Python out of full graphs",
        exact=True,
        returns="tuple['BatchReqState | None', int | None]",
    ),
    Symbol(
        "vllm.v1.worker.gpu.model_runner",
        "BatchReqState",
        ("decode_graph_eligible", "idx_mapping_np", "num_scheduled_tokens"),
        "the rows of a step, and the switch for full graphs",
    ),
    Symbol(
        "vllm.v1.worker.gpu.states",
        "RequestState",
        ("index_to_req_id", "num_computed_tokens_np", "prompt_len"),
        "runner V2: facts of each row",
    ),
    Symbol(
        "vllm.v1.core.sched.output",
        "SchedulerOutput",
        ("finished_req_ids", "preempted_req_ids", "scheduled_new_reqs"),
        "requests that leave or come back",
    ),
    Symbol("vllm.v1.core.sched.output", "NewRequestData", ("req_id",), "requests that come back"),
)

METRICS = (
    Symbol(
        "vllm.v1.metrics.prometheus",
        "get_prometheus_registry",
        (),
        "wrapped: several API servers make a fresh registry for each answer",
        exact=True,
    ),
)

SYMBOLS = (
    *COMMAND_LINE,
    *CONFIGURATION,
    *SCHEDULER,
    *BACKENDS,
    *CPU,
    *CUDA,
    *WORKER,
    *METRICS,
)

CALLS = (
    Call(
        "vllm.model_executor.layers.attention.attention",
        "Attention.__init__",
        "get_attn_backend",
        ("attn_type", "has_sliding_window"),
        "selection tells the layers apart by these",
    ),
    Call(
        "vllm.v1.core.kv_cache_manager",
        "KVCacheManager.allocate_slots",
        "remove_skipped_blocks",
        ("num_prompt_tokens",),
        "our manager plans from the prompt length",
    ),
    Call(
        "vllm.v1.core.kv_cache_coordinator",
        "UnitaryKVCacheCoordinator.find_longest_cache_hit",
        "find_longest_cache_hit",
        ("block_hashes", "max_length"),
        "our manager lowers max_length",
    ),
)
