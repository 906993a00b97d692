# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints of the model families that people serve, one of each.

    python tests/tiny_families.py OUTDIR [family ...]

| family             | architecture                           | what is particular               |
|--------------------|----------------------------------------|----------------------------------|
| llama              | LlamaForCausalLM (of tiny_models.py)   | Llama 3 RoPE                     |
| mistral            | MistralForCausalLM                     |                                  |
| qwen2-vl           | Qwen2VLForConditionalGeneration        | M-RoPE                           |
| qwen2.5-vl         | Qwen2_5_VLForConditionalGeneration     | the same; windows in the tower   |
| qwen3-vl-moe       | Qwen3VLMoeForConditionalGeneration     | interleaved M-RoPE, query and    |
|                    |                                        | key norms, experts, deep stacks  |
| llava-next-mistral | LlavaNextForConditionalGeneration      | base view, grid, newline tokens  |
| llava-onevision    | LlavaOnevisionForConditionalGeneration | the same; SigLIP and Qwen2       |
| internvl3          | InternVLForConditionalGeneration       | tiles and thumbnail              |
| gemma3-images      | Gemma3ForConditionalGeneration         | attends to images in both        |
|                    |                                        | directions; no image processor   |
| gemma4             | Gemma4ForCausalLM                      | full layers with wider heads, and |
|                    |                                        | fewer KV heads, than sliding ones |
| cohere2            | Cohere2ForCausalLM                     | full layers without RoPE         |
| exaone4            | Exaone4ForCausalLM                     | the same; query and key norms    |

The last three are text-only and have layers with a sliding window beside full ones.

