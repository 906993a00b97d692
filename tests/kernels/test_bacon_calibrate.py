# SPDX-License-Identifier: Apache-2.0
"""The Triton calibration kernels against their definitions."""

import pytest
import torch

from vllm_kvcompress.kernels import calibration, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = {"trace_r": 4, "mode": "elt", "local_k": 5, "lambda_c": 0.5, "topk_frac": 2.0}


def attention_like(
    num_candidates: list[int], heads: int, length: int, num: int
) -> list[torch.Tensor]:
    """``num`` score tensors [N, H, T]: rows of probabilities, 0 at t >= n."""
    generator = torch.Generator().manual_seed(length)
    shape = (num, len(num_candidates), heads, length)
    scores = (3 * torch.randn(shape, generator=generator)).exp()
    for row, end in enumerate(num_candidates):
        scores[:, row, :, end:] = 0
    return list(scores / scores.sum(-1, keepdim=True))


def poison(scores: torch.Tensor, num_candidates: list[int]) -> torch.Tensor:
    """What no kernel may read."""
    scores = scores.to(DEVICE, copy=True)
    for row, end in enumerate(num_candidates):
        scores[row, :, end:] = float("nan")
    return scores


def on_device(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


def pooled_scores(num_candidates: list[int], heads: int, length: int, layers: int):
    """B and E of ``layers`` layers of the prompts, [R, H, T] each."""
    mean, last = attention_like(num_candidates * layers, heads, length, 2)
    numbers = torch.tensor(num_candidates * layers)
    return reference.bacon_evidence(mean, last, numbers, kernel=5, pool="avg")


def equals_the_reference(
    num_candidates, capacity, heads, length, layers=1, earlier=0, **options
) -> None:
    """Rows of ``layers`` layers, which look back at each other and at ``earlier`` ones."""
    options = OPTIONS | options
    base, evidence = pooled_scores(num_candidates, heads, length, layers)
    old = attention_like(num_candidates, heads, length, earlier) if earlier else []
    trace = torch.stack([*old, *evidence.unflatten(0, (layers, -1))])
    numbers = torch.tensor(num_candidates * layers), torch.tensor(capacity * layers)
    expected = reference.bacon_calibrate(base, evidence, trace, *numbers, **options)
    given = [poison(t, num_candidates * layers) for t in (base, evidence)]
    trace = torch.stack([poison(layer, num_candidates) for layer in trace])
    found = calibration.bacon_calibrate(*given, trace, *on_device(*numbers), **options)
    # mode rel subtracts nearly equal numbers: what is left has the rounding of the larger ones
    torch.testing.assert_close(found.cpu(), expected, rtol=2e-5, atol=5e-8)


@pytest.mark.parametrize("mode", ["e", "el", "elt", "rel"])
@pytest.mark.parametrize(("layers", "earlier"), [(1, 0), (3, 0), (2, 4)])
def test_modes(mode, layers, earlier):
    """The first layer has nothing to look back at; the last of six does not see the first."""
    equals_the_reference([100, 33], [20, 4], 1 + (layers == 1), 112, layers, earlier, mode=mode)


@pytest.mark.parametrize("trace_r", [0, 1, 9])
def test_reach(trace_r):
    equals_the_reference([40], [6], 2, 48, 3, 1, trace_r=trace_r)


def test_trace_that_all_heads_share():
    """Heads of the trace may be one and the same memory."""
    base, evidence = pooled_scores([40, 9], 3, 48, 2)
    trace = evidence.mean(1, keepdim=True).unflatten(0, (2, 2)).expand(-1, -1, 3, -1)
    numbers = torch.tensor([40, 9] * 2), torch.tensor([6, 3] * 2)
    expected = reference.bacon_calibrate(base, evidence, trace, *numbers, **OPTIONS)
    found = calibration.bacon_calibrate(*on_device(base, evidence, trace, *numbers), **OPTIONS)
    torch.testing.assert_close(found.cpu(), expected, rtol=2e-5, atol=5e-8)


@pytest.mark.filterwarnings("ignore:invalid value")  # means of nothing
@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("mode", ["elt", "rel"])
@pytest.mark.parametrize("length", [1, 63, 1000, 4097])
def test_lengths(mode, length):
    """Requests of unlike lengths, one of nothing; the longest fills its row and all tiles."""
    scored = [length, max(length // 2, 1), 0]
    equals_the_reference(scored, [length // 8 + 1, length, 0], 1, length, 1, 2, mode=mode)


@pytest.mark.parametrize("local_k", [1, 7])
def test_widths(local_k):
    equals_the_reference([40, 9], [6, 0], 3, 48, 2, local_k=local_k, mode="rel")


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize(("topk_frac", "lambda_c"), [(0.01, 3.0), (0.29, 0.0), (1e6, 1.0)])
def test_statistics(topk_frac, lambda_c):
    """Of one token, of some, of all."""
    equals_the_reference([90, 70], [10, 30], 2, 96, 2, topk_frac=topk_frac, lambda_c=lambda_c)


@pytest.mark.usefixtures("programs")
def test_the_share_is_taken_in_double_precision():
    """0.29 * 100 is below 29 there, and above it in float32."""
    equals_the_reference([130], [100], 1, 144, topk_frac=0.29)


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("mode", ["e", "elt"])
def test_ties_count_as_often_as_they_are_taken(mode):
    """The last place of the top is shared by more entries than fit in."""
    base = torch.tensor([[[0.5, 0.2, 0.2, 0.2, 0.2, 0.1, 0.0, 0.0]]])
    last = torch.tensor([[[0.1, 0.5, 0.5, 0.1, 0.9, 0.4, 0.3, 0.3]]])
    evidence = (last - base).clamp_min(0)
    numbers = torch.tensor([8]), torch.tensor([3])
    options = OPTIONS | {"topk_frac": 1.0, "mode": mode}
    tensors = (base, evidence, evidence[None], *numbers)
    expected = reference.bacon_calibrate(*tensors, **options)
    found = calibration.bacon_calibrate(*on_device(*tensors), **options)
    torch.testing.assert_close(found.cpu(), expected)


@pytest.mark.usefixtures("programs")
def test_nothing_new_changes_nothing():
    """Where the last row sees no more than the window, S is B, bit for bit."""
    (base,) = attention_like([64], 2, 64, 1)
    nothing = torch.zeros_like(base)
    num_candidates = torch.tensor([64])
    tensors = (base, nothing, nothing[None], num_candidates, num_candidates)
    found = calibration.bacon_calibrate(*on_device(*tensors), **OPTIONS)
    assert torch.equal(found.cpu(), base)


@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize("kernel", [1, 5, 31])
def test_evidence(kernel, pool):
    scored = [700, 513, 1]
    mean, last = attention_like(scored, 2, 704, 2)
    num_candidates = torch.tensor(scored)
    expected = reference.bacon_evidence(mean, last, num_candidates, kernel=kernel, pool=pool)
    given = [poison(t, scored) for t in (mean, last)]
    found = calibration.bacon_evidence(*given, num_candidates.to(DEVICE), kernel=kernel, pool=pool)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize("kernel", [1, 5, 31])
def test_pool_prefix(kernel, pool):
    scored = [700, 513, 1]
    (scores,) = attention_like(scored, 2, 704, 1)
    num_candidates = torch.tensor(scored)
    expected = reference.pool_prefix(scores, num_candidates, kernel, pool)
    given = scores.to(DEVICE) if kernel == 1 else poison(scores, scored)
    found = calibration.pool_prefix(given, num_candidates.to(DEVICE), kernel, pool)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=0)
