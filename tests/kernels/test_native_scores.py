# SPDX-License-Identifier: Apache-2.0
"""The C++ operations on scores against their definitions."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import NAN, prompts_of, scales_of

from vllm_kvcompress.kernels import native, reference, reference_paged

INF = float("inf")

pytestmark = pytest.mark.usefixtures("cpp")


def check_window_scores(queries, prompts, lens, softcap=0.0, reduction="mean") -> None:
    scale = scales_of(len(lens), prompts.layout.head_size**-0.5)
    keys = reference.read_prompt(prompts, "key")
    expected = reference.window_scores(queries, keys, lens, scale, softcap, reduction)
    found = native.window_scores(queries, prompts, lens, scale, softcap, reduction)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-9, equal_nan=True)


class TestWindowScores:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(
        ("lengths", "group", "num_kv_heads", "head_size", "window", "size"),
        [
            ([1], 1, 1, 64, 1, 16),
            ([63, 9, 64], 4, 2, 24, 8, 16),
            ([1000, 33, 513], 7, 1, 80, 32, 32),
            ([4097, 130], 4, 2, 32, 32, 32),
            ([200, 129], 1, 2, 128, 32, 128),
        ],
    )
    def test_shapes(self, lengths, group, num_kv_heads, head_size, window, size, dtype):
        generator = torch.Generator().manual_seed(head_size)
        prompts = prompts_of(lengths, num_kv_heads, head_size, size, dtype, generator)
        shape = (len(lengths), window, group * num_kv_heads, head_size)
        queries = (2 * torch.randn(shape, generator=generator)).to(dtype)
        check_window_scores(queries, prompts, torch.tensor(lengths))

    @pytest.mark.parametrize("softcap", [0.0, 0.3, 30.0])
    @pytest.mark.parametrize("reduction", ["mean", "max"])
    @pytest.mark.parametrize("factor", [0.01, 40.0])
    def test_options(self, softcap, reduction, factor):
        """Nearly flat and nearly one-hot rows."""
        generator = torch.Generator().manual_seed(1)
        prompts = prompts_of([300, 47], 2, 16, 16, torch.float32, generator)
        queries = factor * torch.randn(2, 5, 6, 16, generator=generator)
        check_window_scores(queries, prompts, torch.tensor([300, 47]), softcap, reduction)

    @pytest.mark.parametrize("reduction", ["mean", "max"])
    def test_a_nan_spoils_what_it_spoils_in_the_reference(self, reduction):
        """One query head of one request, and that one visibly."""
        generator = torch.Generator().manual_seed(2)
        prompts = prompts_of([100, 90], 2, 16, 16, torch.float32, generator)
        queries = torch.randn(2, 4, 4, 16, generator=generator)
        queries[1, 2, 1, 5] = NAN
        check_window_scores(queries, prompts, torch.tensor([100, 90]), 0.0, reduction)

    def test_logits_of_minus_infinity(self):
        """Whole tiles of them, then a visible key."""
        generator = torch.Generator().manual_seed(3)
        prompts = prompts_of([640], 1, 4, 16, torch.float32, generator)
        keys = prompts.layout.key_index.view(16, 4)
        prompts.pages[prompts.block_table[0, :36, None], keys[:, 0]] = -INF
        queries = torch.randn(1, 8, 2, 4, generator=generator).abs()
        check_window_scores(queries, prompts, torch.tensor([640]))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_exponentials_that_would_be_denormal_are_zero(self, dtype):
        """Last of the keys before the window comes one whose logit is 100 above all others."""
        prompts = prompts_of([200], 1, 16, 16, dtype, torch.Generator().manual_seed(5))
        keys = prompts.layout.key_index.view(16, 16)
        prompts.pages[prompts.block_table[0, :, None, None], keys] = 0
        prompts.pages[prompts.block_table[0, 190 // 16], keys[190 % 16]] = 10
        queries = torch.full((1, 5, 2, 16), 2.5, dtype=dtype)
        scale = torch.full((1,), 0.25)
        for found in native.window_scores(queries, prompts, torch.tensor([200]), scale):
            assert found[0, 0].nonzero().flatten().tolist() == [190]

    def test_denormal_keys_count_as_small_ones(self):
        """Pairs of bfloat16 take them for 0, which moves a logit by 2^-126 per element."""
        generator = torch.Generator().manual_seed(6)
        prompts = prompts_of([300], 2, 32, 16, torch.bfloat16, generator)
        pages = prompts.pages.clone()
        pages[:, ::3] *= 2.0**-128
        queries = torch.randn(1, 8, 4, 32, generator=generator).bfloat16()
        check_window_scores(queries, prompts._replace(pages=pages), torch.tensor([300]))

    @pytest.mark.parametrize("prompt_len", [4, 65])
    def test_lengths_that_do_not_fit_are_refused(self, prompt_len):
        prompts = prompts_of([64], 1, 8, 16, torch.float32, torch.Generator().manual_seed(4))
        with pytest.raises(RuntimeError, match="prompt_lens: expected 5 to 64"):
            native.window_scores(
                torch.zeros(1, 5, 1, 8), prompts, torch.tensor([prompt_len]), torch.ones(1)
            )

    def test_each_row_needs_a_scale(self):
        prompts = prompts_of([64, 64], 1, 8, 16, torch.float32, torch.Generator().manual_seed(4))
        lens = torch.tensor([64, 64])
        with pytest.raises(RuntimeError, match=r"scale: expected float32 \[2\]"):
            native.window_scores(torch.zeros(2, 5, 1, 8), prompts, lens, torch.ones(1))


class TestColumnSums:
    @pytest.mark.parametrize("softcap", [0.0, 5.0])
    @pytest.mark.parametrize(
        ("ends", "lengths", "group", "num_kv_heads", "head_size", "size"),
        [
            ([1], [1], 1, 1, 64, 16),
            ([63, 63, 64, 20], [63, 9, 1, 0], 4, 2, 24, 16),
            ([1000, 130], [70, 130], 7, 1, 80, 32),
            ([4097], [33], 4, 2, 32, 32),
        ],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_shapes(self, ends, lengths, group, num_kv_heads, head_size, size, softcap, dtype):
        """Chunks in the middle and at the end of prompts, whole prompts, a request without rows."""
        generator = torch.Generator().manual_seed(head_size)
        prompts = prompts_of(ends, num_kv_heads, head_size, size, torch.bfloat16, generator)
        shape = (len(ends), max(lengths), group * num_kv_heads, head_size)
        queries = (2 * torch.randn(shape, generator=generator)).to(dtype)
        for row, length in zip(queries, lengths, strict=True):
            row[: max(lengths) - length] = NAN  # rows are right-aligned
        rows, positions = torch.tensor(lengths), torch.tensor(ends) - torch.tensor(lengths)
        arguments = (queries, rows, positions)
        keys = reference.read_prompt(prompts, "key").nan_to_num(0.0)
        scale = scales_of(len(ends), 0.2)
        expected = reference.key_attention_sum(*arguments, keys, scale, softcap)
        found = native.key_attention_sum(*arguments, prompts, scale, softcap)
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-7)
        total = rows[:, None].float().expand(-1, num_kv_heads)
        torch.testing.assert_close(found.sum(2), total, rtol=1e-4, atol=0)

    def test_rows_that_do_not_fit_are_refused(self):
        prompts = prompts_of([64], 1, 8, 16, torch.float32, torch.Generator().manual_seed(4))
        queries, rows = torch.zeros(1, 5, 1, 8), torch.tensor([5])
        with pytest.raises(RuntimeError, match="lengths: expected at most 5 rows that end by 64"):
            native.key_attention_sum(queries, rows, torch.tensor([60]), prompts, torch.ones(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    ("lengths", "group", "num_kv_heads", "head_size", "size"),
    [([1], 1, 1, 64, 16), ([63, 9, 64], 4, 2, 20, 16), ([1200, 33], 7, 1, 80, 32)],
)
def test_gaussian_logits(lengths, group, num_kv_heads, head_size, size, dtype):
    generator = torch.Generator().manual_seed(head_size)
    prompts = prompts_of(lengths, num_kv_heads, head_size, size, dtype, generator)
    heads = (len(lengths), group * num_kv_heads, head_size)
    mean = torch.randn(heads, generator=generator)
    covariance = torch.randn(*heads, head_size, generator=generator)
    arguments = (mean, covariance, prompts, scales_of(len(lengths), head_size**-0.5))
    expected, found = (x.gaussian_logits(*arguments) for x in (reference_paged, native))
    for ours, theirs, length in zip(found, expected, lengths, strict=True):
        torch.testing.assert_close(ours[:, :length], theirs[:, :length], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_smaller_instruction_sets(capability):
    """The kernels that other processors would use."""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    command = [
        sys.executable,
        "-P",
        "-m",
        "pytest",
        __file__,
        "-k",
        "TestWindow or TestColumn or gauss",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def batch(length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Ragged scores [3, 2, length] as windows give them, 0 past n [3]; head 1 is full of ties."""
    num_candidates = torch.tensor([length, max(1, length // 3), max(1, length - 7)])
    scores = torch.rand(3, 2, length, generator=generator).pow(6)
    scores[:, 1] = (scores[:, 1] * 8).round() / 8
    return scores.masked_fill(
        torch.arange(length) >= num_candidates[:, None, None], 0.0
    ), num_candidates


LENGTHS = [1, 63, 1000, 4097]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kernel", [1, 3, 5, 31])
@pytest.mark.parametrize("kind", ["avg", "max"])
def test_pool_prefix(length, kernel, kind):
    scores, num_candidates = batch(length, torch.Generator().manual_seed(length))
    scores = scores - 0.25
    if length > 60:
        scores[1, 0, 10] = NAN
    if kernel > 1:
        scores.masked_fill_(torch.arange(length) >= num_candidates[:, None, None], NAN)
    expected = reference.pool_prefix(scores, num_candidates, kernel, kind)
    found = native.pool_prefix(scores, num_candidates, kernel, kind)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kernel", [1, 5])
@pytest.mark.parametrize("pool", ["avg", "max"])
def test_bacon_evidence(length, kernel, pool):
    generator = torch.Generator().manual_seed(length)
    (mean, num_candidates), (last, _) = batch(length, generator), batch(length, generator)
    options = {"kernel": kernel, "pool": pool}
    expected = reference.bacon_evidence(mean, last, num_candidates, **options)
    found = native.bacon_evidence(mean, last, num_candidates, **options)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("mode", ["e", "el", "elt", "rel"])
@pytest.mark.parametrize(("earlier", "trace_r"), [(0, 0), (0, 4), (1, 1), (5, 4)])
@pytest.mark.parametrize(("topk_frac", "lambda_c"), [(2.0, 0.5), (1e-3, 3.0), (1e6, 1.0)])
def test_bacon_calibrate(length, mode, earlier, trace_r, topk_frac, lambda_c):
    """Two layers of three prompts, and what some earlier layers left."""
    generator = torch.Generator().manual_seed(length)
    layers = [batch(length, generator) for _ in range(2)]
    base, evidence = (torch.cat([batch(length, generator)[0] for _ in layers]) for _ in range(2))
    trace = torch.stack([batch(length, generator)[0] for _ in range(earlier + 2)])
    num_candidates = layers[0][1].repeat(2)
    outside = torch.arange(length) >= num_candidates[:, None, None]
    inputs = (base.masked_fill(outside, -INF), evidence, trace, num_candidates)
    capacity = torch.tensor([32, 4, 96, 8, 2, 200])
    options = {"trace_r": trace_r, "mode": mode, "local_k": 3}
    options |= {"lambda_c": lambda_c, "topk_frac": topk_frac}
    expected = reference.bacon_calibrate(*inputs, capacity, **options)
    found = native.bacon_calibrate(*inputs, capacity, **options)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-7)


def test_heads_may_leave_one_and_the_same_trace():
    mean, num_candidates = batch(63, torch.Generator().manual_seed(0))
    options = {"trace_r": 2, "mode": "elt", "local_k": 3, "lambda_c": 0.5, "topk_frac": 2.0}
    shared = torch.stack([mean, mean.flip(2), mean / 2]).mean(2, keepdim=True).expand(-1, -1, 2, -1)
    inputs = [(mean, mean, trace, num_candidates) for trace in (shared, shared.contiguous())]
    found, expected = (
        native.bacon_calibrate(*tensors, num_candidates, **options) for tensors in inputs
    )
    assert found.equal(expected)


def test_no_evidence_leaves_the_score_as_it_is():
    mean, num_candidates = batch(63, torch.Generator().manual_seed(0))
    base, evidence = native.bacon_evidence(mean, mean / 2, num_candidates, kernel=5, pool="avg")
    assert not evidence.any()
    options = {"trace_r": 4, "mode": "elt", "local_k": 5, "lambda_c": 0.5, "topk_frac": 2.0}
    trace = evidence[None]
    final = native.bacon_calibrate(base, evidence, trace, num_candidates, num_candidates, **options)
    assert final.equal(base)


def selection(length: int, generator: torch.Generator) -> torch.Tensor:
    """Scores [4, 3, length]: no two alike, few values, special values, all alike."""
    scores = torch.randn(4, 3, length, generator=generator)
    scores[1] = (scores[1] * 2).round()
    special = torch.tensor([0.0, -0.0, NAN, -NAN, INF, -INF, 1e-45, -1e-45, 1.0])
    scores[2] = special[torch.randint(0, len(special), (3, length), generator=generator)]
    scores[3] = 0.5
    return scores


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 1.0])
def test_select_tokens(length, share):
    generator = torch.Generator().manual_seed(length)
    scores = selection(length, generator)
    protected_end = torch.tensor([length, length - 1, length // 2 + 1, length])
    candidate_end = torch.tensor([length, max(length - 32, 0), length // 2, length // 3])
    pinned = protected_end - candidate_end
    skew = torch.tensor([1.0, 0.5, 0.9])
    count = pinned[:, None] + (share * skew * candidate_end[:, None]).long()
    arguments = (scores, count, candidate_end, protected_end)
    for slack in (0, 5):
        max_count = min(int(count.max()) + slack, length)
        expected = reference.select_tokens(*arguments, max_count)
        assert native.select_tokens(*arguments, max_count).equal(expected)


def test_select_tokens_when_counts_do_not_fit():
    """Fewer than what is pinned, and more than there are candidates: by position."""
    scores = torch.randn(2, 2, 40, generator=torch.Generator().manual_seed(0))
    count = torch.tensor([[3, 0], [35, 40]])
    candidate_end, protected_end = torch.tensor([20, 10]), torch.tensor([30, 16])
    expected = reference.select_tokens(scores, count, candidate_end, protected_end, 40)
    assert native.select_tokens(scores, count, candidate_end, protected_end, 40).equal(expected)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("normalize", [True, False])
def test_head_counts(length, normalize):
    """Ragged rows, ties within and across heads, NaN, a head without mass, a budget beyond n."""
    base, num_candidates = batch(length, torch.Generator().manual_seed(length))
    base = torch.cat([base, base[:, 1:], torch.zeros_like(base[:, :1])], dim=1)
    base[2, 0, 0] = NAN
    base = base.masked_fill(torch.arange(length) >= num_candidates[:, None, None], -INF)
    for capacity in ([1, 1, 1], [max(1, length // 9)] * 3, [length] * 3):
        expected = reference.head_counts(base, torch.tensor(capacity), normalize)
        assert native.head_counts(base, torch.tensor(capacity), normalize).equal(expected)
        assert expected.sum(1).tolist() == [4 * c for c in capacity]


class TestApportion:
    def check(self, shares, total, low, high):
        arguments = (
            torch.tensor(shares, dtype=torch.float64),
            *map(torch.tensor, (total, low, high)),
        )
        assert native.apportion(*arguments).equal(reference.apportion(*arguments))

    @settings(max_examples=200)
    @given(
        sixths=st.lists(st.integers(-12, 90), min_size=1, max_size=30),
        total=st.integers(-5, 400),
        low=st.integers(0, 6),
        span=st.integers(0, 9),
    )
    def test_ties_and_bounds(self, sixths, total, low, span):
        """Many equal fractions, shares outside the bounds, sums that cannot be had."""
        self.check([[x / 6 for x in sixths]], [total], [low], [low + span])

    @pytest.mark.parametrize("count", [2, 112, 3000])
    def test_rows(self, count):
        generator = torch.Generator().manual_seed(count)
        shares = 40 * torch.rand(50, count, generator=generator, dtype=torch.float64) ** 3
        total = torch.randint(0, 50 * count, (50,), generator=generator)
        high = torch.randint(5, 60, (50,), generator=generator)
        self.check(shares.tolist(), total.tolist(), [2] * 50, high.tolist())
