# SPDX-License-Identifier: Apache-2.0
"""The elite window: published numbers, plain loops over random prompts, and odd prompts."""

import lcg
import numpy as np
import pytest
import torch
from images import WINDOW, Prompt, batch_of

from vllm_kvcompress.prompt import MAX_INSTRUCTION_LEN
from vllm_kvcompress.scoring import LayerTrace, ScoringContext
from vllm_kvcompress.scoring.aircache import AirCache, visual_attention


def worked_example(layer: int) -> ScoringContext:
    return lcg.layer_context(layer, 3, LayerTrace())


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def expected(prompt: Prompt, elite=0.9, scope="head", softcap=0.0) -> np.ndarray:
    """Attention of the elite by query head, [Hq, P], by loops in float64."""
    num_q, length, head_size = prompt.q.shape
    group = num_q // prompt.k.shape[0]
    q, k = prompt.q.astype(np.float64), np.repeat(prompt.k.astype(np.float64), group, axis=0)
    logits = np.einsum("hid,hjd->hij", q, k) * head_size**-0.5
    if softcap:
        logits = softcap * np.tanh(logits / softcap)
    visual = np.flatnonzero(prompt.segment >= 0)
    text = np.arange(length - prompt.facts.num_instruction_tokens(WINDOW), length)
    a = np.stack([softmax(logits[h, -1, text]) for h in range(num_q)])
    if scope == "layer":
        a[:] = a.mean(0)
    out = np.zeros((num_q, length))
    for h in range(num_q):
        chosen = text[a[h] >= elite * a[h].max()]
        for i in chosen:
            columns = sorted({*visual.tolist(), *(j for j in chosen if j <= i)})
            probs = dict(zip(columns, softmax(logits[h, i, columns]), strict=True))
            out[h, visual] += [probs[t] / len(chosen) for t in visual]
    return out


