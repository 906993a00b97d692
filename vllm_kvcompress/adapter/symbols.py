# SPDX-License-Identifier: Apache-2.0
"""Every symbol of vLLM that this package builds on, and why.

A contract test reads the sources of a vLLM version, without importing it, and checks that each of
them is there with the names relied on, and that ``adapter/`` imports nothing else. To move to a new
vLLM, run that test on its sources, then repair ``adapter/`` and this list together.
"""

from vllm_kvcompress.adapter.symbol import Call, Symbol, Use
from vllm_kvcompress.adapter.symbol import symbols_of as _symbols

END_TO_END_VERSIONS = ("0.32.0",)
"""Versions that the whole test suite ran on."""

CONTRACT_VERSIONS = ("0.32.0", "0.33.0")
"""Versions whose sources satisfy this list."""


_COMMAND_LINE = (
    *_symbols(
        "vllm.engine.arg_utils",
        ("EngineArgs", Use.HELD, "additional_config block_size",
         "carries our config to every process, chooses CPU blocks"),
        ("EngineArgs.add_cli_args", Use.REPLACED, "parser", "adds our flags"),
        ("EngineArgs.from_cli_args", Use.REPLACED, "cls args", "moves them to additional_config"),
        ("EngineArgs.create_model_config", Use.CALLED, "self", "sizes of a model without weights"),
        ("EngineArgs.create_engine_config", Use.WRAPPED, "self", "checks our config against engine",
         "VllmConfig"),
    ),
    *_symbols("vllm.utils.argparse_utils",
              ("FlexibleArgumentParser", Use.HELD, "parse_args", "reads flags without a server")),
    *_symbols("vllm.platforms", ("current_platform", Use.HELD, "", "is this the CPU build?")),
    *_symbols("vllm.platforms.interface",
              ("Platform", Use.HELD,
               "device_type get_device_capability get_device_name is_cpu is_cuda is_cuda_alike "
               "is_rocm", "current_platform"),
              ("DeviceCapability", Use.HELD, "to_int", "float8 needs one")),
    *_symbols(
        "vllm.v1.engine.input_processor",
        ("InputProcessor", Use.HELD, "vllm_config", "is this engine compressing?"),
        ("InputProcessor.process_inputs", Use.WRAPPED, "self request_id prompt params resumable",
         "refuses prompts that grow, and what requests cannot choose"),
    ),
    *_symbols(
        "vllm.v1.engine.async_llm",
        ("AsyncLLM", Use.HELD, "vllm_config", "is this engine compressing?"),
        ("AsyncLLM.generate", Use.WRAPPED, "self prompt sampling_params",
         "refuses what requests cannot choose before a server answers"),
    ),
    *_symbols(
        "vllm.v1.engine.core",
        ("EngineCore", Use.HELD, "vllm_config", "is this engine compressing?"),
        ("EngineCore.preprocess_add_request", Use.REPLACED, "self request",
         "refuses requests of other front ends", "tuple[Request, int]"),
    ),
    *_symbols("vllm.v1.engine", ("EngineCoreRequest", Use.HELD, "sampling_params", "its wishes")),
    *_symbols("vllm.sampling_params", ("SamplingParams", Use.HELD, "extra_args", "the same")),
    *_symbols("vllm.exceptions",
              ("VLLMValidationError", Use.HELD, "", "servers answer with HTTP 400"),
              ("VLLMValidationError.__init__", Use.CALLED, "self message parameter",
               "names the key that is refused")),
)  # fmt: skip

_REGISTRY = _symbols(
    "vllm.model_executor.models.registry",
    ("ModelRegistry", Use.HELD, "", "modules of all architectures"),
    ("_TEXT_GENERATION_MODELS", Use.HELD, "", "what the table of models has rows for"),
    ("_MULTIMODAL_MODELS", Use.HELD, "", "the same"),
    ("_TRANSFORMERS_SUPPORTED_MODELS", Use.HELD, "", "the same"),
    ("_LazyRegisteredModel", Use.HELD, "module_name", "where an architecture's source is"),
)

