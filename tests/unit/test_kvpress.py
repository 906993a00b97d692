# SPDX-License-Identifier: Apache-2.0
"""Scores and kept sets against released code: the presses of kvpress, run by a real model.

kvpress wants an older transformers than vLLM does, so this file runs in an environment of its own:
``make kvpress``. A tiny Llama with random weights prefills a prompt under each press; our scorers
get the tensors of the same prefill, with RoPE computed here, and must rank and keep the same.

Budgets are translated to the token. What differs by design, and is therefore left out:

    SnapKV              pool "max" and reduction "max": kvpress has neither
    PyramidKV           its layer budget includes the window (ours comes on top), is rounded layer
                        by layer (ours conserves the total), and falls back to the same budget for
                        all layers where the top one would get less than the window (ours does not)
    AdaKV               0 < alpha: kvpress forces the best of each head before it counts, we blend
                        counts with a floor; "normalize": kvpress has none
    KeyDiff, Expected   our forced last token
    Expected            M-RoPE: kvpress counts tokens, not positions
"""

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from budgets import tokens_of
from hypothesis import assume, given
from hypothesis import strategies as st
from rivals import kv_press
from whole_call import einsum_compress

from vllm_kvcompress import kernels
from vllm_kvcompress.allocation.adakv import AdaKV
from vllm_kvcompress.allocation.pyramid import Pyramid
from vllm_kvcompress.scoring import LayerTrace
from vllm_kvcompress.scoring.expected import Expected
from vllm_kvcompress.scoring.keydiff import KeyDiff
from vllm_kvcompress.scoring.snapkv import SnapKV
from vllm_kvcompress.scoring.streaming import Streaming
from vllm_kvcompress.testing.inputs import Prompt, context, rotation

kvpress = pytest.importorskip("kvpress", reason="has an environment of its own: make kvpress")

LAYERS = 5
LENGTH = 97
WINDOW = 8
PREFIX = LENGTH - WINDOW

budgets = pytest.mark.parametrize("budget", [13, 40, 90])


class Prefill(NamedTuple):
    """A model after an uncompressed prefill of ``tokens`` [1, P]."""

    model: torch.nn.Module
    tokens: torch.Tensor
    prompt: Prompt


class Released(NamedTuple):
    """What a press made of one layer.

    Attributes:
        scores: [Hkv, P].
        kept: positions that each head keeps.
    """

    scores: torch.Tensor
    kept: list[set[int]]


