# SPDX-License-Identifier: Apache-2.0
"""What compression cannot be combined with, and what the user can change.

Each entry of ``ENGINE_RULES`` and ``MODEL_RULES`` refuses one thing, as early as it shows: in the
configuration, or in a layer that vLLM has built. docs/compatibility.md is made from the same
entries, so whoever lifts a refusal deletes its entry and makes the page again.
"""

import importlib.util
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from vllm.config import VllmConfig
from vllm.model_executor.layers.attention.attention import Attention
from vllm.platforms import current_platform

from vllm_kvcompress import kernels
from vllm_kvcompress.adapter.cache_types import FLOAT8_TYPES, is_supported
from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError
from vllm_kvcompress.scoring import Need

WITHOUT = "serve the model without --kv-compression"

WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "vllm_kvcompress.adapter.cpu_worker.CompressedCPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": "vllm_kvcompress.adapter.worker.CompressedWorker",
}
"""vLLM's workers, and ours in their place."""

SCHEDULERS = {
    False: "vllm_kvcompress.adapter.scheduler.CompressedScheduler",
    True: "vllm_kvcompress.adapter.scheduler.CompressedAsyncScheduler",
}
"""Ours, by whether scheduling is asynchronous."""


class Engine:
    """What the rules look at.

    Attributes:
        vllm: the engine's configuration.
        config: of compression.
    """

    def __init__(self, vllm_config: VllmConfig, config: KVCompressionConfig) -> None:
        self.vllm, self.config = vllm_config, config
        self.model, self.parallel = vllm_config.model_config, vllm_config.parallel_config
        self.cache, self.scheduler = vllm_config.cache_config, vllm_config.scheduler_config

    @cached_property
    def text(self) -> dict[str, Any]:
        """What the checkpoint's configuration says of its language model."""
        return vars(self.model.hf_text_config)

    @property
    def layer_types(self) -> set[str]:
        """Kinds of attention layers, where the checkpoint names them."""
        return set(self.text.get("layer_types") or ())

    def is_one_of(self, architectures: Sequence[str]) -> bool:
        return not {*self.model.architectures}.isdisjoint(architectures)

    def values(self) -> dict[str, Any]:
        """What texts of rules may name."""
        speculation = self.vllm.speculative_config
        return {
            "budget": self.config.tokens_per_head,
            "window": self.config.window,
            "scorer": self.config.scorer,
            "block_size": self.cache.block_size,
            "cache_dtype": self.cache.cache_dtype,
            "max_model_len": self.model.max_model_len,
            "worker_cls": self.parallel.worker_cls,
            "scheduler_cls": self.scheduler.scheduler_cls,
            "drafter": None if speculation is None else speculation.method,
        }


class AttentionImpl(Protocol):
    """What a layer that vLLM has built shows of itself."""

    alibi_slopes: Any
    kv_cache_dtype: str
    sinks: Any


class Rule(NamedTuple):
    """One thing that is refused.

    Attributes:
        feature: its name.
        reason: why; may name ``Engine.values``.
        advice: what to change; may name them, too.
        applies: whether an engine has it.
    """

    feature: str
    reason: str
    advice: str
    applies: Callable[[Engine], bool]


class ModelRule(NamedTuple):
    """One property of models that is refused.

    Attributes:
        feature, reason, advice, applies: as of a Rule.
        layer: whether a layer has it.
        names: architectures that always have it, from reading vLLM.
        mark: regular expression that vLLM's source of an architecture contains if it may have it.
        condition: when an architecture with the mark has it; empty for always.
        except_for: architectures with the mark that never have it where prompts are compressed.
        text_only: the model is served without its images.
    """

    feature: str
    reason: str
    applies: Callable[[Engine], bool]
    advice: str = WITHOUT
    layer: Callable[[AttentionImpl], bool] = lambda impl: False
    names: tuple[str, ...] = ()
    mark: str = ""
    condition: str = ""
    except_for: tuple[str, ...] = ()
    text_only: bool = False