_CONFIGURATION = _symbols(
    "vllm.config",
    ("VllmConfig", Use.HELD,
     "additional_config attention_config cache_config compilation_config device_config "
     "kv_transfer_config lora_config model_config num_speculative_tokens parallel_config "
     "scheduler_config speculative_config use_v2_model_runner",
     "where our config travels; compatibility"),
    ("get_current_vllm_config", Use.CALLED, "", "the engine whose layers are being built"),
    ("get_current_vllm_config_or_none", Use.CALLED, "", "the same, where there may be none"),
    ("ModelConfig", Use.HELD,
     "architectures dtype hf_config hf_text_config is_attention_free is_diffusion "
     "is_encoder_decoder is_hybrid is_mm_prefix_lm max_model_len quantization runner_type "
     "served_model_name use_mla uses_alibi",
     "compatibility; labels of metrics"),
    ("ModelConfig.get_total_num_hidden_layers", Use.CALLED, "self", "sizes of a model"),
    ("ModelConfig.get_total_num_kv_heads", Use.CALLED, "self",
     "budgets that span heads count those of all ranks"),
    ("ModelConfig.get_head_size", Use.CALLED, "self", "compatibility"),
    ("ModelConfig.get_num_attention_heads", Use.HELD, "", "a builder's copy says that of a group"),
    ("ModelConfig.get_num_kv_heads", Use.HELD, "", "a builder's copy says one"),
    ("ModelConfig.get_hidden_size", Use.CALLED, "self", "bytes kept per prompt"),
    ("ParallelConfig", Use.HELD,
     "data_parallel_index decode_context_parallel_size pipeline_parallel_size "
     "prefill_context_parallel_size rank tensor_parallel_size use_ubatching worker_cls "
     "worker_extension_cls",
     "compatibility; the first rank counts; a rank's heads; names our worker and what it answers "
     "to; labels of metrics"),
    ("CacheConfig", Use.HELD,
     "block_size cache_dtype kv_cache_dtype_skip_layers kv_sharing_fast_prefill", "compatibility"),
    ("SchedulerConfig", Use.HELD,
     "async_scheduling disable_hybrid_kv_cache_manager max_num_seqs scheduler_cls",
     "names our scheduler; size of per-request state"),
    ("CompilationConfig", Use.HELD,
     "cudagraph_capture_sizes cudagraph_mode max_cudagraph_capture_size static_forward_context",
     "buffers of a per-head batch; the layers and their caches"),
    ("AttentionConfig", Use.HELD, "backend backend_per_kind use_non_causal", "compatibility"),
    ("DeviceConfig", Use.HELD, "device device_type", "where buffers are; are there kernels?"),
)  # fmt: skip

