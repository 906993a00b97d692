# SPDX-License-Identifier: Apache-2.0
"""Requests that choose their own settings: each is served as an engine with these would do it."""

import copy
from typing import Any

import pytest
from engine import (
    BLOCK_SIZE,
    Answer,
    Method,
    Stepper,
    answer_of,
    as_prompt,
    assert_clean,
    assert_same,
    compressed_manager,
    engine,
    free_blocks,
    generate,
    greedy,
    held_blocks,
    random_prompt,
)
from every_method import reconfigure
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine import EngineCoreRequest

from vllm_kvcompress.pipeline import CompressionPipeline

ALLOW = ["off", "budget", "window", "when", "bacon+adakv", "h2o", "snapkv+pyramid"]
OWN: dict[str, Any] = {"method": "snapkv", "budget": 96, "window": 32}
SETTINGS: list[tuple[dict[str, Any], dict[str, Any] | None]] = [
    ({}, OWN),
    ({"kv_compression": "off"}, None),
    ({"kv_budget": 64, "kv_window": 16}, OWN | {"budget": 64, "window": 16}),
    (
        {"kv_compression": "bacon+adakv", "kv_budget": "25%"},
        {"method": "bacon+adakv", "budget": "25%", "window": 32},
    ),
    ({"kv_compression": "h2o"}, {"method": "h2o", "window": 32}),
    (
        {"kv_compression": "snapkv+pyramid", "kv_budget": 128},
        {"method": "snapkv+pyramid", "budget": 128, "window": 32},
    ),
]
"""What a request asks for, and the settings of an engine that is asked nothing; None: stock."""

ENGINE = {"max_num_batched_tokens": 512, "max_num_seqs": 16}
PROMPTS = [random_prompt(330 + 23 * index, seed=83) for index in range(2 * len(SETTINGS))]
WAVES = [
    [(PROMPTS[i], i % len(SETTINGS)) for i in range(len(PROMPTS))],
    # prompts that others have left in the prefix cache, and their own
    [(PROMPTS[i], (i + 1) % len(SETTINGS)) for i in range(len(PROMPTS))],
]


def params(asked: dict[str, Any], max_tokens: int = 8):
    return greedy(max_tokens, extra_args=asked or None)


def together(llm, wave) -> list[tuple[Answer, dict | None]]:
    """One batch of requests with their own settings: answers, and what they are told."""
    wishes = [copy.deepcopy(params(SETTINGS[chosen][0])) for _, chosen in wave]
    outputs = llm.generate([as_prompt(prompt) for prompt, _ in wave], wishes, use_tqdm=False)
    return [(answer_of(output), output.kv_transfer_params) for output in outputs]


@pytest.fixture(scope="module")
def mixed(checkpoint):
    """The engine whose requests choose."""
    method = Method(OWN["method"], OWN["budget"], OWN["window"], (("allow", ALLOW),))
    with engine(checkpoint("llama"), method, **ENGINE) as llm:
        yield llm


@pytest.fixture(scope="module")
def alone(checkpoint, mixed):
    """``alone(prompt, chosen)``: the answer of an engine with these settings to this one request.

    Those that compress are one engine, which is reconfigured; it has no prefix cache.
    """
    with (
        engine(checkpoint("llama"), **ENGINE) as stock,
        engine(
            checkpoint("llama"),
            Method("h2o+pyramid", 96, 32),
            enable_prefix_caching=False,
            **ENGINE,
        ) as other,
    ):
        known: dict[tuple[tuple[int, ...], int], Answer] = {}

        def answer(prompt: list[int], chosen: int) -> Answer:
            key = tuple(prompt), chosen
            if key not in known:
                raw = SETTINGS[chosen][1]
                if raw is not None:
                    reconfigure(other, raw)
                [known[key]] = generate(stock if raw is None else other, [prompt])
            return known[key]

        yield answer


def test_mixed_batches_equal_engines_of_their_own(mixed, alone, monkeypatch):
    calls: list[int] = []
    original = CompressionPipeline.compress

    def compress(self, prompts, stack):
        calls.append(len(prompts.block_table))
        return original(self, prompts, stack)

    free = free_blocks(mixed)
    for number, wave in enumerate(WAVES):
        with monkeypatch.context() as patched:
            patched.setattr(CompressionPipeline, "compress", compress)
            found = together(mixed, wave)
        assert_same([got for got, _ in found], [alone(*request) for request in wave])
        cached = [got.num_cached_tokens for got, _ in found]
        assert any(cached) is bool(number)
        assert all(cached[i] == 0 for i, (_, chosen) in enumerate(wave) if chosen == 4)  # h2o
    # one step ends prompts of several requests, and each kind goes in one call
    assert sum(calls) == 2 * 10
    Stepper(mixed).flush()
    assert_clean(mixed, free)


