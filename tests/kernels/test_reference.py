# SPDX-License-Identifier: Apache-2.0
"""The reference operations against naive float64 loops."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvcompress.kernels.reference import (
    bacon_calibrate,
    bacon_evidence,
    key_attention_sum,
    pool_prefix,
    select_tokens,
    window_scores,
)

seeds = st.integers(0, 2**32 - 1)


def naive_window_scores(queries, keys, prompt_lens, scale, softcap, reduction):
    """[N, Hkv, T] window mean and last row, one attention row at a time."""
    num, window, num_q, _ = queries.shape
    num_kv, length = keys.shape[1:3]
    group = num_q // num_kv
    mean, last = np.zeros((2, num, num_kv, length))
    for n in range(num):
        prompt_len = prompt_lens[n]
        for head in range(num_kv):
            means, lasts = [], []
            for member in range(group):
                rows = []
                for w in range(window):
                    query = queries[n, w, head * group + member]
                    visible = prompt_len - window + w + 1
                    logits = [query @ keys[n, head, t] * scale for t in range(visible)]
                    if softcap:
                        logits = [softcap * math.tanh(x / softcap) for x in logits]
                    top = max(logits)
                    weights = [math.exp(x - top) for x in logits]
                    row = np.zeros(length)
                    row[:visible] = np.array(weights) / sum(weights)
                    rows.append(row)
                means.append(sum(rows) / window)
                lasts.append(rows[-1])
            reduce = np.mean if reduction == "mean" else np.max
            scored = prompt_len - window
            mean[n, head, :scored] = reduce(means, axis=0)[:scored]
            last[n, head, :scored] = reduce(lasts, axis=0)[:scored]
    return mean, last


class TestWindowScores:
    @pytest.mark.parametrize("reduction", ["mean", "max"])
    @pytest.mark.parametrize("softcap", [0.0, 3.0])
    @pytest.mark.parametrize(("num_q", "num_kv"), [(3, 3), (6, 2), (4, 1)])
    def test_against_loops(self, num_q, num_kv, softcap, reduction):
        rng = np.random.default_rng(num_q)
        lengths, window, head_size, longest = [63, 7, 30], 5, 8, 65
        queries = rng.normal(size=(3, window, num_q, head_size))
        keys = rng.normal(size=(3, num_kv, longest, head_size)) * 2
        expected = naive_window_scores(queries, keys, lengths, 0.4, softcap, reduction)
        for n, length in enumerate(lengths):
            keys[n, :, length:] = np.nan  # stale pages
        got = window_scores(
            torch.from_numpy(queries).float(),
            torch.from_numpy(keys).float(),
            torch.tensor(lengths),
            torch.full((3,), 0.4),
            softcap,
            reduction,
        )
        for ours, theirs in zip(got, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-9)

    def test_huge_logits(self):
        """Logits far beyond the range of exp, as unnormalised keys give."""
        queries = torch.full((1, 2, 1, 4), 100.0)
        keys = torch.zeros(1, 1, 8, 4)
        keys[0, 0, 3] = 100.0
        mean, last = window_scores(queries, keys, torch.tensor([8]), torch.ones(1))
        assert mean[0, 0].tolist() == [0, 0, 0, 1, 0, 0, 0, 0]
        assert last.equal(mean)

    def test_inputs_stay_as_they_are(self):
        queries, keys = torch.randn(1, 2, 2, 4), torch.randn(1, 1, 8, 4)
        copies = queries.clone(), keys.clone()
        window_scores(queries, keys, torch.tensor([6]), torch.ones(1))
        assert queries.equal(copies[0])
        assert keys.equal(copies[1])


class TestColumnSums:
    SCALE = 0.4

    def naive(self, queries, keys, lengths, positions, softcap):
        """[M, Hkv, T], one attention row at a time; queries [M, C, Hq, D] right-aligned."""
        num, width, num_q, _ = queries.shape
        num_kv, length = keys.shape[1:3]
        total = np.zeros((num, num_kv, length))
        for m, row, head in np.ndindex(num, width, num_q):
            index = row - (width - lengths[m])  # among the request's rows
            if index < 0:
                continue
            visible = keys[m, head * num_kv // num_q, : positions[m] + index + 1]
            logits = visible @ queries[m, row, head] * self.SCALE
            if softcap:
                logits = softcap * np.tanh(logits / softcap)
            weights = np.exp(logits - logits.max())
            share = weights / weights.sum() * num_kv / num_q
            total[m, head * num_kv // num_q, : len(visible)] += share
        return total

    @pytest.mark.parametrize("softcap", [0.0, 3.0])
    @pytest.mark.parametrize(("num_q", "num_kv"), [(3, 3), (6, 2), (4, 1)])
    @pytest.mark.parametrize(
        ("lengths", "positions"), [([5, 1, 9], [0, 17, 3]), ([140, 131, 7], [2, 0, 150])]
    )
    def test_against_loops(self, lengths, positions, num_q, num_kv, softcap):
        """Rows that see nothing, and keys past a request's last row, leave no trace."""
        rng = np.random.default_rng(num_q)
        width, longest = max(lengths), max(np.add(lengths, positions)) + 3
        queries = rng.normal(size=(3, width, num_q, 8))
        keys = rng.normal(size=(3, num_kv, longest, 8)) * 2
        expected = self.naive(queries, keys, lengths, positions, softcap)
        for m, (length, position) in enumerate(zip(lengths, positions, strict=True)):
            keys[m, :, position + length :] = np.nan  # stale pages
            queries[m, : width - length] = np.nan  # other requests' tokens
        got = key_attention_sum(
            torch.from_numpy(queries).float(),
            torch.tensor(lengths),
            torch.tensor(positions),
            torch.from_numpy(keys).float(),
            torch.full((3,), self.SCALE),
            softcap,
        )
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(got.sum(2), np.tile(lengths, (num_kv, 1)).T, rtol=1e-5)

    @given(st.lists(st.integers(1, 9), min_size=1, max_size=4), seeds)
    def test_chunks_add_up_to_the_whole(self, chunks, seed):
        generator = torch.Generator().manual_seed(seed)
        length = sum(chunks)
        queries = torch.randn(1, length, 4, 8, generator=generator)
        keys = torch.randn(1, 2, length, 8, generator=generator)

        def sums(start, end):
            size, first = torch.tensor([end - start]), torch.tensor([start])
            scale = torch.full((1,), self.SCALE)
            return key_attention_sum(queries[:, start:end], size, first, keys, scale)

        edges = [0, *itertools.accumulate(chunks)]
        added = sum(sums(a, b) for a, b in itertools.pairwise(edges))
        torch.testing.assert_close(added, sums(0, length))