_SCHEDULER = (
    *_symbols(
        "vllm.v1.core.kv_cache_manager",
        ("KVCacheManager", Use.HELD, "coordinator num_kv_cache_groups usage",
         "base of ours; finds our manager; the pressure policy"),
        ("KVCacheManager.get_computed_blocks", Use.WRAPPED, "self request",
         "caps prefix-cache hits: compaction writes into the blocks behind the cap",
         "tuple[KVCacheBlocks, int, int]"),
        ("KVCacheManager.allocate_slots", Use.WRAPPED, "self request new_computed_blocks",
         "compresses before anybody is preempted"),
        ("KVCacheBlocks", Use.HELD, "blocks", "does a hit end at a state of this step?"),
    ),
    *_symbols("vllm.v1.core.kv_cache_coordinator",
              ("KVCacheCoordinator", Use.HELD, "single_type_managers", "finds our manager")),
    *_symbols(
        "vllm.v1.core.sched.scheduler",
        ("Scheduler", Use.HELD,
         "kv_cache_manager max_model_len need_mamba_block_aligned_split running vllm_config",
         "base of ours; turns on the one hook that ends a step at a chosen position"),
        ("Scheduler.schedule", Use.WRAPPED, "self", "decides who is compressed"),
        ("Scheduler.update_from_output", Use.REPLACED,
         "self scheduler_output model_runner_output", "tells which drafts were rejected"),
        ("Scheduler.get_request_counts", Use.CALLED, "self",
         "that hook is off while it has nothing to do", "tuple[int, int]"),
        ("Scheduler._free_request", Use.WRAPPED, "self request",
         "tells a client what has become of its request",
         "tuple[dict[str, Any] | None, dict[str, Any] | None]"),
        ("Scheduler._mamba_block_aligned_split", Use.REPLACED,
         "self request num_new_tokens num_new_local_computed_tokens num_external_computed_tokens",
         "that hook", "int"),
    ),
    *_symbols("vllm.v1.core.sched.async_scheduler",
              ("AsyncScheduler", Use.HELD, "", "base of ours")),
    *_symbols("vllm.v1.outputs", ("ModelRunnerOutput", Use.HELD,
              "req_id_to_index sampled_token_ids", "tells which drafts were rejected")),
    *_symbols(
        "vllm.v1.core.single_type_kv_cache_manager",
        ("FullAttentionManager", Use.HELD, "block_pool req_to_blocks", "base of our manager"),
        ("FullAttentionManager.__init__", Use.WRAPPED, "self kv_cache_spec", "reads our spec"),
        ("FullAttentionManager.pop_blocks_for_free", Use.REPLACED, "self request_id",
         "the request's plan goes with its blocks", "list[KVCacheBlock]"),
        ("FullAttentionManager._remove_blocks_in_range", Use.CALLED,
         "self request_id first_block last_block", "puts null blocks in their place"),
        ("FullAttentionManager.cache_blocks", Use.WRAPPED, "self request num_tokens",
         "keeps private blocks out of the prefix cache"),
        ("FullAttentionManager.find_longest_cache_hit", Use.WRAPPED, "cls block_hashes max_length",
         "applies the cap"),
        ("MambaManager", Use.HELD, "cached_blocks_this_step", "who waits for a state, not blocks"),
    ),
    *_symbols("vllm.v1.core.block_pool",
              ("BlockPool", Use.HELD, "get_num_free_blocks", "counts freed blocks")),
    *_symbols("vllm.v1.core.kv_cache_utils",
              ("KVCacheBlock", Use.HELD, "block_hash block_id is_null ref_cnt", "held by prompts")),
    *_symbols("vllm.v1.request",
              ("Request", Use.HELD,
               "is_prefill_chunk max_tokens mm_features num_computed_tokens "
               "num_output_placeholders num_prompt_tokens request_id sampling_params",
               "its plan follows from length and images; will it go on?")),
    *_symbols(
        "vllm.multimodal.inputs",
        ("MultiModalFeatureSpec", Use.HELD, "mm_position modality data", "images of a prompt"),
        ("PlaceholderRange.extract_embeds_range", Use.CALLED, "self",
         "visual tokens, without the text that wraps them; both ends included",
         "list[tuple[int, int]]"),
    ),
    *_symbols(
        "vllm.v1.kv_cache_spec_registry",
        ("KVCacheSpecRegistry.register", Use.CALLED,
         "cls kvcache_spec_cls manager_class uniform_type_base_spec", "joins spec and manager"),
        ("KVCacheSpecRegistry._ensure_registered", Use.CALLED, "cls", "vLLM's own come first"),
    ),
    *_symbols(
        "vllm.v1.kv_cache_interface",
        ("FullAttentionSpec", Use.HELD, "block_size non_causal num_kv_heads", "base of our spec"),
        ("FullAttentionSpec.merge", Use.REPLACED, "cls specs", "it would drop our fields"),
        *((f"{kind}Spec", Use.HELD, "", "layers that may stand beside ours")
          for kind in ("SlidingWindow", "ChunkedLocalAttention", "Mamba")),
        ("KVCacheConfig", Use.HELD, "kv_cache_groups", "finds our group"),
        ("KVCacheGroupSpec", Use.HELD, "kv_cache_spec", "finds our group"),
        ("KVCacheSpec", Use.HELD, "block_size", "what workers say of their layers"),
        ("KVCacheLayout", Use.HELD, "LBHNC", "blocks, heads, tokens: has head pages"),
        ("is_quantized_kv_cache", Use.CALLED, "kv_cache_dtype", "which caches are numbers"),
    ),
)  # fmt: skip

