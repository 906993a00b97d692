# SPDX-License-Identifier: Apache-2.0
"""The benchmark's folders of well-known models: right sizes, and vLLM serves them."""

import pytest
from dummy_models import MODELS, make
from engine import BLOCK_SIZE, Method, Stepper, engine, greedy, held_blocks, random_prompt

# total parameters as published, in units of 1e9, to the digits that are
PARAMETERS = {
    "llama-3.1-8b": 8.03,
    "qwen2-vl-7b": 8.29,
    "qwen3-vl-30b-a3b": 31.1,
    "llava-next-mistral-7b": 7.57,
}
# methods are compared on these: layers, query heads, KV heads, head size
SHAPES = {
    "llama-3.1-8b": (32, 32, 8, 128),
    "qwen2-vl-7b": (28, 28, 4, 128),
    "qwen3-vl-30b-a3b": (48, 32, 4, 128),
    "llava-next-mistral-7b": (32, 32, 8, 128),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """``folder(name, shrunk)``: of one model."""
    base = tmp_path_factory.mktemp("dummy")

    def build(name: str, shrunk: bool) -> str:
        return str(make(name, base, shrunk=shrunk))

    return build


@pytest.mark.parametrize("name", MODELS)
def test_sizes(folder, name):
    """Transformers reads the configuration and counts the published number of parameters."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder(name, shrunk=False))
    with torch.device("meta"):
        model = getattr(transformers, config.architectures[0])(config)
    numel = sum(p.numel() for p in model.parameters())
    assert numel / 1e9 == pytest.approx(PARAMETERS[name], rel=0.005)
    text = config.get_text_config()
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    shape = text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads, head_size
    assert shape == SHAPES[name]


@pytest.mark.parametrize("name", MODELS)
def test_serves(folder, name):
    """Two layers of it, weights drawn by vLLM: a long prompt, or an image, is compressed."""
    from PIL import Image

    start, end, image = MODELS[name].roles
    prompt = random_prompt(300, seed=1)
    if image:
        prompt = {
            "prompt": f"{start}user\n{image}What is this?{end}\n{start}assistant\n",
            "multi_modal_data": {"image": Image.new("RGB", (448, 448), "teal")},
        }
    settings = {
        "load_format": "dummy",
        "dtype": "bfloat16",
        "max_num_batched_tokens": 4096,
        "max_model_len": 4096,
        "max_num_seqs": 2,
    }
    with engine(folder(name, shrunk=True), Method("bacon+adakv", 64), **settings) as llm:
        stepper = Stepper(llm)
        stepper.add("a", prompt, greedy(4))
        length = len(stepper.prompts["a"])
        assert length > 190  # the budget is 64
        stepper.run_until(lambda: len(stepper.partial.get("a", ())) == 3)
        assert held_blocks(stepper, "a") <= 5 < length // BLOCK_SIZE
        assert len(stepper.run()["a"].token_ids) == 4