class TestPublishedNumbers:
    @pytest.mark.parametrize(
        ("elite", "layer", "chosen"),
        [
            (0.9, 0, [{8}, {10}, {9}, {10}]),
            (0.9, 1, [{8}, {9}, {8}, {9}]),
            (0.9, 2, [{10}, {10}, {10}, {8}]),
            (0.6, 0, [{8, 10}, {10}, {9}, {9, 10}]),
        ],
    )
    def test_elite(self, elite, layer, chosen):
        """Attention is the same as with rows of the elite alone."""
        q, k, _ = lcg.queries_keys_values()
        images = [(2, 5), (5, 8)]
        got = visual_attention(worked_example(layer), elite, "head")[0]
        for h, elite_rows in enumerate(chosen):
            logits = q[layer, h] @ k[layer, h // 2].T * lcg.SCALE
            want = np.zeros(lcg.LENGTH)
            for i in elite_rows:
                columns = [*lcg.VISUAL, *(j for j in sorted(elite_rows) if j <= i)]
                probs = softmax(logits[i, columns])[: len(lcg.VISUAL)]
                want[list(lcg.VISUAL)] += probs / len(elite_rows)
            np.testing.assert_allclose(got[h], want, rtol=1e-5)
        prompt = Prompt(q[layer], k[layer], images)
        np.testing.assert_allclose(got, expected(prompt, elite), rtol=1e-5)

    @pytest.mark.parametrize(
        ("scope", "head", "scores"),
        [
            ("head", 0, ".077602 .236535 .292734 .148220 .134756 .045880"),
            ("head", 1, ".041095 .096580 .206929 .437996 .012374 .005602"),
            ("layer", 0, ".093821 .084068 .258800 .112792 .058647 .264063"),
        ],
    )
    def test_scores(self, scope, head, scores):
        result = AirCache(elite_scope=scope).score(worked_example(0))
        assert result.final[0, head, 2:8].tolist() == pytest.approx(lcg.published(scores), abs=6e-7)
        assert result.base.equal(result.final)

    def test_attention_of_the_last_row_on_the_text(self):
        """The favourite of the first head is so far ahead that others come in below .65 of it."""
        attention = lcg.published(".514810 .119888 .330866 .034436")
        second = attention[2] / attention[0]
        scores = [
            visual_attention(worked_example(0), elite, "head")[0, 0]
            for elite in (second - 1e-4, second + 1e-4, 0.9)
        ]
        assert not scores[0].equal(scores[1])
        assert scores[1].equal(scores[2])


RAGGED = [
    Prompt.random(1, 23, [(3, 9)]),
    Prompt.random(2, 70, [(0, 10), (10, 21), (30, 33)]),
    Prompt.random(3, 41, [(5, 40)]),
]


class TestAgainstLoops:
    @pytest.mark.parametrize("scope", ["head", "layer"])
    @pytest.mark.parametrize("elite", [0.0, 0.3, 0.9, 1.0])
    @pytest.mark.parametrize("groups", [(4, 4), (4, 2), (4, 1)])
    def test_ragged_batch(self, elite, scope, groups):
        """Rows of up to 37 text tokens: more than are looked at in one go."""
        num_q, num_kv = groups
        prompts = [
            Prompt.random(seed, p.length, p.images, num_q, num_kv) for seed, p in enumerate(RAGGED)
        ]
        got = AirCache(elite=elite, elite_scope=scope).score(batch_of(prompts)).final
        for i, prompt in enumerate(prompts):
            want = expected(prompt, elite, scope).reshape(num_kv, -1, prompt.length).mean(1)
            np.testing.assert_allclose(got[i, :, : prompt.length], want, rtol=2e-5, atol=1e-9)
            assert got[i, :, prompt.length :].eq(0).all()

    def test_softcap(self):
        got = visual_attention(batch_of(RAGGED, softcap=1.5), 0.9, "head")
        want = expected(RAGGED[0], softcap=1.5)
        np.testing.assert_allclose(got[0, :, : RAGGED[0].length], want, rtol=2e-5)
        assert not np.allclose(want, expected(RAGGED[0]), rtol=1e-2)

    def test_long_instructions_are_cut(self):
        prompt = Prompt.random(4, MAX_INSTRUCTION_LEN + 40, [(2, 9)])
        assert prompt.facts.num_instruction_tokens(WINDOW) == MAX_INSTRUCTION_LEN
        got = visual_attention(batch_of([prompt]), 0.2, "head")[0]
        np.testing.assert_allclose(got, expected(prompt, 0.2), rtol=2e-5, atol=1e-9)


class TestBatches:
    @pytest.mark.parametrize("scope", ["head", "layer"])
    def test_together_equals_alone(self, scope):
        scorer = AirCache(elite=0.5, elite_scope=scope)
        both = scorer.score(batch_of(RAGGED)).final
        for i, prompt in enumerate(RAGGED):
            alone = scorer.score(batch_of([prompt])).final[0]
            torch.testing.assert_close(both[i, :, : prompt.length], alone, rtol=1e-5, atol=1e-8)

    def test_garbage_does_not_leak(self):
        results = [
            AirCache(elite=0.5).score(batch_of(RAGGED, garbage)).final
            for garbage in (0.0, float("nan"), float("inf"))
        ]
        assert all(result.equal(results[0]) for result in results)

    def test_heads_of_other_ranks_count_in_layer_scope(self):
        """Two ranks, each with half of the heads, exchange one mean."""
        prompt = RAGGED[0]
        halves = [Prompt(prompt.q[h : h + 2], prompt.k[h // 2 : h // 2 + 1], prompt.images)
                  for h in (0, 2)]  # fmt: skip
        means = []

        def gather(values):
            means.append(values.mean(1))
            return means[-1]

        for half in halves:
            visual_attention(batch_of([half], mean_over_heads=gather), 0.6, "layer")
        whole = torch.stack(means).mean(0)
        split = [
            visual_attention(batch_of([half], mean_over_heads=lambda _: whole), 0.6, "layer")
            for half in halves
        ]
        one = visual_attention(batch_of([prompt]), 0.6, "layer")
        torch.testing.assert_close(torch.cat(split, dim=1), one)


class TestOddPrompts:
    @pytest.mark.parametrize("images", [[], [(4, 5)], [(4, 6)], [(0, 3), (12, 20)]], ids=str)
    def test_few_visual_tokens_and_an_image_at_the_end(self, images):
        prompt = Prompt.random(5, 20, images)
        got = visual_attention(batch_of([prompt, RAGGED[1]]), 0.9, "head")[0]
        np.testing.assert_allclose(got[:, :20], expected(prompt), rtol=2e-5, atol=1e-9)
        assert got.isfinite().all()

    def test_constant_keys_make_everyone_elite(self):
        prompt = Prompt.random(6, 20, [(2, 8)])
        prompt.k[:] = 0.5
        got = visual_attention(batch_of([prompt]), 0.9, "head")[0, :, 2:8]
        mean = np.mean([1 / (6 + seen) for seen in range(1, 13)])
        np.testing.assert_allclose(got, np.full((4, 6), mean), rtol=1e-5)

    def test_a_nan_key_spoils_its_own_head_only(self):
        prompt, spoiled = (Prompt.random(7, 30, [(2, 8)]) for _ in range(2))
        spoiled.k[1, 4] = np.nan
        clean = AirCache().score(batch_of([prompt])).final[0]
        dirty = AirCache().score(batch_of([spoiled])).final[0]
        assert dirty[0].equal(clean[0])
        assert dirty[1, 2:8].isnan().all()


@pytest.mark.parametrize("options", [{"elite": 1.5}, {"elite": -1}, {"elite_scope": "model"}])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        AirCache(**options)


def test_only_the_last_token_is_kept_for_sure():
    assert AirCache().num_recent(32, 100) == 1
    assert AirCache.visual_only