_ATTENTION = (
    *_symbols(
        "vllm.model_executor.layers.attention.attention",
        ("get_attn_backend", Use.WRAPPED,
         "head_size dtype kv_cache_dtype has_sink use_mm_prefix use_per_head_quant_scales "
         "attn_type has_sliding_window",
         "gives full-attention layers our subclass of their backend"),
        ("Attention", Use.HELD,
         "attn_backend head_size kv_cache kv_sharing_target_layer_name num_heads num_kv_heads",
         "caches of all layers, and what specs tell of them"),
        ("Attention.forward", Use.WRAPPED, "self query", "while a layer is tried at start"),
    ),
    *_symbols("vllm.model_executor.layers.linear",
              ("QKVParallelLinear", Use.HELD, "total_num_kv_heads", "heads of all ranks"),
              ("RowParallelLinear", Use.HELD, "input_size_per_partition params_dtype quant_method",
               "output projections, whose method we apply")),
    *_symbols("vllm.model_executor.models.utils",
              ("extract_layer_index", Use.CALLED, "layer_name", "order of layers")),
    *_symbols(
        "vllm.v1.attention.backend",
        ("AttentionType", Use.HELD, "DECODER", "the layers that are compressed"),
        ("AttentionLayer", Use.HELD, "_k_scale _k_scale_float _q_scale_float _v_scale_float",
         "scales of a float8 cache, copies on the host included"),
        ("AttentionBackend", Use.HELD, "get_name", "do we have a subclass?"),
        ("AttentionBackend.validate_configuration", Use.CALLED,
         "cls head_size dtype kv_cache_dtype block_size use_mla has_sink use_sparse use_mm_prefix "
         "use_per_head_quant_scales device_capability attn_type", "what it can serve"),
        ("AttentionBackend.customize_spec", Use.REPLACED, "cls spec", "makes the spec ours"),
        ("AttentionBackend.get_supported_kernel_block_sizes", Use.REPLACED, "kv_cache_spec",
         "splits the large blocks of hybrids", "list[int | MultipleOf]"),
        ("MultipleOf", Use.HELD, "base", "sizes that a backend takes"),
        ("AttentionBackend.supported_kv_cache_layouts", Use.REPLACED, "cls", "head pages"),
        ("AttentionCGSupport", Use.HELD, "UNIFORM_BATCH", "full graphs decode, or verify drafts"),
        ("CommonAttentionMetadata", Use.HELD,
         "block_table_tensor is_prefilling max_query_len max_seq_len num_actual_tokens num_reqs "
         "query_start_loc query_start_loc_cpu req_idx seq_lens seq_lens_cpu_upper_bound",
         "rewritten for uncompressed requests and for the per-head batch"),
        ("AttentionMetadataBuilder", Use.HELD, "device layer_names supports_update_block_table "
         "supports_draft_decode_metadata_update", "base of our builders"),
        ("AttentionMetadataBuilder.build_for_cudagraph_capture", Use.REPLACED,
         "self common_attn_metadata", "full graphs run a per-head batch"),
        ("AttentionMetadataBuilder.get_cudagraph_support", Use.REPLACED,
         "cls vllm_config kv_cache_spec", "see AttentionCGSupport"),
    ),
    *_symbols("vllm.distributed.parallel_state",
              ("get_tensor_model_parallel_rank", Use.CALLED, "", "a rank's heads"),
              ("get_tensor_model_parallel_world_size", Use.CALLED, "", "means over all heads"),
              ("get_tp_group", Use.CALLED, "", "means over all heads")),
    *_symbols("vllm.utils.torch_utils",
              ("async_tensor_h2d", Use.CALLED, "data device", "uploads without waiting")),
    *_symbols("vllm.logger",
              ("init_logger", Use.CALLED, "name", "banner and interval line"),
              ("_VllmLogger", Use.HELD, "info_once", "banner")),
)  # fmt: skip


def _platform(
    module: str, backend: str, impl: str, builder: str, builder_attributes: str
) -> tuple[Symbol, ...]:
    """What the classes of one attention backend must offer."""
    return _symbols(
        module,
        (backend, Use.HELD, "get_builder_cls get_impl_cls", "base of our backend"),
        (impl, Use.HELD,
         "alibi_slopes head_size kv_cache_dtype kv_sharing_target_layer_name logits_soft_cap "
         "num_heads num_kv_heads num_queries_per_kv scale sinks", "base of our implementation"),
        (f"{impl}.forward", Use.REPLACED,
         "self layer query key value kv_cache attn_metadata output output_scale "
         "output_block_scale", "also called with one KV head"),
        (builder, Use.HELD, builder_attributes, "base of our builder"),
        (f"{builder}.__init__", Use.REPLACED,
         "self kv_cache_spec layer_names vllm_config device", "also makes per-head builders"),
        (f"{builder}.build", Use.REPLACED,
         "self common_prefix_len common_attn_metadata fast_build", "splits the batch"),
    )  # fmt: skip