def test_off_is_stock(mixed, checkpoint):
    """The same blocks and the same hits, even on what compressed requests have left."""
    prompt = random_prompt(700, seed=84)
    waves = []
    with engine(checkpoint("llama"), **ENGINE) as stock:
        for llm in (stock, mixed):
            wish = params({"kv_compression": "off"} if llm is mixed else {}, 40)
            waves.append([generate(llm, [prompt], wish)[0] for _ in range(2)])
    expected, got = waves
    assert_same(got, expected)
    assert [a.num_cached_tokens for a in got] == [a.num_cached_tokens for a in expected]
    assert got[1].num_cached_tokens == 700 // BLOCK_SIZE * BLOCK_SIZE


def test_what_happened_is_told(mixed):
    prompt = random_prompt(500, seed=85)
    told = {}
    for chosen in (0, 1, 2, 4):
        [(_, told[chosen])] = together(mixed, [(prompt, chosen)])
    assert told[0] is None  # asked nothing
    whole = {"method": "off", "outcome": "kept_whole", "prompt_tokens": 500, "kept_tokens": 500}
    assert told[1] == {"kv_compression": whole}
    # 500 = 15 blocks of 32 and a tail of 20; a budget of 64 leaves two of the blocks
    kept = {"method": "snapkv+uniform", "outcome": "compressed", "kept_tokens": 84}
    assert told[2] == {"kv_compression": kept | {"prompt_tokens": 500}}
    assert told[4]["kv_compression"]["kept_tokens"] == 116  # 20 % are 100 tokens: three blocks


def test_preemption_keeps_the_settings(mixed, alone):
    prompt, chosen = PROMPTS[3], 3
    free = free_blocks(mixed)
    stepper = Stepper(mixed)
    for name in ("one", "other"):
        stepper.add(name, prompt, params(SETTINGS[chosen][0]))
        chosen = 2
    stepper.run_until(lambda: stepper.num_computed("one") > len(prompt) + 3)
    before = held_blocks(stepper, "one")
    stepper.preempt(stepper.request("one"))
    done = stepper.run()
    assert before < len(prompt) // BLOCK_SIZE
    assert_same([done["one"], done["other"]], [alone(prompt, 3), alone(prompt, 2)])
    assert_clean(mixed, free)


def test_each_request_has_its_policy(mixed, alone):
    """In a roomy pool, one that waits for pressure keeps its blocks beside one that does not."""
    prompt = random_prompt(600, seed=86)
    stepper = Stepper(mixed)
    stepper.add("waits", prompt, params({"kv_compression_when": "pressure"}, 12))
    stepper.add("first", prompt, params({}, 12))
    stepper.run_until(lambda: stepper.num_computed("first") > len(prompt) + 2)
    assert held_blocks(stepper, "first") < held_blocks(stepper, "waits") == 600 // BLOCK_SIZE + 1
    done = stepper.run()
    assert done["waits"].token_ids[:8] == alone(prompt, 1).token_ids
    assert done["first"].token_ids[:8] == alone(prompt, 0).token_ids


def test_one_pressed_prompt_makes_room(mixed):
    """Its low mark is its own: others above it are left alone."""
    stepper = Stepper(mixed)
    prompt = random_prompt(600, seed=87)
    stepper.add("low", prompt, params({"kv_compression_when": "pressure:0.01"}, 12))
    stepper.add("high", prompt, params({"kv_compression_when": "pressure:0.99"}, 12))
    stepper.run_until(lambda: stepper.num_computed("high") > len(prompt) + 2)
    assert held_blocks(stepper, "low") < held_blocks(stepper, "high") == 600 // BLOCK_SIZE + 1
    stepper.run()


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"kv_budget": 8}, "Nearest valid value: 33"),
        ({"kv_compression": "mixkv"}, "--kv-compression-allow off,budget,window,when,bacon+adakv"),
        ({"kv_bugdet": 64}, "Did you mean 'kv_budget'?"),
    ],
)
def test_bad_wishes_harm_nobody(mixed, asked, expected):
    """Refused before the engine sees the request, and by the engine if it comes another way."""
    stepper, prompt = Stepper(mixed), PROMPTS[0]
    stepper.add("fine", prompt)
    with pytest.raises(VLLMValidationError, match="kv_") as refusal:
        stepper.add("bad", prompt, params(asked))
    assert expected in str(refusal.value)
    request = EngineCoreRequest(
        request_id="unchecked",
        prompt_token_ids=prompt,
        mm_features=None,
        sampling_params=params(asked),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    with pytest.raises(VLLMValidationError):
        mixed.llm_engine.engine_core.add_request(request)
    done = stepper.run()
    assert done.keys() == {"fine"}
    assert compressed_manager(mixed).tracked == {}


def test_a_stock_engine_refuses_wishes(checkpoint):
    with engine(checkpoint("llama"), **ENGINE) as llm:
        with pytest.raises(VLLMValidationError, match="started without --kv-compression"):
            generate(llm, PROMPTS[:1], params({"kv_budget": 64}))
        generate(llm, PROMPTS[:1], params({"kv_compression": "off", "session_id": "a"}))
