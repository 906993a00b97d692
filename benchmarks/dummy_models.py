# SPDX-License-Identifier: Apache-2.0
"""Folders that vLLM takes for well-known models, without their weights and without a network.

    python benchmarks/dummy_models.py OUTDIR [model ...] [--shrink]
    vllm serve OUTDIR/llama-3.1-8b --load-format dummy

Sizes, RoPE and special token ids are those of the published configurations; weights are random
numbers that vLLM draws (``--load-format dummy``). So memory, FLOPs and cache sizes are real and the
answers are not. The tokenizer is ours: one token per byte of text, then fillers up to the published
vocabulary, then the special tokens at their published ids.

``--shrink`` keeps everything but depth and width: two layers, four query heads, two KV heads.
"""

import argparse
import json
from pathlib import Path

from dummy_configs import HEAD_SIZE, MODELS, Config, Model

SHRUNK_HEADS, SHRUNK_KV_HEADS, SHRUNK_LAYERS = 4, 2, 2

CHAT_TEMPLATE = """\
{{% for m in messages %}}{start}{{{{ m.role }}}}
{{% if m.content is string %}}{{{{ m.content }}}}{{% else %}}{{% for part in m.content %}}\
{{% if part.type in ['image', 'image_url'] %}}{image}\
{{% elif part.type == 'text' %}}{{{{ part.text }}}}{{% endif %}}{{% endfor %}}{{% endif %}}{end}
{{% endfor %}}{{% if add_generation_prompt %}}{start}assistant
{{% endif %}}"""


def text_config(model: Model, config: Config) -> Config:
    """The part of a configuration that describes the language model; a view, not a copy."""
    return config[model.text_key] if model.text_key else config


def shrink(model: Model, config: Config) -> None:
    """Cut depth and width, in place; head size, vocabulary and RoPE stay."""
    width = SHRUNK_HEADS * HEAD_SIZE
    text_config(model, config).update(
        num_hidden_layers=SHRUNK_LAYERS,
        num_attention_heads=SHRUNK_HEADS,
        num_key_value_heads=SHRUNK_KV_HEADS,
        hidden_size=width,
        intermediate_size=width,
    )
    if "num_experts" in text_config(model, config):
        text_config(model, config).update(num_experts=8, num_experts_per_tok=2)
    vision = config.get("vision_config")
    if vision is None:
        return
    layers = "depth" if "depth" in vision else "num_hidden_layers"
    vision[layers] = SHRUNK_LAYERS + 1  # one more than LLaVA leaves out
    if "embed_dim" in vision:  # Qwen2-VL: hidden_size is what it hands to the language model
        vision.update(embed_dim=160, num_heads=2, hidden_size=width)
    elif "out_hidden_size" in vision:
        vision.update(hidden_size=144, intermediate_size=144, num_heads=2, out_hidden_size=width)
        vision.update(deepstack_visual_indexes=[0, 1, 2])
    else:
        vision.update(hidden_size=128, intermediate_size=128, num_attention_heads=2)


def write_tokenizer(model: Model, vocab_size: int, folder: Path) -> None:
    """One token per byte, fillers, special tokens: every id of the vocabulary has a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    special = set(model.special.values())
    texts = iter(sorted(pre_tokenizers.ByteLevel.alphabet()))
    vocabulary = {
        model.special.get(number) or next(texts, None) or f"filler{number}": number
        for number in range(vocab_size)
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in sorted(special)])
    assert tokenizer.get_vocab_size() == vocab_size
    tokenizer.save(str(folder / "tokenizer.json"))
    start, end, image = model.roles
    template = CHAT_TEMPLATE.format(start=start, end=end, image=image)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_json(
        folder / "tokenizer_config.json",
        settings | model.tokenizer | {"chat_template": template},
    )
    (folder / "chat_template.jinja").write_text(template)


def write_json(file: Path, content: Config) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")


def make(name: str, outdir: Path, *, shrunk: bool = False) -> Path:
    """Write one model's folder below ``outdir`` and return it.

    Raises:
        ValueError: there is no such model.
    """
    if name not in MODELS:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}, got {name!r}")
    model = MODELS[name]
    config = model.config()
    if shrunk:
        shrink(model, config)
    folder = Path(outdir) / (f"{name}-shrunk" if shrunk else name)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    for file, content in model.files.items():
        write_json(folder / file, content)
    write_tokenizer(model, text_config(model, config)["vocab_size"], folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("outdir", type=Path)
    parser.add_argument("models", nargs="*", metavar="model", help=", ".join(MODELS))
    parser.add_argument("--shrink", action="store_true", help="two narrow layers instead of all")
    args = parser.parse_args()
    for name in args.models or MODELS:
        print(make(name, args.outdir, shrunk=args.shrink))


if __name__ == "__main__":
    main()