_BACKENDS = (
    *_platform("vllm.v1.attention.backends.cpu_attn", "CPUAttentionBackend",
               "CPUAttentionBackendImpl", "CPUAttentionMetadataBuilder",
               "block_size dtype head_dim isa kv_cache_dtype num_heads num_kv_heads"),
    *_symbols("vllm._custom_ops", ("cpu_attn_reshape_and_cache", Use.CALLED,
              "key value key_cache value_cache slot_mapping isa k_scale v_scale kv_cache_dtype",
              "shows where the kernel keeps each element of a page")),
    *_platform("vllm.v1.attention.backends.flash_attn", "FlashAttentionBackend",
               "FlashAttentionImpl", "FlashAttentionMetadataBuilder", "block_size num_heads_q"),
    *_platform("vllm.v1.attention.backends.triton_attn", "TritonAttentionBackend",
               "TritonAttentionImpl", "TritonAttentionMetadataBuilder", "block_size num_heads_q"),
    *_symbols("vllm.v1.attention.backends.triton_attn",
              ("TritonAttentionImpl.fused_output_quant_supported", Use.REPLACED, "self quant_key",
               "outputs are put together before they are quantized"),
              ("TritonAttentionImpl.fused_rope_kvcache_supported", Use.REPLACED, "self",
               "methods may look at what goes into RoPE")),
)  # fmt: skip

_WORKER = (
    *_symbols(
        "vllm.v1.worker.gpu_model_runner",
        ("GPUModelRunner", Use.HELD, "attn_groups input_batch requests",
         "runner V1: order of a batch, and its requests"),
        ("GPUModelRunner._determine_batch_execution_and_padding", Use.WRAPPED,
         "self num_tokens num_reqs force_uniform_decode",
         "keeps steps that need our Python out of full graphs"),
    ),
    *_symbols("vllm.v1.worker.utils", ("AttentionGroup.get_metadata_builder", Use.CALLED,
              "self ubatch_id", "block size that kernels see")),
    *_symbols(
        "vllm.v1.worker.gpu_input_batch",
        ("InputBatch", Use.HELD, "num_reqs req_ids", "runner V1: order of a batch"),
        ("CachedRequestState", Use.HELD, "lora_request", "runner V1: a request's adapter"),
    ),
    *_symbols(
        "vllm.v1.worker.gpu.model_runner",
        ("GPUModelRunner", Use.HELD, "attn_groups lora_state req_states",
         "runner V2: order of a batch, and its adapters"),
        ("GPUModelRunner.gather_batch_req_state", Use.REPLACED, "self scheduler_output dummy_run",
         "keeps steps that need our Python out of full graphs",
         "tuple['BatchReqState | None', int | None]"),
        ("BatchReqState", Use.HELD, "decode_graph_eligible", "the switch for full graphs"),
    ),
    *_symbols("vllm.v1.worker.gpu.states",
              ("RequestState", Use.HELD, "index_to_req_id", "runner V2: order of a batch")),
    *_symbols(
        "vllm.v1.worker.gpu_worker",
        ("Worker", Use.HELD, "device model_config model_runner vllm_config", "base of ours"),
        ("Worker.load_model", Use.REPLACED, "self load_dummy_weights", "reports refusals"),
        ("Worker.get_kv_cache_spec", Use.REPLACED, "self",
         "hooks attention inputs, and holds memory while vLLM measures what the model takes"),
        ("Worker.initialize_from_config", Use.REPLACED, "self kv_cache_config",
         "an engine that would not compress must stop"),
        ("Worker.execute_model", Use.REPLACED, "self scheduler_output", "compresses first"),
    ),
    *_symbols("vllm.v1.worker.cpu_worker", ("CPUWorker", Use.HELD, "", "base of ours")),
    *_symbols("vllm.v1.worker.cpu_model_runner",
              ("CPUModelRunner", Use.HELD, "", "runner V1 on a CPU"),
              ("CPUModelRunner._zero_block_ids", Use.WRAPPED, "self block_ids", "see cpu_worker")),
    *_symbols(
        "vllm.v1.core.sched.output",
        ("SchedulerOutput", Use.HELD,
         "finished_req_ids num_scheduled_tokens preempted_req_ids scheduled_cached_reqs "
         "scheduled_new_reqs scheduled_spec_decode_tokens",
         "requests of a step, and those that leave or come back; their drafts"),
        ("NewRequestData", Use.HELD, "num_computed_tokens req_id", "requests that come (back)"),
        ("CachedRequestData", Use.HELD, "num_computed_tokens req_ids resumed_req_ids",
         "requests that go on or come back"),
    ),
)  # fmt: skip