class TestPoolPrefix:
    @pytest.mark.parametrize("kind", ["avg", "max"])
    @pytest.mark.parametrize("kernel", [1, 3, 5, 7, 31])
    def test_against_loops(self, kernel, kind):
        rng = np.random.default_rng(kernel)
        scores, scored = rng.normal(size=(3, 2, 40)), [40, 1, 23]
        expected = np.zeros_like(scores)
        for n, heads in enumerate(scores):
            for h, row in enumerate(heads):
                for t in range(scored[n]):
                    low = max(t - kernel // 2, 0)
                    near = row[low : min(t + kernel // 2 + 1, scored[n])]
                    expected[n, h, t] = near.sum() / kernel if kind == "avg" else near.max()
        scores = torch.from_numpy(scores).float()
        for n, count in enumerate(scored):
            scores[n, :, count:] = 0.0 if kernel == 1 else float("nan")
        pooled = pool_prefix(scores, torch.tensor(scored), kernel, kind)
        np.testing.assert_allclose(pooled, expected, rtol=1e-5, atol=1e-6)

    def test_published_examples(self):
        ones = torch.ones(1, 1, 6)
        average = pool_prefix(ones, torch.tensor([6]), 5)
        assert average[0, 0].tolist() == pytest.approx([0.6, 0.8, 1, 1, 0.8, 0.6])
        row = torch.tensor([[[1.0, 5, 2, 0, 3, 4]]])
        largest = pool_prefix(row, torch.tensor([6]), 3, "max")
        assert largest[0, 0].tolist() == [5, 5, 5, 3, 4, 4]


def naive_calibrate(base, evidence, trace, capacity, mode, local_k, lambda_c, topk_frac):
    """One head: S [n], in float64 and plain lists."""
    n, eps = len(base), 1e-8

    def around(row, t):
        return sum(row[u] for u in range(t - local_k // 2, t + local_k // 2 + 1) if 0 <= u < n)

    value = []
    for t in range(n):
        v = evidence[t]
        if mode != "e":
            near = around(evidence, t) / local_k
            if mode == "rel":
                near *= (around(base, t) / local_k) / (around(base, t) / local_k + base[t] + eps)
            v += near
        if mode in ("elt", "rel") and len(trace):
            seen = [row[t] for row in trace]
            lasting = sum(seen) / len(seen)
            if mode == "rel":
                spread = math.sqrt(sum((x - lasting) ** 2 for x in seen) / len(seen))
                lasting = max(lasting - spread, 0)
            v += lasting
        value.append(v)
    top = max(1, min(int(topk_frac * capacity), n))

    def statistics(row):
        best = sorted(row, reverse=True)[:top]
        mean = sum(best) / top
        return mean, math.sqrt(sum((x - mean) ** 2 for x in best) / top)

    (base_mean, base_std), (value_mean, value_std) = statistics(base), statistics(value)
    gate = min(max(value_mean / (base_mean + eps), 0), 1) if mode == "elt" else 1
    strength = lambda_c * gate * base_std / (value_std + eps)
    return [b + strength * v for b, v in zip(base, value, strict=True)]


class TestCalibrate:
    @pytest.mark.parametrize("mode", ["e", "el", "elt", "rel"])
    @pytest.mark.parametrize(("num_earlier", "trace_r"), [(0, 4), (1, 1), (3, 2), (2, 0)])
    @pytest.mark.parametrize(("topk_frac", "lambda_c"), [(2.0, 0.5), (0.01, 3.0), (50.0, 1.0)])
    def test_against_loops(self, mode, num_earlier, trace_r, topk_frac, lambda_c):
        """Two layers of two prompts, after layers that were scored before."""
        rng = np.random.default_rng(num_earlier)
        scored, capacities, num_layers = [31, 8], [9, 2], 2
        base = rng.gamma(0.5, size=(num_layers, 2, 2, 32))
        trace = np.maximum(rng.normal(size=(num_earlier + num_layers, 2, 2, 32)), 0)
        for n, count in enumerate(scored):
            trace[:, n, :, count:] = 0
            base[:, n, :, count:] = -np.inf
        evidence = trace[num_earlier:]
        got = bacon_calibrate(
            *(torch.from_numpy(part).float().flatten(0, 1) for part in (base, evidence)),
            torch.from_numpy(trace).float(),
            torch.tensor(scored * num_layers),
            torch.tensor(capacities * num_layers),
            trace_r=trace_r,
            mode=mode,
            local_k=3,
            lambda_c=lambda_c,
            topk_frac=topk_frac,
        ).unflatten(0, (num_layers, 2))
        for layer, n, h in np.ndindex(num_layers, 2, 2):
            own, count = num_earlier + layer, scored[n]
            expected = naive_calibrate(
                base[layer, n, h, :count],
                evidence[layer, n, h, :count],
                trace[max(own - trace_r, 0) : own, n, h, :count],
                capacities[n],
                mode,
                3,
                lambda_c,
                topk_frac,
            )
            np.testing.assert_allclose(got[layer, n, h, :count], expected, rtol=1e-4)
            assert got[layer, n, h, count:].isneginf().all()

    def test_evidence(self):
        mean = torch.tensor([[[0.1, 0.4, 0.2, 0.0]]])
        last = torch.tensor([[[0.3, 0.1, 0.2, 0.0]]])
        base, evidence = bacon_evidence(mean, last, torch.tensor([3]), kernel=1, pool="avg")
        assert base.tolist() == [[[*mean[0, 0, :3].tolist(), -math.inf]]]
        assert evidence[0, 0].tolist() == pytest.approx([0.2, 0, 0, 0])


def naive_select(scores, count, candidate_end, protected_end):
    """Kept positions of one head."""

    def rank(t):
        return (0, 0.0) if math.isnan(scores[t]) else (1, scores[t])

    pinned = list(range(candidate_end, protected_end))
    free = sorted(range(candidate_end), key=lambda t: (*(-x for x in rank(t)), t))
    return sorted([*pinned, *free[: count - len(pinned)]])


special = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, -1e-45, math.inf, -math.inf, math.nan])


@st.composite
def selections(draw):
    """Two requests with two heads: scores full of ties, pinned ranges, any feasible count."""
    length = draw(st.integers(1, 20))
    values = st.one_of(special, st.floats(width=32))
    row = st.lists(values, min_size=length, max_size=length)
    scores = [[draw(row) for _ in range(2)] for _ in range(2)]
    protected_end = [draw(st.integers(0, length)) for _ in range(2)]
    candidates = [draw(st.integers(0, end)) for end in protected_end]
    counts = [
        [draw(st.integers(end - free, end)) for _ in range(2)]
        for end, free in zip(protected_end, candidates, strict=True)
    ]
    return scores, counts, candidates, protected_end


class TestSelectTokens:
    @given(selections(), st.integers(0, 3))
    def test_against_sorting(self, case, slack):
        scores, counts, candidates, protected_end = case
        length = len(scores[0][0])
        max_count = min(max(map(max, counts)) + slack, length)
        got = select_tokens(
            torch.tensor(scores, dtype=torch.float32),
            torch.tensor(counts),
            torch.tensor(candidates),
            torch.tensor(protected_end),
            max_count,
        )
        assert got.shape == (2, 2, max_count)
        for n in range(2):
            for h in range(2):
                rounded = np.array(scores[n][h], dtype=np.float32).tolist()
                expected = naive_select(rounded, counts[n][h], candidates[n], protected_end[n])
                padding = [length] * (max_count - counts[n][h])
                assert got[n, h].tolist() == expected + padding

    @staticmethod
    def one(scores, count, candidates=None, protected_end=None):
        length = len(scores)
        return select_tokens(
            torch.tensor([[scores]], dtype=torch.float32),
            torch.tensor([[count]]),
            torch.tensor([length if candidates is None else candidates]),
            torch.tensor([length if protected_end is None else protected_end]),
            count,
        )[0, 0].tolist()

    def test_ties_go_to_the_earlier_position(self):
        assert self.one([1, 2, 2, 2, 1], 2) == [1, 2]
        assert self.one([3, 3, 3], 2) == [0, 1]

    def test_both_zeros_are_equal(self):
        assert self.one([-0.0, 0.0, -0.0], 2) == [0, 1]
        assert self.one([-1e-45, -0.0, 1e-45, 0.0], 3) == [1, 2, 3]

    def test_nan_is_below_minus_infinity(self):
        nan, inf = math.nan, math.inf
        assert self.one([nan, -inf, nan, inf], 2) == [1, 3]
        assert self.one([nan, -inf, nan, inf], 3) == [0, 1, 3]

    def test_negative_nan_is_a_nan(self):
        scores = torch.tensor([[[0xFFC00000, 0xFF800000]]], dtype=torch.uint32)
        scores = scores.view(torch.float32)
        limit = torch.tensor([2])
        assert select_tokens(scores, torch.tensor([[1]]), limit, limit, 1).tolist() == [[[1]]]

    def test_protected_positions_win_over_infinity(self):
        scores = [math.inf, 1, math.nan, -math.inf, 9]
        assert self.one(scores, 3, candidates=2, protected_end=4) == [0, 2, 3]

    def test_none_and_all(self):
        assert self.one([1.0, 2.0, 3.0], 0, protected_end=3) == []
        assert self.one([1.0, 2.0, 3.0], 3) == [0, 1, 2]