_LATENT = (
    "AXK1ForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV32ForCausalLM", "DeepseekV3ForCausalLM",
    "DeepseekV41ForCausalLM", "DeepseekV4ForCausalLM", "DeepseekV4ForConditionalGeneration",
    "Dots3NoteForCausalLM", "Glm4MoeLiteForCausalLM", "GlmMoeDsaForCausalLM", "HYV4ForCausalLM",
    "KimiK25ForConditionalGeneration", "KimiVLForConditionalGeneration", "LongcatFlashForCausalLM",
    "LongcatFlashNgramForCausalLM", "MistralLarge3ForCausalLM", "PanguUltraMoEForCausalLM",
)  # fmt: skip
_OTHER_CACHES = (
    "HrmTextForCausalLM", "InklingForCausalLM", "InklingForConditionalGeneration",
    "MiniMaxM3SparseForCausalLM", "MiniMaxM3SparseForConditionalGeneration", "Qwen4ExpForCausalLM",
    "Qwen4ExpForConditionalGeneration", "VoxtralRealtimeGeneration",
)  # fmt: skip
_NARROW_VALUES = ("MiMoV2FlashForCausalLM", "MiMoV2ForCausalLM", "MiMoV2OmniForCausalLM")


def _has_sinks(engine: Engine) -> bool:
    if engine.is_one_of(["GptOssForCausalLM"]):
        return True
    # Granite has them in all layers, or in none; vLLM asks the same two entries
    granite = any("Granite" in a and "Hybrid" not in a for a in engine.model.architectures)
    return granite and bool(engine.text.get("attention_sinks", engine.layer_types))


def _groups_differ(engine: Engine) -> bool:
    blocks = vars(engine.model.hf_config).get("block_configs") or ()
    return len({b.attention.n_heads_in_group for b in blocks if not b.attention.no_op}) > 1


MODEL_RULES = (
    ModelRule(
        "latent attention (MLA)",
        "the model uses MLA, whose latent cache has no KV heads",
        lambda e: e.model.use_mla,
        names=_LATENT,
        mark=r"MLAAttention\(|MultiHeadLatentAttentionWrapper\(",
        condition="`kv_lora_rank` is set",
    ),
    ModelRule(
        "linear-attention, Mamba or short-convolution layers alone",
        "the model has no attention layers",
        lambda e: e.model.is_attention_free,
        mark=r"\bIsAttentionFree\b",
    ),
    ModelRule(
        "attention sinks",
        "attention sinks are per query head",
        _has_sinks,
        layer=lambda impl: impl.sinks is not None,
        names=("GptOssForCausalLM",),
        mark=r"\bsinks=self\.sinks\b",
        condition="`layer_types` is set and `attention_sinks` is not false",
    ),
    ModelRule(
        "learned sink tokens",
        "layers put learned keys before those of the prompt",
        lambda e: bool(e.text.get("param_sink_number")),
        mark=r"StaticSinkAttention\(",
        condition="`param_sink_number` is above 0",
    ),
    ModelRule(
        "ALiBi",
        "ALiBi slopes depend on the position inside the cache",
        lambda e: e.model.uses_alibi or e.is_one_of(["Step1ForCausalLM"]),
        layer=lambda impl: impl.alibi_slopes is not None,
        names=("BloomForCausalLM", "Step1ForCausalLM"),
        mark=r"alibi_slopes=alibi_slopes",
        condition="`alibi` is set",
        except_for=("Dots3NoteForCausalLM",),
    ),
    ModelRule(
        "images attended in both directions",
        "the model attends to images in both directions",
        lambda e: e.model.is_mm_prefix_lm,
        advice="serve it for text only, with --language-model-only or, where it takes nothing but "
        "images, --limit-mm-per-prompt '{{\"image\": 0}}'; or " + WITHOUT,
        names=(
            "BagelForConditionalGeneration",
            "Gemma3ForConditionalGeneration",
            "HfMoondream",
            "Molmo2ForConditionalGeneration",
            "Moondream3ForCausalLM",
            "PaliGemmaForConditionalGeneration",
        ),
        mark=r"use_bidirectional_attention\b",
        condition="`use_bidirectional_attention` is `vision`",
        except_for=("Gemma4ForCausalLM",),
        text_only=True,
    ),
    ModelRule(
        "encoder-decoder models",
        "encoder-decoder models keep a cross-attention cache",
        lambda e: e.model.is_encoder_decoder,
        mark=r"CrossAttention\(",
        except_for=("AriaForConditionalGeneration",),
    ),
    ModelRule(
        "pooling models",
        "pooling models never decode",
        lambda e: e.model.runner_type != "generate",
    ),
    ModelRule(
        "non-causal attention and diffusion",
        "tokens attend to later ones",
        lambda e: e.vllm.attention_config.use_non_causal or e.model.is_diffusion,
        names=("DiffusionGemmaForBlockDiffusion",),
    ),
    ModelRule(
        "caches of the model's own kinds",
        "the model has caches of kinds of its own (sparse attention, indexes, pooled or repeated "
        "layers)",
        lambda e: e.is_one_of(_OTHER_CACHES),
        names=_OTHER_CACHES,
    ),
    ModelRule(
        "values narrower than keys",
        "values have another size than keys",
        lambda e: (
            e.is_one_of(_NARROW_VALUES)
            and e.text.get("v_head_dim") not in (None, e.model.get_head_size())
        ),
        mark=r"\battn_backend\.set_head_size_v\(",
        condition="`v_head_dim` differs from `head_dim`",
    ),
    ModelRule(
        "layers with unlike numbers of KV heads",
        "layers have unlike numbers of KV heads",
        _groups_differ,
        mark=r"\bn_heads_in_group\b",
        condition="`n_heads_in_group` differs between layers",
    ),
    ModelRule(
        "sliding windows in every layer",
        "every layer has a sliding window, so nothing grows with the prompt",
        lambda e: e.layer_types == {"sliding_attention"},
    ),
)
"""Properties of models."""