_ADAPTERS = (
    *_symbols("vllm.lora.layers",
              ("LoRAMapping", Use.HELD, "index_mapping prompt_mapping is_prefill", "no request")),
    *_symbols("vllm.lora.layers.base_linear", ("BaseLinearLayerWithLoRA", Use.HELD,
              "base_layer lora_a_stacked lora_b_stacked output_slices", "projects our own rows")),
    *_symbols("vllm.lora.request", ("LoRARequest", Use.HELD, "lora_int_id", "of a request")),
    *_symbols("vllm.lora.worker_manager",
              ("WorkerLoRAManager", Use.HELD, "_adapter_manager", "where adapters are"),
              ("WorkerLoRAManager.set_active_adapters", Use.CALLED, "self requests mapping",
               "brings those back that are not")),
    *_symbols("vllm.lora.model_manager",
              ("LoRAModelManager", Use.HELD, "lora_index_to_id", "where adapters are")),
    *_symbols("vllm.v1.worker.gpu.lora_utils", ("LoraState", Use.HELD, "lora_requests", "of V2")),
)  # fmt: skip

_QUESTION = (
    *_symbols("vllm.entrypoints.llm",
              ("LLM", Use.HELD, "chat collective_rpc get_default_sampling_params llm_engine",
               "asks one question, and its workers how they compressed"),
              ("LLM.chat", Use.CALLED, "self messages sampling_params use_tqdm", "the same"),
              ("LLM.collective_rpc", Use.CALLED, "self method args", "the same")),
    *_symbols("vllm.v1.engine.llm_engine",
              ("LLMEngine", Use.HELD, "engine_core", "an engine is ended when it has answered")),
    *_symbols("vllm.v1.engine.core_client", ("EngineCoreClient", Use.HELD, "shutdown", "the same")),
    *_symbols("vllm.entrypoints.serve.dev.rpc.api_router",
              ("collective_rpc", Use.HELD, "", "the same of a running server")),
)  # fmt: skip

SYMBOLS = (
    *_COMMAND_LINE, *_REGISTRY, *_CONFIGURATION, *_SCHEDULER, *_ATTENTION, *_BACKENDS, *_WORKER,
    *_ADAPTERS, *_QUESTION,
)  # fmt: skip

CALLS = (
    Call("vllm.model_executor.layers.attention.attention", "Attention.__init__",
         "get_attn_backend", ("attn_type", "has_sliding_window"),
         "selection tells the layers apart by these"),
    Call("vllm.v1.core.sched.scheduler", "Scheduler.schedule", "_mamba_block_aligned_split", (),
         "requests that return from preemption stop where they were compressed"),
    Call("vllm.v1.core.sched.scheduler", "Scheduler.schedule", "allocate_slots",
         ("new_computed_blocks",), "tells who waits for a state from who waits for blocks"),
    Call("vllm.v1.core.kv_cache_coordinator", "UnitaryKVCacheCoordinator.find_longest_cache_hit",
         "find_longest_cache_hit", ("block_hashes", "max_length"),
         "our manager lowers max_length"),
    Call("vllm.v1.core.sched.scheduler", "Scheduler.update_from_output", "_free_request", (),
         "what this returns goes to the client"),
    Call("vllm.v1.engine.core", "EngineCoreProc.process_input_sockets", "preprocess_add_request",
         (), "an exception there ends one request"),
    Call("vllm.entrypoints.openai.chat_completion.serving",
         "OpenAIServingChat._create_chat_completion", "generate", (),
         "is called before the answer begins"),
    Call("vllm.v1.engine.async_llm", "AsyncLLM._add_streaming_input_request", "process_inputs",
         ("resumable",), "tells prompts that grow"),
)  # fmt: skip
