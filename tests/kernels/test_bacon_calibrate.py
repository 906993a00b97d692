# SPDX-License-Identifier: Apache-2.0
"""The Triton calibration kernels against their definitions."""

import pytest
import torch

from vllm_kvcompress.kernels import calibration, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = {
    "kernel": 5,
    "pool": "avg",
    "mode": "elt",
    "local_k": 5,
    "lambda_c": 0.5,
    "topk_frac": 2.0,
}


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


def equals_the_reference(num_candidates, capacity, heads, length, num_traced, **options) -> None:
    options = OPTIONS | options
    mean, last, *trace = attention_like(num_candidates, heads, length, 2 + num_traced)
    numbers = torch.tensor(num_candidates), torch.tensor(capacity)
    expected = reference.bacon_calibrate(mean, last, trace, *numbers, **options)
    found = calibration.bacon_calibrate(
        poison(mean, num_candidates),
        poison(last, num_candidates),
        [poison(old, num_candidates) for old in trace],
        *(number.to(DEVICE) for number in numbers),
        **options,
    )
    # mode rel subtracts nearly equal numbers: what is left has the rounding of the larger ones
    for name, ours, theirs in zip(("base", "evidence", "final"), found, expected, strict=True):
        torch.testing.assert_close(
            ours.cpu(), theirs, rtol=2e-5, atol=5e-8, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("mode", ["e", "el", "elt", "rel"])
@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize("num_traced", [0, 1, 4, 6])
def test_modes(mode, pool, num_traced):
    equals_the_reference([100, 33], [20, 4], 2, 112, num_traced, mode=mode, pool=pool)


@pytest.mark.filterwarnings("ignore:invalid value")  # means of nothing
@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("mode", ["elt", "rel"])
@pytest.mark.parametrize("length", [1, 63, 1000, 4097])
def test_lengths(mode, length):
    """Requests of unlike lengths, one of nothing; the longest fills its row and all tiles."""
    scored = [length, max(length // 2, 1), 0]
    equals_the_reference(scored, [length // 8 + 1, length, 0], 1, length, 2, mode=mode)


@pytest.mark.parametrize(("kernel", "local_k"), [(1, 1), (1, 7), (7, 1), (31, 9)])
def test_widths(kernel, local_k):
    equals_the_reference([40, 9], [6, 0], 3, 48, 2, kernel=kernel, local_k=local_k, mode="rel")


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize(("topk_frac", "lambda_c"), [(0.01, 3.0), (0.29, 0.0), (1e6, 1.0)])
def test_statistics(topk_frac, lambda_c):
    """Of one token, of some, of all."""
    equals_the_reference([90, 70], [10, 30], 2, 96, 1, topk_frac=topk_frac, lambda_c=lambda_c)


@pytest.mark.usefixtures("programs")
def test_the_share_is_taken_in_double_precision():
    """0.29 * 100 is below 29 there, and above it in float32."""
    equals_the_reference([130], [100], 1, 144, 0, topk_frac=0.29)


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("mode", ["e", "elt"])
def test_ties_count_as_often_as_they_are_taken(mode):
    """The last place of the top is shared by more entries than fit in."""
    mean = torch.tensor([[[0.5, 0.2, 0.2, 0.2, 0.2, 0.1, 0.0, 0.0]]])
    last = torch.tensor([[[0.1, 0.5, 0.5, 0.1, 0.9, 0.4, 0.3, 0.3]]])
    numbers = torch.tensor([8]), torch.tensor([3])
    options = OPTIONS | {"kernel": 1, "topk_frac": 1.0, "mode": mode}
    expected = reference.bacon_calibrate(mean, last, [], *numbers, **options)
    tensors = (t.to(DEVICE) for t in (mean, last, *numbers))
    mean, last, num_candidates, capacity = tensors
    found = calibration.bacon_calibrate(mean, last, [], num_candidates, capacity, **options)
    torch.testing.assert_close(found[2].cpu(), expected[2])


@pytest.mark.usefixtures("programs")
def test_nothing_new_changes_nothing():
    """Where the last row sees no more than the window, S is B, bit for bit."""
    (mean,) = attention_like([50], 2, 64, 1)
    num_candidates = torch.tensor([50], device=DEVICE)
    mean = mean.to(DEVICE)
    base, evidence, final = calibration.bacon_calibrate(
        mean, mean / 2, [], num_candidates, num_candidates, **OPTIONS
    )
    assert not evidence.any()
    assert torch.equal(base, final)


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