@pytest.fixture(scope="module", params=[(4, 2, 8), (3, 1, 16), (2, 2, 8)], ids=str)
def prefill(request) -> Prefill:
    """Of a model with so many query heads, KV heads and elements per head."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    num_q, num_kv, size = request.param
    torch.manual_seed(num_q)
    config = LlamaConfig(
        num_hidden_layers=LAYERS,
        num_attention_heads=num_q,
        num_key_value_heads=num_kv,
        head_dim=size,
        hidden_size=32,
        intermediate_size=32,
        vocab_size=64,
        attention_bias=True,
        initializer_range=0.3,  # logits of a few units: attention is neither flat nor one-hot
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).eval()
    tokens = torch.randint(64, (1, LENGTH))
    seen: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["hidden_states"][0]), with_kwargs=True
        )
        for layer in model.model.layers
    ]
    cache = DynamicCache()
    with torch.no_grad():
        model(tokens, past_key_values=cache)
        raw = np.stack(
            [
                layer.self_attn.q_proj(hidden).view(LENGTH, num_q, size).transpose(0, 1).numpy()
                for layer, hidden in zip(model.model.layers, seen, strict=True)
            ]
        )
    for hook in hooks:
        hook.remove()
    turns = np.array([rotation(i, size) for i in range(LENGTH)], dtype=np.float32)
    prompt = Prompt(
        q=np.einsum("tde,lhte->lhtd", turns, raw),
        raw=raw,
        k=np.stack([layer.keys[0].numpy() for layer in cache.layers]),
        v=np.stack([layer.values[0].numpy() for layer in cache.layers]),
        hidden=torch.stack(seen).numpy(),
        segment=np.full(LENGTH, -1),
    )
    return Prefill(model, tokens, prompt)


def released(prefill: Prefill, press) -> list[Released]:
    """Prefill under a press; one entry per layer."""
    from transformers import DynamicCache

    scorer = getattr(press, "press", press)
    scores: list[torch.Tensor] = []
    original = scorer.score

    def recording(*args):
        result = original(*args)
        scores.append(result[0].clone())  # AdaKVPress writes into it
        return result

    scorer.score = recording
    cache = DynamicCache()
    with torch.no_grad(), press(prefill.model):
        prefill.model(prefill.tokens, past_key_values=cache)
    kept = [
        kept_by_mask(layer.self_attn, len(entry)) if press is not scorer else kept_by_key(*pair)
        for layer, entry, *pair in zip(
            prefill.model.model.layers,
            scores,
            (layer.keys[0].numpy() for layer in cache.layers),
            prefill.prompt.k,
            strict=True,
        )
    ]
    return [Released(*pair) for pair in zip(scores, kept, strict=True)]


def kept_by_key(left: np.ndarray, whole: np.ndarray) -> list[set[int]]:
    """Positions in ``whole`` [Hkv, P, D] of the keys ``left`` [Hkv, B, D]."""
    found = (left[:, :, None] == whole[:, None]).all(-1)
    assert (found.sum(2) == 1).all(), "keys are copied, and no two of them are alike"
    return [set(row) for row in found.argmax(2).tolist()]


def kept_by_mask(module: torch.nn.Module, num_heads: int) -> list[set[int]]:
    """Positions that a press did not mask in an attention layer."""
    _, heads, positions = module.masked_key_indices
    dropped = set(zip(heads.tolist(), positions.tolist(), strict=True))
    return [{t for t in range(LENGTH) if (g, t) not in dropped} for g in range(num_heads)]


def ratio(budget: int) -> float:
    """Share to remove of a prompt so that ``int(P * (1 - ratio))`` tokens stay."""
    return 1 - (budget + 0.5) / LENGTH


def ours(prefill: Prefill, layer: int, scorer) -> torch.Tensor:
    """Final scores [Hkv, P]."""
    ctx = context([prefill.prompt], layer, scorer, LayerTrace(), window=WINDOW)
    return scorer.score(ctx).final[0]


def kept(final: torch.Tensor, counts: list[int], candidates: int = PREFIX) -> list[set[int]]:
    """So many of the first ``candidates`` per head, best first, and all tokens after them."""
    pinned = LENGTH - candidates
    rows = kernels.select_tokens(
        final[None],
        torch.tensor([counts]) + pinned,
        torch.tensor([candidates]),
        torch.tensor([LENGTH]),
        max(counts) + pinned,
    )
    return [set(row) - {LENGTH} for row in rows[0].tolist()]


class TestSnapKV:
    @pytest.mark.parametrize("kernel", [1, 5, 7])
    def test_scores(self, prefill, kernel):
        press = kvpress.SnapKVPress(ratio(40), window_size=WINDOW, kernel_size=kernel)
        for layer, theirs in enumerate(released(prefill, press)):
            final = ours(prefill, layer, SnapKV(kernel=kernel))
            torch.testing.assert_close(
                final[:, :PREFIX], theirs.scores[:, :PREFIX], rtol=2e-5, atol=1e-7
            )

    @budgets
    def test_kept_sets(self, prefill, budget):
        """A budget includes the window."""
        press = kvpress.SnapKVPress(ratio(budget), window_size=WINDOW)
        for layer, theirs in enumerate(released(prefill, press)):
            counts = [budget - WINDOW] * len(theirs.kept)
            assert kept(ours(prefill, layer, SnapKV()), counts) == theirs.kept


class TestAdaKV:
    @staticmethod
    def counts(prefill: Prefill, layer: int, allocator: AdaKV, budget: int) -> list[int]:
        base = ours(prefill, layer, SnapKV())[None].clone()
        base[..., PREFIX:] = float("-inf")
        tokens = tokens_of(allocator, base, torch.tensor([PREFIX]), torch.tensor([budget - WINDOW]))
        return tokens[0].tolist()

    @budgets
    @pytest.mark.parametrize("safeguard", [0, 0.08])
    def test_kept_sets(self, prefill, budget, safeguard):
        """A safeguard below W is spent on the window, which every head keeps anyway."""
        snapkv = kvpress.SnapKVPress(ratio(budget), window_size=WINDOW)
        shifted = 0
        for layer, theirs in enumerate(
            released(prefill, kvpress.AdaKVPress(snapkv, alpha_safeguard=safeguard))
        ):
            counts = self.counts(prefill, layer, AdaKV(alpha=0, normalize=False), budget)
            assert kept(ours(prefill, layer, SnapKV()), counts) == theirs.kept
            shifted += len(set(counts)) > 1
        assert shifted or len(counts) == 1, "all heads got the same: nothing was tested"

    def test_everything_is_safe(self, prefill):
        snapkv = kvpress.SnapKVPress(ratio(40), window_size=WINDOW)
        press = kvpress.AdaKVPress(snapkv, alpha_safeguard=1.0)
        for layer, theirs in enumerate(released(prefill, press)):
            counts = self.counts(prefill, layer, AdaKV(alpha=1, normalize=False), 40)
            assert kept(ours(prefill, layer, SnapKV()), counts) == theirs.kept


class TestPyramidKV:
    @pytest.mark.parametrize(
        ("capacity", "beta", "schedule"),
        [(40, 4, [70, 55, 40, 25, 10]), (59, 5, [89, 74, 59, 44, 29])],
    )
    def test_kept_sets(self, prefill, capacity, beta, schedule):
        """Schedules of whole numbers; the second is bounded by the prompt."""
        num_heads = prefill.prompt.k.shape[1]
        mine = Pyramid(beta=beta).head_budgets(capacity, PREFIX, LAYERS, num_heads)
        assert mine == [[tokens] * num_heads for tokens in schedule]
        press = kvpress.PyramidKVPress(1 - capacity / LENGTH, window_size=WINDOW, beta=beta)
        for layer, theirs in enumerate(released(prefill, press)):
            counts = [tokens - WINDOW for tokens in mine[layer]]
            assert kept(ours(prefill, layer, SnapKV()), counts) == theirs.kept

    @given(st.integers(1, 200), st.integers(1, 400), st.integers(1, 40), st.integers(2, 48))
    def test_schedules_differ_by_rounding_alone(self, capacity, more, beta, num_layers):
        assume(capacity > beta)  # the top layer then gets more than kvpress's window of 1
        num_candidates = capacity + more
        length = num_candidates + 1
        press = kvpress.PyramidKVPress(1 - capacity / length, window_size=1, beta=beta)
        config = SimpleNamespace(num_hidden_layers=num_layers)
        mine = Pyramid(beta=beta).head_budgets(capacity, num_candidates, num_layers, 1)
        for layer, (tokens,) in enumerate(mine):
            module = SimpleNamespace(config=config, layer_idx=layer)
            assert abs(press.get_layer_budget(module, length) - tokens) <= 1


class TestKeyDiff:
    @budgets
    def test_scores_and_kept_sets(self, prefill, budget):
        for layer, theirs in enumerate(released(prefill, kvpress.KeyDiffPress(ratio(budget)))):
            final = ours(prefill, layer, KeyDiff())
            torch.testing.assert_close(final, theirs.scores, rtol=1e-5, atol=1e-6)
            assert kept(final, [budget] * len(final), LENGTH) == theirs.kept


class TestExpected:
    @pytest.mark.parametrize(
        ("options", "translated"),
        [
            ({}, {}),
            ({"sinks": 1, "horizon": 33}, {"n_sink": 1, "n_future_positions": 33}),
            ({"covariance": False}, {"use_covariance": False}),
            ({"vnorm": False}, {"use_vnorm": False}),
            ({"epsilon": 0.01}, {"epsilon": 0.01}),
        ],
        ids=str,
    )
    def test_scores_and_kept_sets(self, prefill, options, translated):
        """Sinks are part of the budget."""
        scorer = Expected(**options)
        press = kvpress.ExpectedAttentionPress(ratio(40), **translated)
        for layer, theirs in enumerate(released(prefill, press)):
            final = ours(prefill, layer, scorer)
            assert final[:, : scorer.sinks].isposinf().all()
            torch.testing.assert_close(
                final[:, scorer.sinks :], theirs.scores[:, scorer.sinks :], rtol=2e-4, atol=1e-6
            )
            assert kept(final, [40] * len(final), LENGTH) == theirs.kept


class TestStreamingLLM:
    @budgets
    @pytest.mark.parametrize("sinks", [1, 4])
    def test_kept_sets(self, prefill, budget, sinks):
        press = kvpress.StreamingLLMPress(ratio(budget), n_sink=sinks)
        for layer, theirs in enumerate(released(prefill, press)):
            final = ours(prefill, layer, Streaming(sinks=sinks))
            assert kept(final, [budget] * len(final), LENGTH) == theirs.kept


def test_benchmark_paths():
    """The code path that the kernel benchmark calls ``einsum`` keeps what the press keeps."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(2, 32, 6, 16, generator=generator)
    keys, values = torch.randn(2, 2, 3, 97, 16, generator=generator)
    theirs = kv_press(queries, keys, values, 48)()
    mine = einsum_compress(queries, keys, values, 48)
    for released_rows, rows in zip(theirs, mine, strict=True):
        assert released_rows.shape == rows.shape == (2, 3, 48, 16)
        # a press keeps tokens in the order of their scores
        assert torch.equal(released_rows.sort(2).values, rows.sort(2).values)
