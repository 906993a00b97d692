# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints of models whose full-attention layers stand beside layers of other kinds.

    python tests/tiny_hybrids.py OUTDIR [family ...]

| family     | architecture                    | layers beside full attention     | dtype on a CPU |
|------------|---------------------------------|----------------------------------|----------------|
| granite-4h | GraniteMoeHybridForCausalLM     | Mamba 2                          | float32        |
| nemotron-h | NemotronHForCausalLM            | Mamba 2, and layers of MLP alone | float32        |
| qwen3.5    | Qwen3_5ForConditionalGeneration | gated delta net                  | bfloat16       |
| qwen3-next | Qwen3NextForCausalLM            | gated delta net; experts         | bfloat16       |
| llama4     | Llama4ForCausalLM               | attention within chunks          | float32        |

Tokenizer and rules for weights are those of tiny_models.py. Six layers, of which 2 and 5 attend.
"""

from dataclasses import replace
from pathlib import Path

import tiny_families
import tiny_models
from tiny_models import Recipe, save
from transformers import (
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    NemotronHConfig,
    NemotronHForCausalLM,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)


def make(family: str, outdir: Path, **settings) -> Path:
    """Write the checkpoint of a family below `outdir`, unless it is there; return its folder.

    settings: those of `tiny_models.make`, where they are to differ from six layers of four heads.
    """
    return tiny_models.make(family, outdir, **({"query_heads": 4, "layers": 6} | settings))


def _layer_types(recipe: Recipe, other: str) -> list[str]:
    """Every third layer attends."""
    return ["full_attention" if layer % 3 == 2 else other for layer in range(recipe.layers)]


def _granite_4h(recipe: Recipe, folder: Path) -> None:
    config = GraniteMoeHybridConfig(
        **recipe.text_config,
        layer_types=_layer_types(recipe, "linear_attention"),
        num_local_experts=0,
        num_experts_per_tok=0,
        shared_intermediate_size=2 * recipe.width,
        attention_multiplier=recipe.head_dim**-0.5,
        mamba_n_heads=8,
        mamba_d_head=recipe.width // 4,
        mamba_d_state=64,
    )
    save(GraniteMoeHybridForCausalLM(config), recipe, folder)


def _nemotron_h(recipe: Recipe, folder: Path) -> None:
    config = NemotronHConfig(
        **recipe.text_config | {"num_hidden_layers": None},
        head_dim=recipe.head_dim,
        layers_block_type=["linear_attention", "mlp", "full_attention"] * (recipe.layers // 3),
        ssm_state_size=64,
        mamba_num_heads=8,
        mamba_head_dim=recipe.width // 4,
        n_groups=2,
    )
    save(NemotronHForCausalLM(config), recipe, folder)


def _delta_net(recipe: Recipe) -> dict:
    """Arguments that Qwen3.5 and Qwen3-Next have in common."""
    return recipe.text_config | {
        "head_dim": recipe.head_dim,
        "layer_types": _layer_types(recipe, "linear_attention"),
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }


def _qwen3_5(recipe: Recipe, folder: Path) -> None:
    text_config = _delta_net(recipe) | {
        # half of a head's dimensions are rotated
        "rope_parameters": tiny_families._mrope(replace(recipe, head_dim=recipe.head_dim // 2))
        | {"mrope_interleaved": True, "partial_rotary_factor": 0.5},
    }
    config = Qwen3_5Config(
        text_config=text_config,
        vision_config={
            "depth": 2,
            "hidden_size": tiny_families.VISION_WIDTH,
            "out_hidden_size": recipe.width,
            "num_heads": 2,
            "intermediate_size": 2 * tiny_families.VISION_WIDTH,
            "patch_size": 16,
            "num_position_embeddings": 256,
        },
        **tiny_families._qwen_placeholders(),
    )
    model = Qwen3_5ForConditionalGeneration(config)
    tiny_families._save_qwen_vl(model, recipe, folder, "Qwen3VL", video="Qwen3VL")


def _qwen3_next(recipe: Recipe, folder: Path) -> None:
    config = Qwen3NextConfig(
        **_delta_net(recipe),
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=recipe.head_dim,
        shared_expert_intermediate_size=recipe.width,
        rope_parameters=tiny_families.plain_rope(),
    )
    save(Qwen3NextForCausalLM(config), recipe, folder)


def _llama4(recipe: Recipe, folder: Path) -> None:
    layer_types = _layer_types(recipe, "chunked_attention")
    config = Llama4TextConfig(
        **recipe.text_config,
        head_dim=recipe.head_dim,
        intermediate_size_mlp=2 * recipe.width,
        moe_layers=[],
        interleave_moe_layer_step=0,
        layer_types=layer_types,
        # full attention has no rotary embedding
        no_rope_layers=[int(kind != "full_attention") for kind in layer_types],
        attention_chunk_size=64,
        rope_parameters=tiny_families.plain_rope(),
    )
    save(Llama4ForCausalLM(config), recipe, folder)


FAMILIES = ("granite-4h", "nemotron-h", "qwen3.5", "qwen3-next", "llama4")

tiny_models.FAMILIES.update(
    {
        "granite-4h": _granite_4h,
        "nemotron-h": _nemotron_h,
        "qwen3.5": _qwen3_5,
        "qwen3-next": _qwen3_next,
        "llama4": _llama4,
    }
)


if __name__ == "__main__":
    tiny_models.main(make, FAMILIES)
