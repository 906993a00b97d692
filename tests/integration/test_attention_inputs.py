# SPDX-License-Identifier: Apache-2.0
"""Methods that look at attention inputs, on models whose layers are not all alike.

Sliding layers may have other query widths than the compressed ones, and compressed layers may have
no RoPE: their queries, and those of coming tokens, are not rotated.
"""

import functools
from pathlib import Path

import pytest
import tiny_families
import tiny_models
from engine import (
    Answer,
    Method,
    Stepper,
    assert_same,
    block_pool,
    check_pool,
    compressed_layers,
    compressed_manager,
    differ,
    engine,
    free_blocks,
    generate,
    model_runner,
    random_prompt,
)
from float_noise import measured_tolerance
from oracle import Oracle, OracleConfig
from subprocesses import result_of, run_python
from vllm.model_executor.models.llama import LlamaAttention

from vllm_kvcompress.adapter.attention_inputs import inputs_of
from vllm_kvcompress.config import KVCompressionError

PROMPTS = [random_prompt(length, seed=71) for length in (400, 70, 257)]
ROTATES = {"gemma4": True, "cohere2": False, "exaone4": False}
by_family = pytest.mark.parametrize("family", tiny_families.SLIDING_FAMILIES)
by_scorer = pytest.mark.parametrize("scorer", ["expected", "shiftkv"])


@pytest.fixture(scope="module")
def model(checkpoint):
    """``model(family)``: four layers, two of them compressed."""
    # the logits of Gemma 4 are not scaled down
    settings = {"gemma4": {"sharpness": 0.5}}
    return lambda family: checkpoint(
        family, layers=4, query_heads=4, kv_heads=2, **settings.get(family, {})
    )


@functools.cache
def tolerance(model: str) -> float:
    return measured_tolerance(model, PROMPTS)


@functools.cache
def oracle(model: str) -> Oracle:
    return Oracle(model)


@by_family
@by_scorer
def test_equals_oracle(model, family, scorer):
    """In chunks, and with what the layers are told of their neighbours."""
    folder = model(family)
    with engine(folder, Method(scorer, 96), max_num_batched_tokens=150) as llm:
        free = free_blocks(llm)
        answers = generate(llm, PROMPTS)
        Stepper(llm).flush()
        assert free_blocks(llm) == free
        check_pool(block_pool(llm))
        compressed = compressed_layers(llm).facts.modules
        assert len(compressed) == 2
        for layer in compressed:
            assert (inputs_of(layer).rotary_emb is not None) == ROTATES[family]
        assert_only_hooked(llm, compressed)
    config = OracleConfig(budget=96, scorer=scorer)
    expected = [oracle(folder).generate(prompt, 8, config) for prompt in PROMPTS]
    assert_same(answers, expected, tolerance(folder))


def assert_only_hooked(llm, compressed) -> None:
    """Modules that compressed layers do not use have no hooks of ours."""
    used = {inputs_of(layer).qkv_proj for layer in compressed}
    used |= {inputs_of(layer).rotary_emb for layer in compressed} - {None}
    hooked = {m for m in model_runner(llm).get_model().modules() if m._forward_pre_hooks}
    assert hooked == used


def test_rotated_proxies_are_noticed(model, monkeypatch):
    """The answers of test_equals_oracle depend on where proxies are rotated to."""
    with engine(model("exaone4"), Method("shiftkv", 96)) as llm:
        expected = generate(llm, PROMPTS[:1])
        (rotating,) = {
            m for m in model_runner(llm).get_model().modules() if hasattr(m, "cos_sin_cache")
        }
        for layer in compressed_layers(llm).facts.modules:
            monkeypatch.setattr(inputs_of(layer), "rotary_emb", rotating)
        llm.reset_prefix_cache()
        assert differ(generate(llm, PROMPTS[:1]), expected)


def test_heads_are_those_of_the_compressed_layers(model):
    """Sliding layers of Gemma 4 have more KV heads; the configuration names those."""
    with engine(model("gemma4"), Method("snapkv", 96)) as llm:
        assert model_runner(llm).model_config.get_total_num_kv_heads() == 4
        spec = compressed_manager(llm).kv_cache_spec
        assert (spec.num_layers, spec.model_kv_heads) == (2, 2)
        generate(llm, PROMPTS[:1])
        layers = compressed_layers(llm)
        kept = layers.waiting._queries
        assert kept.nbytes == layers.num_layers * layers.num_entries * spec.entry_bytes


def test_other_ways_to_make_queries_are_refused(checkpoint, monkeypatch):
    """What a layer does is tried when the engine starts, not believed."""

    class Doubled(LlamaAttention):
        def forward(self, positions, hidden_states):
            qkv, _ = self.qkv_proj(hidden_states)
            q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
            q, k = self.rotary_emb(positions, q, k)
            return self.o_proj(self.attn(2 * q, k, v))[0]

    monkeypatch.setattr(LlamaAttention, "forward", Doubled.forward)
    with (
        pytest.raises(KVCompressionError, match=r"layers\.0.*makes its queries.*such as bacon"),
        engine(checkpoint("llama"), Method("expected", 96)),
    ):
        pass


DUMMY = """
import json
from engine import Method, compressed_layers, engine, generate
from test_attention_inputs import PROMPTS, assert_only_hooked
if __name__ == "__main__":
    with engine({model!r}, Method("shiftkv", 96), load_format="dummy") as llm:
        compressed = compressed_layers(llm).facts.modules
        assert_only_hooked(llm, compressed)
        answers = [generate(llm, PROMPTS), [generate(llm, [prompt])[0] for prompt in PROMPTS]]
        heads = [layer.num_heads for layer in compressed]
        print(json.dumps([heads, [[[a.token_ids, a.logprobs] for a in w] for w in answers]]))
"""


def test_unlike_numbers_of_heads(tmp_path):
    """Step-3.5's sliding layers have more query heads than its full ones; random weights.

    In a process of its own: a model with experts needs process groups that others do not make.
    """
    done = run_python(DUMMY.format(model=step3p5(tmp_path)), timeout=600)
    heads, answers = result_of(done)
    assert heads == [4, 4]
    together, alone = ([Answer(*answer) for answer in wave] for wave in answers)
    assert_same(together, alone)


def step3p5(folder: Path) -> str:
    """A checkpoint without weights."""
    tiny_models.TOKENIZER.save(str(folder / "tokenizer.json"))
    tiny_models.write_json(
        folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"}
    )
    tiny_models.write_json(
        folder / "config.json",
        {
            "architectures": ["Step3p5ForCausalLM"],
            "model_type": "step3p5",
            "vocab_size": tiny_models.VOCAB_SIZE,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_attention_groups": 2,
            "head_dim": 32,
            "max_position_embeddings": 4096,
            "max_seq_len": 4096,
            "rope_theta": 1e6,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
            "sliding_window": 64,
            "attention_other_setting": {
                "attention_type": "sliding_attention",
                "num_attention_heads": 8,
                "num_attention_groups": 2,
                "head_dim": 32,
            },
            "moe_layers_enum": "3",
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "moe_intermediate_size": 32,
            "share_expert_dim": 64,
            "tie_word_embeddings": False,
        },
    )
    return str(folder)
