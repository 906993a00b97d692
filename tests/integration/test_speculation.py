# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding without a drafter model: drafts change the speed, never the text.

Verification brings several tokens of a request at a time. Each attends to the head pages and to the
drafts before it, and rejected drafts are overwritten. What answers have to be is found without
speculation, at the same budget.
"""

import functools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from drafting import Guesser, acceptance
from engine import (
    Answer,
    Method,
    Stepper,
    assert_clean,
    assert_same,
    engine,
    free_blocks,
    generate,
    greedy,
    model_runner,
    random_prompt,
    scheduler_of,
)
from llvmlite.binding import ffi
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.spec_decode.ngram_proposer import NgramProposer

from vllm_kvcompress.adapter.builder import CompressedBuilder

UNIFORM = Method("snapkv", 96)
UNEVEN = Method("bacon+adakv", 96, options=(("alpha", 0.0),))
PROMPTS = [random_prompt(length, seed=31) for length in (290, 333, 200, 256, 129, 70)]
DECODE = 24
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}
SUFFIX = {"method": "suffix", "num_speculative_tokens": 4, "suffix_decoding_min_token_prob": 0.01}


class _Scannable(type(ffi.lib)):  # type: ignore[misc]
    """vLLM 0.32 looks into all modules when a CPU worker starts, and stumbles over this object.

    It is there once numba is, which the first engine with n-grams imports: none could follow in the
    same process.
    """

    __slots__ = ()
    __dict__ = property(lambda self: {})  # type: ignore[assignment]


ffi.lib.__class__ = _Scannable


@functools.cache
def without(model: str, method: Method) -> list[Answer]:
    with engine(model, method, enable_prefix_caching=False) as llm:
        return generate(llm, PROMPTS, greedy(DECODE))


def draft(patch: pytest.MonkeyPatch, answers: list[Answer], seed: int = 4) -> None:
    """Let drafts be parts of these answers, some of them spoilt."""
    known = [[*prompt, *answer.token_ids] for prompt, answer in zip(PROMPTS, answers, strict=True)]
    patch.setattr(NgramProposer, "propose", Guesser(known, seed).for_runner_v1())


@pytest.fixture(scope="module")
def model(checkpoint) -> str:
    return checkpoint("llama")


@pytest.fixture(scope="module")
def uneven(model):
    """An engine with drafts, and its free blocks."""
    with pytest.MonkeyPatch.context() as patch:
        draft(patch, without(model, UNEVEN))
        settings = {"speculative_config": NGRAM, "max_num_batched_tokens": 128}
        with engine(model, UNEVEN, **settings) as llm:
            yield llm, free_blocks(llm)


def test_equals_decoding_without_drafts(model, uneven, capsys):
    """Prompts in chunks, then again with prefix hits, then one of them alone."""
    llm, free = uneven
    waves = [generate(llm, prompts, greedy(DECODE)) for prompts in (PROMPTS, PROMPTS[::-1])]
    waves.append(generate(llm, PROMPTS[:1], greedy(DECODE)))
    drafts = acceptance(llm)
    expected = without(model, UNEVEN)
    for wave, wanted in zip(waves, (expected, expected[::-1], expected[:1]), strict=True):
        assert_same(wave, wanted)
    assert any(answer.num_cached_tokens for answer in waves[1])
    with capsys.disabled():
        print(f"\ndrafts: {drafts.accepted} of {drafts.proposed} accepted")
    assert 0 < drafts.accepted < drafts.proposed
    Stepper(llm).flush()
    assert_clean(llm, free)


def test_preempted_after_a_step(model, uneven):
    """With drafts under way, in the step of the compression and around it."""
    llm, free = uneven
    for steps in (3, 4, 5, 7, 8, 10):
        stepper = Stepper(llm)
        for index in range(3):
            stepper.add(str(index), PROMPTS[index], greedy(DECODE))
        for _ in range(steps):
            stepper.step()
        assert llm.llm_engine.reset_prefix_cache(reset_running_requests=True)
        stepper.run()
        answers = [stepper.done[str(index)] for index in range(3)]
        assert_same(answers, without(model, UNEVEN)[:3])
        assert_clean(llm, free)


def test_batches_as_graphs_see_them(model, uneven, monkeypatch):
    """Steps that a full graph could replay are per-head batches, whoever is compressed."""
    llm, free = uneven
    [[group]] = model_runner(llm).attn_groups
    builder = group.get_metadata_builder()
    seen = []
    original = CompressedBuilder._decode_batch

    def decode_batch(self, cam, slots, max_seq_len, query_len):
        seen.append((query_len, cam.num_reqs))
        return original(self, cam, slots, max_seq_len, query_len)

    def all_drafts(self, most, sampled_token_ids, *args, **kwargs):
        return [[5] * most if sampled else [] for sampled in sampled_token_ids]

    monkeypatch.setattr(builder, "replays_graphs", True)
    monkeypatch.setattr(CompressedBuilder, "_decode_batch", decode_batch)
    monkeypatch.setattr(NgramProposer, "propose", all_drafts)
    answers = generate(llm, PROMPTS, greedy(DECODE))
    assert_same(answers, without(model, UNEVEN))
    assert (4, len(PROMPTS)) in seen, "all together, each with three drafts"
    Stepper(llm).flush()
    assert_clean(llm, free)


def test_padding_of_a_graph(uneven):
    """Rows without tokens stand behind the sequences of the others, whatever their length."""
    llm, _ = uneven
    [[group]] = model_runner(llm).attn_groups
    builder = group.get_metadata_builder()
    cams = []
    per_head, heads = builder.per_head_builder, builder.num_kv_heads
    original = per_head.build
    vars(per_head)["build"] = lambda prefix, cam, fast_build=False: cams.append(cam)
    try:
        cam = padded_batch(builder, real=2, padding=1, query_len=4)
        nobody = np.full(3, builder.layers.state.num_slots)
        batch = builder._decode_batch(cam, nobody, 64, 4)
        batch.metadata_of(0)
    finally:
        per_head.build = original
    starts = cams[0].query_start_loc.tolist()
    assert starts == [min(4 * i, 8 * heads) for i in range(3 * heads + 1)]
    assert cams[0].max_query_len == batch.query_len == 4
    assert cams[0].num_actual_tokens == 12 * heads


def padded_batch(builder, real: int, padding: int, query_len: int) -> CommonAttentionMetadata:
    """Common metadata of ``real`` requests and of ``padding`` rows of a graph."""
    num_reqs = real + padding
    starts = torch.arange(num_reqs + 1, dtype=torch.int32).clamp(max=real) * query_len
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.full((num_reqs,), 40, dtype=torch.int32),
        num_reqs=num_reqs,
        num_actual_tokens=num_reqs * query_len,
        max_query_len=query_len,
        max_seq_len=40,
        block_table_tensor=torch.zeros(num_reqs, builder.max_num_blocks, dtype=torch.int32),
        slot_mapping=torch.zeros(num_reqs * query_len, dtype=torch.int64),
    )


def test_replays_are_compressed_where_the_first_life_was(model, monkeypatch):
    """Under pressure: in the middle of an answer, between two steps that verify drafts."""
    method = Method("bacon+adakv", 64, options=(("alpha", 0.0), ("when", "pressure:0.3")))
    settings = {
        "speculative_config": NGRAM,
        "max_model_len": 1024,
        "num_gpu_blocks_override": 41,
        "enable_prefix_caching": False,
    }
    draft(monkeypatch, without(model, UNEVEN))
    answers, places = [], []
    with engine(model, method, **settings) as llm:
        free, policy = free_blocks(llm), scheduler_of(llm).compression
        for forced in (False, True):
            draft(monkeypatch, without(model, UNEVEN))
            stepper = Stepper(llm)
            stepper.add("a", PROMPTS[0], greedy(60))
            req_id = stepper.internal["a"]
            stepper.run_until(lambda s=stepper: len(s.partial.get("a", ())) >= 10)
            assert req_id not in policy.boundaries
            stepper.add("b", PROMPTS[1], greedy(60))
            stepper.run_until(lambda r=req_id: r in policy.boundaries)
            places.append(policy.boundaries[req_id])
            for _ in range(4):
                stepper.step()
            if forced:
                stepper.preempt(stepper.request("a"))
            stepper.run()
            assert_clean(llm, free)
            answers.append(stepper.done["a"])
    assert places[0] == places[1] > len(PROMPTS[0]) + 5
    assert_same([answers[1]], [answers[0]])


def test_suffix_decoding(model, monkeypatch, capsys):
    """With Arctic Inference's own suffix trees where they are installed, else with a plain search.

    The answers are asked for twice: the second time, suffixes of the first ones are found.
    """
    try:
        import arctic_inference  # noqa: F401
    except ImportError:
        monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parent / "suffix_search")])
    with engine(model, UNIFORM, speculative_config=SUFFIX, max_num_batched_tokens=64) as llm:
        free = free_blocks(llm)
        waves = [generate(llm, PROMPTS, greedy(DECODE)) for _ in range(2)]
        drafts = acceptance(llm)
        Stepper(llm).flush()
        assert_clean(llm, free)
    for wave in waves:
        assert_same(wave, without(model, UNIFORM))
    with capsys.disabled():
        print(f"\ndrafts: {drafts.accepted} of {drafts.proposed} accepted")
    assert 0 < drafts.accepted < drafts.proposed