_DRAFTERS_WITHOUT_A_MODEL = ("ngram", "ngram_gpu", "suffix")

ENGINE_RULES = (
    Rule("speculative decoding by other methods than ngram, ngram_gpu and suffix",
         "speculative decoding by {drafter}, which drafts by layers or code of its own",
         "set the method of --speculative-config to ngram or suffix, or remove the flag",
         lambda e: (e.vllm.speculative_config is not None
                    and e.vllm.speculative_config.method not in _DRAFTERS_WITHOUT_A_MODEL)),
    Rule("KV connectors and offloading", "KV connectors and offloading store blocks by position",
         "remove --kv-transfer-config and --kv-offloading-size",
         lambda e: e.vllm.kv_transfer_config is not None),
    Rule("decode context parallelism", "decode context parallelism",
         "set --decode-context-parallel-size 1",
         lambda e: e.parallel.decode_context_parallel_size > 1),
    Rule("prefill context parallelism", "prefill context parallelism",
         "set --prefill-context-parallel-size 1",
         lambda e: e.parallel.prefill_context_parallel_size > 1),
    Rule("pipeline parallelism", "pipeline parallelism", "set --pipeline-parallel-size 1",
         lambda e: e.parallel.pipeline_parallel_size > 1),
    Rule("micro-batching", "micro-batching", "remove --enable-dbo and --ubatch-size",
         lambda e: e.parallel.use_ubatching),
    Rule("KV caches quantized in another way than fp8 with one scale per layer",
         "--kv-cache-dtype {cache_dtype} packs several elements or scales into a token",
         "use --kv-cache-dtype fp8 or auto", lambda e: not is_supported(e.cache.cache_dtype)),
    Rule("fp8 KV caches on ROCm",
         "some of its GPUs have float8 types that compression does not read",
         "use --kv-cache-dtype auto",
         lambda e: current_platform.is_rocm() and e.cache.cache_dtype in FLOAT8_TYPES),
    Rule("fp8 in some layers only", "layers with caches of unlike types",
         "remove --kv-cache-dtype-skip-layers",
         lambda e: (e.cache.cache_dtype in FLOAT8_TYPES
                    and bool(e.cache.kv_cache_dtype_skip_layers))),
    Rule("fast prefill of layers that share KV",
         "fast prefill skips prompt tokens in layers that share KV",
         "remove --kv-sharing-fast-prefill", lambda e: e.cache.kv_sharing_fast_prefill),
    Rule("sliding windows or chunks beside full attention without the hybrid KV cache manager",
         "vLLM then keeps layers of local attention like full ones, in one group",
         "remove --disable-hybrid-kv-cache-manager",
         lambda e: (bool(e.scheduler.disable_hybrid_kv_cache_manager)
                    and len(e.layer_types) > 1
                    and bool(e.layer_types & {"sliding_attention", "chunked_attention"}))),
    Rule("a budget below one block", "--kv-budget {budget} is smaller than one block",
         "set --kv-budget {block_size} or more, or a smaller --block-size than {block_size}",
         lambda e: (e.config.tokens_per_head is not None
                    and e.config.tokens_per_head < e.cache.block_size)),
    Rule("a window above the longest sequence",
         "--kv-window {window} is longer than --max-model-len {max_model_len}", "lower the window",
         lambda e: e.config.window > e.model.max_model_len),
    Rule("grids of images that only workers see",
         "{scorer} pools along the grids of images, and --mm-processor-cache-type shm keeps these "
         "from the scheduler", "set --mm-processor-cache-type lru, or "
         '"grid": false in --kv-compression-config',
         lambda e: (Need.GRIDS in e.config.needs
                    and e.model.multimodal_config is not None
                    and e.model.multimodal_config.mm_processor_cache_type == "shm")),
    Rule("a worker of your own", "--worker-cls {worker_cls}",
         "compression brings its own worker, so remove the flag",
         lambda e: e.parallel.worker_cls not in {*WORKERS, *WORKERS.values()}),
    Rule("a scheduler of your own", "--scheduler-cls {scheduler_cls}",
         "compression brings its own scheduler, so remove the flag",
         lambda e: e.scheduler.scheduler_cls not in {None, *SCHEDULERS.values()}),
    Rule("this repository's root on sys.path",
         "the folder triton_kernels of this project is on sys.path, where vLLM takes it for "
         "OpenAI's package of that name",
         "start vLLM from another folder, or with python -P", lambda e: _shadows_triton_kernels()),
)  # fmt: skip
"""What else an engine may have."""


