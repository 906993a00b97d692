# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints with random weights, in Hugging Face format, for tests on a CPU without network.

    python tests/tiny_models.py OUTDIR [family ...]

| family      | architecture                    | for tests of                                     |
|-------------|---------------------------------|--------------------------------------------------|
| llama       | LlamaForCausalLM                | text, Llama 3 RoPE                               |
| gemma3      | Gemma3ForCausalLM               | layers with a sliding window beside full ones    |
| deepseek-v2 | DeepseekV2ForCausalLM           | refusal of multi-head latent attention           |
| whisper     | WhisperForConditionalGeneration | refusal of encoder-decoder models                |

More families, for tests of breadth, are in tiny_families.py.

All share one tokenizer: a token per byte of text and no BOS, so the prompt "abc" has three tokens.
Token ids 0..93 are the printable ASCII characters "!".."~", and only these can be generated:
equal texts mean equal tokens, no random answer ends early, and none contains an image placeholder.

Run deepseek-v2 with `dtype="bfloat16"`: on a CPU with AMX vLLM's kernels refuse float32 weights,
and a test of our own refusal must not pass because of theirs.
"""

import argparse
import hashlib
import inspect
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

SLIDING_WINDOW = 64  # tokens; the gemma3 family
GENERATED_IDS = 94  # ids [0, 94) are "!".."~"
WEIGHT_STD = 0.05

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
WHISPER_TOKENS = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
SPECIAL_TOKENS = [PAD, START, END, VISION_START, VISION_END, IMAGE, VIDEO, *WHISPER_TOKENS]

CHAT_TEMPLATE = """\
{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}\
{% if part.type in ['image', 'image_url'] %}<|vision_start|><|image_pad|><|vision_end|>\
{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@dataclass(frozen=True)
class Recipe:
    """Everything a checkpoint depends on."""

    family: str
    head_dim: int = 32
    query_heads: int = 8
    kv_heads: int = 2
    layers: int = 4
    dtype: str = "float32"
    sharpness: float = 2.0
    max_positions: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family: expected one of {', '.join(FAMILIES)}, got {self.family!r}")
        if self.query_heads % self.kv_heads:
            raise ValueError(
                f"kv_heads: expected a divisor of {self.query_heads}, got {self.kv_heads}"
            )

    @property
    def folder_name(self) -> str:
        """The family, and every setting that is not the default."""
        settings = (
            f"{f.name}={getattr(self, f.name)}"
            for f in fields(self)
            if f.name != "family" and getattr(self, f.name) != f.default
        )
        return "-".join([self.family, *settings])

    @property
    def width(self) -> int:
        """Size of a hidden state of the language model."""
        return self.query_heads * self.head_dim

    @property
    def text_config(self) -> dict:
        """Arguments that most text configurations of transformers have in common."""
        return {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": self.width,
            "intermediate_size": 2 * self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.query_heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": self.max_positions,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": token_id(END),
            "pad_token_id": token_id(PAD),
        }


def make(
    family: str,
    outdir: Path,
    *,
    head_dim: int = 32,
    query_heads: int = 8,
    kv_heads: int = 2,
    layers: int = 4,
    dtype: str = "float32",
    sharpness: float = 2.0,
    max_positions: int = 4096,
    seed: int = 0,
) -> Path:
    """Write a checkpoint below `outdir`, unless this very one is there already; return its folder.

    Args:
        family: a row of the table above.
        head_dim: vLLM's CPU attention takes 32, 48, 64, 80, 96 or 128, but not 16.
        query_heads: attention heads of a layer; the hidden state has `query_heads * head_dim`.
        kv_heads: KV heads among which they are divided (no effect on deepseek-v2 and whisper).
        layers: decoder layers; in gemma3 every third one attends fully, so 6 make two layers per
            KV cache group in vLLM and 4 make one.
        dtype: of the stored weights, e.g. "bfloat16".
        sharpness: factor on queries and on keys. Random weights attend almost uniformly at 1.0,
            and then it hardly matters which tokens a compressed cache has kept.
        max_positions: longest sequence.
        seed: of the weights.

    Raises:
        ValueError: unknown family, or KV heads that do not divide the query heads.
    """
    recipe = Recipe(
        family, head_dim, query_heads, kv_heads, layers, dtype, sharpness, max_positions, seed
    )
    folder = Path(outdir) / recipe.folder_name
    receipt = json.dumps(asdict(recipe) | {"generator": _generator_digest(recipe)}, indent=2)
    receipt_file = folder / "recipe.json"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if receipt_file.is_file() and receipt_file.read_text() == receipt:
            return folder
        # build aside and rename: a crash does not leave half a checkpoint
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            built = Path(scratch) / "checkpoint"
            built.mkdir()
            FAMILIES[family](recipe, built)
            (built / "recipe.json").write_text(receipt)
            shutil.rmtree(folder, ignore_errors=True)
            built.rename(folder)
    return folder


def _generator_digest(recipe: Recipe) -> str:
    """Fingerprint of the files involved: a changed generator must not reuse old checkpoints."""
    files = (__file__, inspect.getfile(FAMILIES[recipe.family]))
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()[:16]


def byte_tokenizer() -> Tokenizer:
    """One token per byte, printable ASCII first, then the special tokens."""
    # sorted() puts "!".."~", which stand for themselves, before the stand-ins of other bytes
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer


TOKENIZER = byte_tokenizer()
VOCAB_SIZE = -(-TOKENIZER.get_vocab_size() // 64) * 64


def token_id(token: str) -> int:
    """Id of a special token."""
    index = TOKENIZER.token_to_id(token)
    assert index is not None, f"{token} is not in the vocabulary"
    return index


def _llama(recipe: Recipe, folder: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": recipe.max_positions // 8,
    }
    config = LlamaConfig(**recipe.text_config, head_dim=recipe.head_dim, rope_parameters=rope)
    save(LlamaForCausalLM(config), recipe, folder)


def gemma3_config(recipe: Recipe) -> Gemma3TextConfig:
    """Every third layer attends fully, the others to a window."""
    return Gemma3TextConfig(
        **recipe.text_config,
        head_dim=recipe.head_dim,
        query_pre_attn_scalar=recipe.head_dim,
        sliding_window=SLIDING_WINDOW,
        layer_types=[
            "sliding_attention" if (layer + 1) % 3 else "full_attention"
            for layer in range(recipe.layers)
        ],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        },
    )


def _gemma3(recipe: Recipe, folder: Path) -> None:
    save(Gemma3ForCausalLM(gemma3_config(recipe)), recipe, folder)


def _deepseek_v2(recipe: Recipe, folder: Path) -> None:
    config = DeepseekV2Config(
        **recipe.text_config | {"num_key_value_heads": recipe.query_heads},
        # vLLM's CPU kernels for latent attention are compiled for exactly 512 + 64
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        qk_nope_head_dim=recipe.head_dim,
        v_head_dim=recipe.head_dim,
        q_lora_rank=None,
        # all layers dense
        first_k_dense_replace=recipe.layers,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    save(DeepseekV2ForCausalLM(config), recipe, folder)


def _whisper(recipe: Recipe, folder: Path) -> None:
    width = recipe.width
    config = WhisperConfig(
        vocab_size=VOCAB_SIZE,
        d_model=width,
        encoder_layers=2,
        decoder_layers=recipe.layers,
        encoder_attention_heads=recipe.query_heads,
        decoder_attention_heads=recipe.query_heads,
        encoder_ffn_dim=2 * width,
        decoder_ffn_dim=2 * width,
        max_target_positions=recipe.max_positions,
        bos_token_id=token_id(PAD),
        eos_token_id=token_id(END),
        pad_token_id=token_id(PAD),
        decoder_start_token_id=token_id(WHISPER_TOKENS[0]),
    )
    tokenizer = {"tokenizer_class": "WhisperTokenizer", "processor_class": "WhisperProcessor"}
    save(WhisperForConditionalGeneration(config), recipe, folder, tokenizer)
    write_json(
        folder / "preprocessor_config.json",
        {
            "processor_class": "WhisperProcessor",
            "feature_extractor_type": "WhisperFeatureExtractor",
            "feature_size": config.num_mel_bins,
        },
    )


FAMILIES: dict[str, Callable[[Recipe, Path], None]] = {
    "llama": _llama,
    "gemma3": _gemma3,
    "deepseek-v2": _deepseek_v2,
    "whisper": _whisper,
}


@torch.no_grad()
def _randomise(model: PreTrainedModel, recipe: Recipe) -> None:
    """Draw all weights anew, in place and from the seed alone."""
    generator = torch.Generator().manual_seed(recipe.seed)
    # Gemma stores its norm weights minus one
    unit = 0.0 if recipe.family.startswith("gemma3") else 1.0
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.dim() >= 2:
            weight.copy_(noise * WEIGHT_STD)
        elif name.endswith(("weight", "lambda_1", "lambda_2")):  # of a norm or a layer scale
            weight.copy_(unit + noise * 0.1)
        else:
            weight.copy_(noise * 0.02)

        # a norm behind the projection would undo a factor on the projection
        if name.endswith(("self_attn.q_norm.weight", "self_attn.k_norm.weight")):
            weight.copy_((weight + 1 - unit) * recipe.sharpness - (1 - unit))
        elif name.endswith(("self_attn.q_proj.weight", "self_attn.k_proj.weight")):
            weight.mul_(recipe.sharpness)
    # a logit of 0 is never the largest of so many
    model.get_output_embeddings().weight[GENERATED_IDS:] = 0


def save(
    model: PreTrainedModel, recipe: Recipe, folder: Path, tokenizer: dict | None = None
) -> None:
    """Write weights, configuration and tokenizer; `tokenizer` adds to tokenizer_config.json."""
    _randomise(model, recipe)
    model.to(getattr(torch, recipe.dtype)).save_pretrained(folder)
    write_json(
        folder / "generation_config.json",
        {"eos_token_id": token_id(END), "pad_token_id": token_id(PAD), "do_sample": False},
    )
    TOKENIZER.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END,
            "pad_token": PAD,
            "model_max_length": recipe.max_positions,
            "clean_up_tokenization_spaces": False,
        }
        | (tokenizer or {}),
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")


def main(make: Callable[[str, Path], Path], families: Iterable[str]) -> None:
    """Make the given families with default settings and print their folders."""
    parser = argparse.ArgumentParser(description="Make tiny random checkpoints for tests.")
    parser.add_argument("outdir", type=Path)
    parser.add_argument("families", nargs="*", default=list(families), metavar="family")
    args = parser.parse_args()
    for family in args.families:
        print(make(family, args.outdir))


if __name__ == "__main__":
    main(make, FAMILIES)
