# SPDX-License-Identifier: Apache-2.0
"""Configurations of well-known models, from what their authors published."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Config = dict[str, Any]

HEAD_SIZE = 128  # of all four


@dataclass(frozen=True)
class Model:
    """What a folder is made from.

    Attributes:
        config: of config.json; ``shrink`` edits a copy.
        text_key: where the language model's part of it stands; None: on top.
        special: special tokens by id.
        roles: tokens of the chat template: start and end of a turn, image.
        files: further files, JSON.
        tokenizer: additions to tokenizer_config.json.
    """

    config: Callable[[], Config]
    special: dict[int, str]
    roles: tuple[str, str, str]
    text_key: str | None = None
    files: dict[str, Config] = field(default_factory=dict)
    tokenizer: Config = field(default_factory=dict)


def llama_3_1_8b() -> Config:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": HEAD_SIZE,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": False,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "torch_dtype": "bfloat16",
    }


def qwen2_vl_7b() -> Config:
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_token_id": 151654,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_config": {
            "model_type": "qwen2_vl",
            "depth": 32,
            "embed_dim": 1280,
            "hidden_size": 3584,
            "num_heads": 16,
            "mlp_ratio": 4,
            "in_channels": 3,
            "patch_size": 14,
            "spatial_patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        "torch_dtype": "bfloat16",
    }


def qwen3_vl_30b_a3b() -> Config:
    return {
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "model_type": "qwen3_vl_moe",
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "qwen3_vl_moe_text",
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": HEAD_SIZE,
            "vocab_size": 151936,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
            "attention_bias": False,
            "rope_theta": 5000000.0,
            "rope_scaling": {
                "rope_type": "default",
                "mrope_interleaved": True,
                "mrope_section": [24, 20, 20],
            },
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "dtype": "bfloat16",
        },
        "vision_config": {
            "model_type": "qwen3_vl_moe",
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_heads": 16,
            "hidden_act": "gelu_pytorch_tanh",
            "in_channels": 3,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 2048,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [8, 16, 24],
        },
        "torch_dtype": "bfloat16",
    }


def llava_next_mistral_7b() -> Config:
    return {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "model_type": "llava_next",
        "image_token_index": 32000,
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "mistral",
            "architectures": ["MistralForCausalLM"],
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": HEAD_SIZE,
            "vocab_size": 32064,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
            "projection_dim": 768,
            "vocab_size": 32000,
        },
        "torch_dtype": "bfloat16",
    }


QWEN_SPECIAL = {
    151643: "<|endoftext|>",
    151644: "<|im_start|>",
    151645: "<|im_end|>",
    151652: "<|vision_start|>",
    151653: "<|vision_end|>",
    151654: "<|vision_pad|>",
    151655: "<|image_pad|>",
    151656: "<|video_pad|>",
}
QWEN_ROLES = ("<|im_start|>", "<|im_end|>", "<|vision_start|><|image_pad|><|vision_end|>")
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


def qwen_processor(patch: int, shortest: int, longest: int, mean: list, std: list) -> Config:
    """What image and video processors of the Qwen-VL family share; edges are areas in pixels."""
    return {
        "patch_size": patch,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": shortest, "longest_edge": longest},
        "image_mean": mean,
        "image_std": std,
    }


QWEN2_VL = qwen_processor(14, 3136, 12845056, CLIP_MEAN, CLIP_STD)
QWEN3_VL = qwen_processor(16, 65536, 16777216, [0.5] * 3, [0.5] * 3)

MODELS = {
    "llama-3.1-8b": Model(
        llama_3_1_8b,
        special={
            128000: "<|begin_of_text|>",
            128001: "<|end_of_text|>",
            128006: "<|start_header_id|>",
            128007: "<|end_header_id|>",
            128008: "<|eom_id|>",
            128009: "<|eot_id|>",
        },
        roles=("<|start_header_id|>", "<|eot_id|>", ""),
        tokenizer={"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    ),
    "qwen2-vl-7b": Model(
        qwen2_vl_7b,
        special=QWEN_SPECIAL,
        roles=QWEN_ROLES,
        files={
            "preprocessor_config.json": QWEN2_VL
            | {
                "image_processor_type": "Qwen2VLImageProcessor",
                "processor_class": "Qwen2VLProcessor",
            },
            "video_preprocessor_config.json": QWEN2_VL
            | {
                "video_processor_type": "Qwen2VLVideoProcessor",
                "processor_class": "Qwen2VLProcessor",
            },
        },
        tokenizer={
            "tokenizer_class": "Qwen2Tokenizer",
            "processor_class": "Qwen2VLProcessor",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
        },
    ),
    "qwen3-vl-30b-a3b": Model(
        qwen3_vl_30b_a3b,
        special=QWEN_SPECIAL,
        roles=QWEN_ROLES,
        text_key="text_config",
        files={
            "preprocessor_config.json": QWEN3_VL
            | {
                "image_processor_type": "Qwen2VLImageProcessorFast",
                "processor_class": "Qwen3VLProcessor",
            },
            "video_preprocessor_config.json": QWEN3_VL
            | {
                "size": {"shortest_edge": 4096, "longest_edge": 25165824},
                "video_processor_type": "Qwen3VLVideoProcessor",
                "processor_class": "Qwen3VLProcessor",
            },
        },
        tokenizer={
            "tokenizer_class": "Qwen2Tokenizer",
            "processor_class": "Qwen3VLProcessor",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
        },
    ),
    "llava-next-mistral-7b": Model(
        llava_next_mistral_7b,
        special={0: "<unk>", 1: "<s>", 2: "</s>", 32000: "<image>", 32001: "<pad>"},
        roles=("<s>", "</s>", "<image>"),
        text_key="text_config",
        files={
            "preprocessor_config.json": {
                "image_processor_type": "LlavaNextImageProcessor",
                "processor_class": "LlavaNextProcessor",
                "crop_size": {"height": 336, "width": 336},
                "size": {"shortest_edge": 336},
                "image_grid_pinpoints": llava_next_mistral_7b()["image_grid_pinpoints"],
                "image_mean": CLIP_MEAN,
                "image_std": CLIP_STD,
            },
            "processor_config.json": {
                "processor_class": "LlavaNextProcessor",
                "image_token": "<image>",
                "num_additional_image_tokens": 1,
                "patch_size": 14,
                "vision_feature_select_strategy": "default",
            },
        },
        tokenizer={
            "processor_class": "LlavaNextProcessor",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
        },
    ),
}