def check(vllm_config: VllmConfig, configs: Sequence[KVCompressionConfig]) -> None:
    """Raise one error with every reason why this engine cannot compress by these configs.

    Raises:
        KVCompressionError: at least one reason was found.
    """
    found = [reason for config in configs for reason in engine_reasons(vllm_config, config)]
    _raise([*dict.fromkeys(found)])


def engine_reasons(vllm_config: VllmConfig, config: KVCompressionConfig) -> list[str]:
    """Reasons that the configuration shows; layers add theirs when they are built."""
    engine = Engine(vllm_config, config)
    rules = [rule for rule in (*MODEL_RULES, *ENGINE_RULES) if rule.applies(engine)]
    values = engine.values()
    reasons = [f"{rule.reason}: {rule.advice}.".format(**values) for rule in rules]
    missing = kernels.missing_on(vllm_config.device_config.device_type)
    return reasons + [f"{reason}." for reason in missing]


def check_layer(impl: AttentionImpl) -> None:
    """Raise for what one attention layer shows when vLLM builds it.

    Raises:
        KVCompressionError: such layers are not compressed.
    """
    reasons = [rule.reason for rule in MODEL_RULES if rule.layer(impl)]
    if not is_supported(impl.kv_cache_dtype):
        reasons.append(f"the checkpoint asks for a {impl.kv_cache_dtype} cache")
    _raise([f"{reason}: {WITHOUT}." for reason in reasons])


def check_layers(layers: Sequence[Attention]) -> None:
    """Raise for what shows once all layers and their checkpoint are loaded.

    Raises:
        KVCompressionError: KV heads have scales of their own, so that a sequence of a per-head
            batch would need another scale than the next; or layers cap their logits differently.
    """
    reasons = []
    if any(layer.get_buffer("_k_scale").numel() > 1 for layer in layers):
        reasons.append("the checkpoint has scales of its own for each KV head's cache")
    if len({soft_cap(layer) for layer in layers}) > 1:
        reasons.append("layers cap their logits differently")
    _raise([f"{reason}: {WITHOUT}." for reason in reasons])


def soft_cap(layer: Attention) -> float:
    """Of a layer's logits; 0 for none. Every backend of ours has it, the base class has not."""
    return float(vars(layer.impl)["logits_soft_cap"] or 0.0)


def _raise(reasons: list[str]) -> None:
    if reasons:
        raise KVCompressionError.from_reasons(reasons)


def _shadows_triton_kernels() -> bool:
    found = importlib.util.find_spec("triton_kernels")
    return found is not None and found.origin == kernels.__file__