Tokenizer, chat template and rules for weights are those of tiny_models.py; in a prompt, an image is
always `<|vision_start|><|image_pad|><|vision_end|>`. Two layers, four query heads, two KV heads,
at most half a million parameters.
"""

from collections.abc import Callable
from pathlib import Path

import tiny_models
from safetensors.torch import load_file, save_file
from tiny_models import (
    IMAGE,
    SLIDING_WINDOW,
    VIDEO,
    VISION_END,
    VISION_START,
    Recipe,
    save,
    token_id,
    write_json,
)
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    Cohere2Config,
    Cohere2ForCausalLM,
    Exaone4Config,
    Exaone4ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    SiglipVisionConfig,
)

VISION_WIDTH = 32
PATCH = 14  # pixels
TILE = 112  # pixels; side of what the vision towers of LLaVA and InternVL see at once


def plain_rope() -> dict[str, str | float]:
    """RoPE settings; a new dictionary each time, because configurations add to theirs."""
    return {"rope_type": "default", "rope_theta": 1e6}


NORMALISATION = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


def make(family: str, outdir: Path, **settings) -> Path:
    """Write the checkpoint of a family below `outdir`, unless it is there; return its folder.

    settings: those of `tiny_models.make`, where they are to differ from two layers of four heads.
    """
    return tiny_models.make(family, outdir, **({"query_heads": 4, "layers": 2} | settings))


def _mistral(recipe: Recipe, folder: Path) -> None:
    save(MistralForCausalLM(_mistral_config(recipe)), recipe, folder)


def _mistral_config(recipe: Recipe) -> MistralConfig:
    return MistralConfig(
        **recipe.text_config,
        head_dim=recipe.head_dim,
        sliding_window=None,
        rope_parameters=plain_rope(),
    )


def _qwen2_vl(recipe: Recipe, folder: Path) -> None:
    config = Qwen2VLConfig(
        text_config=recipe.text_config | {"rope_parameters": _mrope(recipe)},
        vision_config={
            "depth": 2,
            "embed_dim": VISION_WIDTH,
            "hidden_size": recipe.width,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": PATCH,
        },
        **_qwen_placeholders(),
    )
    _save_qwen_vl(Qwen2VLForConditionalGeneration(config), recipe, folder, "Qwen2VL")


def _qwen2_5_vl(recipe: Recipe, folder: Path) -> None:
    config = Qwen2_5_VLConfig(
        text_config=recipe.text_config | {"rope_parameters": _mrope(recipe)},
        vision_config={
            "depth": 2,
            "hidden_size": VISION_WIDTH,
            "out_hidden_size": recipe.width,
            "num_heads": 2,
            "intermediate_size": 2 * VISION_WIDTH,
            "patch_size": PATCH,
            "window_size": 8 * PATCH,
            "fullatt_block_indexes": [1],
        },
        **_qwen_placeholders(),
    )
    _save_qwen_vl(Qwen2_5_VLForConditionalGeneration(config), recipe, folder, "Qwen2_5_VL")


def _qwen3_vl_moe(recipe: Recipe, folder: Path) -> None:
    experts = {
        "head_dim": recipe.head_dim,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        # transformers tells the layout of experts by their shape: twice this is not the width
        "moe_intermediate_size": recipe.head_dim,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
        "rope_parameters": _mrope(recipe) | {"mrope_interleaved": True},
    }
    config = Qwen3VLMoeConfig(
        text_config=recipe.text_config | experts,
        vision_config={
            "depth": 2,
            "hidden_size": VISION_WIDTH,
            "out_hidden_size": recipe.width,
            "num_heads": 2,
            "intermediate_size": 2 * VISION_WIDTH,
            "patch_size": 16,
            "num_position_embeddings": 256,
            "deepstack_visual_indexes": [0, 1],
        },
        **_qwen_placeholders(),
    )
    model = Qwen3VLMoeForConditionalGeneration(config)
    _save_qwen_vl(model, recipe, folder, "Qwen3VL", video="Qwen3VL")
    # published files have the experts as [expert, in, out], transformers writes [expert, out, in]
    _rewrite(
        folder,
        lambda name, weight: (
            name,
            weight.transpose(1, 2).contiguous() if ".mlp.experts." in name else weight,
        ),
    )


def _mrope(recipe: Recipe) -> dict:
    """RoPE settings that divide the rotated pairs of a head among time, height and width."""
    rotated = recipe.head_dim // 2
    time, height = rotated // 4, (rotated - rotated // 4) // 2
    return {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [time, height, rotated - time - height],
    }


def _qwen_placeholders() -> dict[str, int]:
    """The placeholder tokens that every Qwen-VL configuration names."""
    return {
        "image_token_id": token_id(IMAGE),
        "video_token_id": token_id(VIDEO),
        "vision_start_token_id": token_id(VISION_START),
        "vision_end_token_id": token_id(VISION_END),
    }


def _save_qwen_vl(
    model: PreTrainedModel, recipe: Recipe, folder: Path, name: str, video: str = "Qwen2VL"
) -> None:
    """Save with tokenizer and processor; `name` and `video` are prefixes of their class names."""
    processor_class = f"{name}Processor"
    save(
        model,
        recipe,
        folder,
        {"tokenizer_class": "Qwen2Tokenizer", "processor_class": processor_class},
    )
    vision = model.config.vision_config
    pixels_per_token = (vision.spatial_merge_size * vision.patch_size) ** 2
    processor = {
        "processor_class": processor_class,
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
        # 4 to 256 tokens per image
        "size": {"shortest_edge": 4 * pixels_per_token, "longest_edge": 256 * pixels_per_token},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    write_json(
        folder / "preprocessor_config.json",
        processor | {"image_processor_type": "Qwen2VLImageProcessor"},
    )
    write_json(
        folder / "video_preprocessor_config.json",
        processor | {"video_processor_type": f"{video}VideoProcessor"},
    )


def _llava_next_mistral(recipe: Recipe, folder: Path) -> None:
    grids = [[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]]
    pinpoints = [[rows * TILE, columns * TILE] for rows, columns in grids]
    config = LlavaNextConfig(
        text_config=_mistral_config(recipe),
        vision_config=CLIPVisionConfig(
            **_tower(), num_hidden_layers=3, projection_dim=VISION_WIDTH
        ),
        image_token_index=token_id(IMAGE),
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(TILE // PATCH) ** 2,
    )
    _save_llava(
        LlavaNextForConditionalGeneration(config),
        recipe,
        folder,
        "LlavaNext",
        image={
            "image_grid_pinpoints": pinpoints,
            "size": {"shortest_edge": TILE},
            "crop_size": {"height": TILE, "width": TILE},
        },
        processor={
            "image_token": IMAGE,
            "patch_size": PATCH,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
        },
    )


def _llava_onevision(recipe: Recipe, folder: Path) -> None:
    pinpoints = [[rows * TILE, columns * TILE] for rows in (1, 2, 3) for columns in (1, 2, 3)]
    config = LlavaOnevisionConfig(
        text_config=Qwen2Config(**recipe.text_config, rope_parameters=plain_rope()),
        vision_config=SiglipVisionConfig(**_tower(), num_hidden_layers=2, vision_use_head=False),
        image_token_index=token_id(IMAGE),
        video_token_index=token_id(VIDEO),
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
    )
    size = {"size": {"height": TILE, "width": TILE}}
    _save_llava(
        LlavaOnevisionForConditionalGeneration(config),
        recipe,
        folder,
        "LlavaOnevision",
        image=size | {"image_grid_pinpoints": pinpoints},
        processor={
            "image_token": IMAGE,
            "video_token": VIDEO,
            "num_image_tokens": (TILE // PATCH) ** 2,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_9",
        },
        video=size,
    )


def _internvl3(recipe: Recipe, folder: Path) -> None:
    tower = _tower() | {"image_size": [TILE, TILE], "patch_size": [PATCH, PATCH]}
    tokens_per_tile = (TILE // PATCH) ** 2 // 4
    config = InternVLConfig(
        text_config=Qwen2Config(**recipe.text_config, rope_parameters=plain_rope()),
        vision_config=InternVLVisionConfig(**tower, num_hidden_layers=2, attention_bias=True),
        image_token_id=token_id(IMAGE),
        image_seq_length=tokens_per_tile,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    names = {
        "start_image_token": VISION_START,
        "end_image_token": VISION_END,
        "context_image_token": IMAGE,
        "video_token": VIDEO,
    }
    save(
        InternVLForConditionalGeneration(config),
        recipe,
        folder,
        _special_tokens("InternVLProcessor", names) | {"tokenizer_class": "Qwen2Tokenizer"},
    )
    size = {"size": {"height": TILE, "width": TILE}}
    tiles = {"crop_to_patches": True, "min_patches": 1, "max_patches": 6}
    _write_processor(
        folder,
        "InternVL",
        image=size | tiles | {"image_processor_type": "GotOcr2ImageProcessor"},
        processor={"image_seq_length": tokens_per_tile},
        video=size,
    )


def _gemma3_images(recipe: Recipe, folder: Path) -> None:
    config = Gemma3Config(
        text_config=tiny_models.gemma3_config(recipe),
        vision_config=SiglipVisionConfig(**_tower(), num_hidden_layers=2, vision_use_head=False),
        image_token_index=token_id(IMAGE),
        boi_token_index=token_id(VISION_START),
        eoi_token_index=token_id(VISION_END),
        mm_tokens_per_image=16,
    )
    save(Gemma3ForConditionalGeneration(config), recipe, folder)


def _gemma4(recipe: Recipe, folder: Path) -> None:
    config = Gemma4TextConfig(
        **recipe.text_config
        | {"num_key_value_heads": recipe.query_heads, "tie_word_embeddings": True},
        head_dim=recipe.head_dim,
        global_head_dim=2 * recipe.head_dim,
        num_global_key_value_heads=recipe.kv_heads,
        attention_k_eq_v=True,
        hidden_size_per_layer_input=0,
        sliding_window=SLIDING_WINDOW,
        layer_types=layer_types(recipe),
    )
    save(Gemma4ForCausalLM(config), recipe, folder)


def _cohere2(recipe: Recipe, folder: Path) -> None:
    config = Cohere2Config(
        **recipe.text_config | {"tie_word_embeddings": True},
        sliding_window=SLIDING_WINDOW,
        layer_types=layer_types(recipe),
        rope_parameters=plain_rope(),
        logit_scale=1.0,
    )
    save(Cohere2ForCausalLM(config), recipe, folder)


def _exaone4(recipe: Recipe, folder: Path) -> None:
    config = Exaone4Config(
        **recipe.text_config,
        sliding_window=SLIDING_WINDOW,
        layer_types=layer_types(recipe),
        rope_parameters=plain_rope(),
    )
    save(Exaone4ForCausalLM(config), recipe, folder)


def layer_types(recipe: Recipe) -> list[str]:
    """Every second layer attends fully, the last one among them."""
    return [
        "full_attention" if (recipe.layers - layer) % 2 else "sliding_attention"
        for layer in range(recipe.layers)
    ]


def _tower() -> dict[str, int]:
    """Settings that the vision towers of LLaVA and InternVL have in common."""
    return {
        "hidden_size": VISION_WIDTH,
        "intermediate_size": 2 * VISION_WIDTH,
        "num_attention_heads": 2,
        "image_size": TILE,
        "patch_size": PATCH,
    }


def _special_tokens(processor_class: str, names: dict[str, str]) -> dict:
    """Entries of tokenizer_config.json by which a processor finds its placeholders."""
    return {"processor_class": processor_class, "extra_special_tokens": names} | names


def _save_llava(
    model,
    recipe: Recipe,
    folder: Path,
    name: str,
    image: dict,
    processor: dict,
    video: dict | None = None,
) -> None:
    """Save with tokenizer and processor; `name` is the prefix of the class names."""
    names = {key: value for key, value in processor.items() if key.endswith("_token")}
    save(model, recipe, folder, _special_tokens(f"{name}Processor", names))
    image = {"image_processor_type": f"{name}ImageProcessor", "do_pad": True} | image
    _write_processor(folder, name, image, processor, video)

    # the published layout, which vLLM reads, has one more level of names
    def publish(weight_name: str, weight: Tensor) -> tuple[str, Tensor]:
        if weight_name.startswith("vision_tower."):
            weight_name = weight_name.replace("vision_tower.", "vision_tower.vision_model.", 1)
        return weight_name, weight

    _rewrite(folder, publish)


def _write_processor(
    folder: Path, name: str, image: dict, processor: dict, video: dict | None = None
) -> None:
    """Write the files of a processor; each dict adds to what all of them say."""
    common = {"processor_class": f"{name}Processor"}
    write_json(folder / "preprocessor_config.json", common | NORMALISATION | image)
    write_json(folder / "processor_config.json", common | processor)
    if video is not None:
        write_json(
            folder / "video_preprocessor_config.json",
            common | NORMALISATION | {"video_processor_type": f"{name}VideoProcessor"} | video,
        )


def _rewrite(folder: Path, change: Callable[[str, Tensor], tuple[str, Tensor]]) -> None:
    """Apply `change` to every weight of a checkpoint, name and value."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    save_file(
        dict(change(name, weight) for name, weight in weights.items()), file, {"format": "pt"}
    )


# those that serve images
FAMILIES = (
    "llama",
    "mistral",
    "qwen2-vl",
    "qwen2.5-vl",
    "qwen3-vl-moe",
    "llava-next-mistral",
    "llava-onevision",
    "internvl3",
)

SLIDING_FAMILIES = ("gemma4", "cohere2", "exaone4")

tiny_models.FAMILIES.update(
    {
        "mistral": _mistral,
        "qwen2-vl": _qwen2_vl,
        "qwen2.5-vl": _qwen2_5_vl,
        "qwen3-vl-moe": _qwen3_vl_moe,
        "llava-next-mistral": _llava_next_mistral,
        "llava-onevision": _llava_onevision,
        "internvl3": _internvl3,
        "gemma3-images": _gemma3_images,
        "gemma4": _gemma4,
        "cohere2": _cohere2,
        "exaone4": _exaone4,
    }
)


if __name__ == "__main__":
    tiny_models.main(make, FAMILIES + SLIDING_FAMILIES)
