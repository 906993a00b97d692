# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints of models whose last layers read the KV cache of earlier ones.

    python tests/tiny_shared_kv.py OUTDIR [family ...]

| family     | architecture       | what is particular                                           |
|------------|--------------------|--------------------------------------------------------------|
| gemma3n    | Gemma3nForCausalLM | predictions in parallel (AltUp), sparse activations          |
| gemma4-e2b | Gemma4ForCausalLM  | full layers with wider heads, and fewer KV heads, than       |
|            |                    | sliding ones; readers with twice as wide MLPs                |

vLLM and Transformers scale what goes into the norms of Gemma 3n differently, so that the answers of
these weights differ. Tokenizer and rules for weights are those of tiny_models.py. Eight layers, of
which every second attends fully, the others to a window; the last four read the last cache of their
kind.
"""

from pathlib import Path

import tiny_families
import tiny_models
from tiny_models import SLIDING_WINDOW, Recipe, save
from transformers import (
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
)


def make(family: str, outdir: Path, **settings) -> Path:
    """Write the checkpoint of a family below `outdir`, unless it is there; return its folder.

    settings: those of `tiny_models.make`, where they are to differ from eight layers of four heads
        and logits that are not scaled down.
    """
    defaults = {"query_heads": 4, "layers": 8, "sharpness": 0.5}
    return tiny_models.make(family, outdir, **(defaults | settings))


def _shared_kv(recipe: Recipe) -> dict:
    """Arguments that both have in common."""
    return recipe.text_config | {
        "head_dim": recipe.head_dim,
        "tie_word_embeddings": True,
        "vocab_size_per_layer_input": tiny_models.VOCAB_SIZE,
        "hidden_size_per_layer_input": 16,
        "num_kv_shared_layers": recipe.layers // 2,
        "sliding_window": SLIDING_WINDOW,
        "layer_types": tiny_families.layer_types(recipe),
    }


def _gemma3n(recipe: Recipe, folder: Path) -> None:
    sparse = recipe.layers // 4
    config = Gemma3nTextConfig(
        **_shared_kv(recipe),
        laurel_rank=16,
        activation_sparsity_pattern=[0.95] * sparse + [0.0] * (recipe.layers - sparse),
    )
    save(Gemma3nForCausalLM(config), recipe, folder)


def _gemma4_e2b(recipe: Recipe, folder: Path) -> None:
    config = Gemma4TextConfig(
        **_shared_kv(recipe) | {"num_key_value_heads": recipe.query_heads},
        num_global_key_value_heads=recipe.kv_heads,
        attention_k_eq_v=True,
        global_head_dim=2 * recipe.head_dim,
        use_double_wide_mlp=True,
    )
    save(Gemma4ForCausalLM(config), recipe, folder)


FAMILIES = ("gemma3n", "gemma4-e2b")

tiny_models.FAMILIES.update({"gemma3n": _gemma3n, "gemma4-e2b": _gemma4_e2b})


if __name__ == "__main__":
    tiny_models.main(make, FAMILIES)
