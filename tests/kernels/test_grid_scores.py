# SPDX-License-Identifier: Apache-2.0
"""Scores that know images and outputs: Triton and C++ against their definitions."""

import pytest
import torch
from test_bacon_calibrate import OPTIONS, attention_like, poison
from torch.utils._pytree import tree_map

from vllm_kvcompress.kernels import (
    PageLayout,
    PromptPages,
    calibration,
    grid_scores,
    native,
    reference,
    reference_paged,
    value_norms,
)
from vllm_kvcompress.kernels.reference import Grids

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTH, HEADS = 704, 2
SCORED = [700, 513, 1, 90]
IMAGES = [
    [(3, 3 + 20 * 31, 31, 31), (630, 690, 10, 10)],
    [(0, 600, 25, 25)],  # ends in the window
    [],
    [(10, 10 + 7 * 9 - 2, 7, 9)],  # two tokens of text between its rows
]


def grids_of(images: list[list[tuple[int, int, int, int]]], length: int) -> Grids:
    most = max(1, *map(len, images))
    lines = torch.zeros(len(images), most, 4, dtype=torch.int64)
    segment = torch.full((len(images), length), -1)
    for row, some in enumerate(images):
        for index, (first, end, width, step) in enumerate(some):
            lines[row, index] = torch.tensor([first, end, width, step])
            place = torch.arange(first, end)
            segment[row, place[(place - first) % step < width]] = index
    return Grids(segment, lines)


GRIDS = grids_of(IMAGES, LENGTH)
IMPLEMENTATIONS = pytest.mark.parametrize("made", ["triton", "cpp"])


@pytest.fixture
def run(made, request):
    """``run(name, *arguments)`` of one implementation."""
    if made == "cpp":
        request.getfixturevalue("cpp")
        return lambda name, *args, **kwargs: getattr(native, name)(*args, **kwargs)
    modules = {"pool_prefix": calibration, "bacon_calibrate": calibration}

    def call(name, *args, **kwargs):
        given = tree_map(lambda x: x.to(DEVICE) if isinstance(x, torch.Tensor) else x, args)
        found = getattr(modules.get(name, grid_scores), name)(*given, **kwargs)
        return tree_map(lambda x: x.cpu() if isinstance(x, torch.Tensor) else x, found)

    return call


@IMPLEMENTATIONS
def test_balance(run):
    (scores,) = attention_like(SCORED, HEADS, LENGTH, 1)
    number = torch.tensor(SCORED)
    expected = reference.grid_balance(scores, number, GRIDS)
    found = run("grid_balance", poison(scores, SCORED), number, GRIDS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert (expected[0] != 0).all()
    assert (expected[2] == 0).all()


def test_balance_of_lines():
    """Rows are positive, columns negative, and what is behind the prefix does not count."""
    image = torch.zeros(1, 1, 40)
    image[0, 0, 8:12] = 0.25  # the second row of five of width 4, behind 4 tokens of text
    grids = grids_of([[(4, 24, 4, 4)]], 40)
    (number,) = (torch.tensor([30]),)
    assert reference.grid_balance(image, number, grids).item() == pytest.approx(0.75)
    image.zero_()
    image[0, 0, 5:24:4] = 0.2
    assert reference.grid_balance(image, number, grids).item() == pytest.approx(-0.8)
    assert reference.grid_balance(image, torch.tensor([14]), grids).item() == pytest.approx(-0.4)


@IMPLEMENTATIONS
@pytest.mark.parametrize("kind", ["avg", "max"])
@pytest.mark.parametrize("kernel", [1, 5])
def test_pool(run, kernel, kind):
    (scores,) = attention_like(SCORED, HEADS, LENGTH, 1)
    number = torch.tensor(SCORED)
    lines = GRIDS.lines.clone()
    lines[0, 1] = 0  # along its rows
    grids = GRIDS._replace(lines=lines)
    expected = reference.pool_prefix(scores, number, kernel, kind, grids)
    given = scores if kernel == 1 else poison(scores, SCORED)
    found = run("pool_prefix", given, number, kernel, kind, grids)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    raster = reference.pool_prefix(scores, number, kernel, kind)
    assert raster[0, :, 640:].equal(expected[0, :, 640:])
    assert (kernel == 1) == raster.equal(expected)


def test_pool_down_a_column():
    scores = torch.zeros(1, 1, 40)
    scores[0, 0, 13] = 5.0  # third row, second column of an image of width 4 behind 4 of text
    grids = grids_of([[(4, 24, 4, 4)]], 40)
    found = reference.pool_prefix(scores, torch.tensor([30]), 5, "avg", grids)[0, 0]
    assert found.nonzero().flatten().tolist() == [5, 9, 13, 17, 21]
    found = reference.pool_prefix(scores, torch.tensor([16]), 5, "avg", grids)[0, 0]
    assert found.nonzero().flatten().tolist() == [5, 9, 13]


@IMPLEMENTATIONS
@pytest.mark.parametrize("mode", ["elt", "rel"])
def test_calibration(run, mode):
    scored, images, capacity = [700, 513, 90], [*IMAGES[:2], IMAGES[3]], [60, 40, 9]
    mean, last = attention_like(scored, HEADS, LENGTH, 2)
    numbers = torch.tensor(scored), torch.tensor(capacity)
    base, evidence = reference.bacon_evidence(mean, last, numbers[0], kernel=5, pool="avg")
    arguments = (base, evidence, evidence[None], *numbers, grids_of(images, LENGTH))
    options = OPTIONS | {"mode": mode}
    expected = reference.bacon_calibrate(*arguments, **options)
    assert not expected.equal(reference.bacon_calibrate(*arguments[:-1], **options))
    found = run("bacon_calibrate", *arguments, **options)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=5e-8)


@IMPLEMENTATIONS
@pytest.mark.parametrize("length", [704, 2500])
@pytest.mark.parametrize(
    ("clamp", "weighs", "has_last"),
    [(True, True, True), (False, True, False), (True, False, True), (True, True, False)],
)
def test_weigh(run, length, clamp, weighs, has_last):
    scored = [length, 513, 1, 0]
    base, weight, last = attention_like(scored, HEADS, length, 3)
    number = torch.tensor(scored)
    arguments = [base, number, weight if weighs else None, last if has_last else None]
    expected = reference.weigh_scores(*arguments, clamp=clamp)
    given = [poison(x, scored) if x is not None and x is not number else x for x in arguments]
    found = run("weigh_scores", *given, clamp=clamp)
    assert (found[1] is None) == (not has_last)
    for ours, theirs in zip(found, expected, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-10)
    if has_last:
        assert expected[1].sum(2).allclose(expected[0].sum(2))


def test_nothing_seen_stays_nothing():
    """A last row that looks at its window only has no mass to be scaled."""
    base = torch.rand(1, 1, 8)
    _, last = reference.weigh_scores(
        base, torch.tensor([8]), None, torch.zeros_like(base), clamp=True
    )
    assert last.eq(0).all()


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize(("num_q", "size"), [(6, 40), (2, 64)])
def test_output_norms(made, request, dtype, num_q, size):
    generator = torch.Generator().manual_seed(size)
    layers, prompts, heads, blocks, page = 2, 2, 2, 5, 16
    count = layers * prompts * blocks * heads
    pages = torch.randn(count, page * 2 * size, generator=generator).to(dtype)
    table = torch.randperm(count // heads, generator=generator).view(layers * prompts, blocks)
    scale = torch.tensor([0.5, 0.5, 2.0, 2.0]) if dtype is torch.float8_e4m3fn else None
    where = PromptPages(pages, table, heads, PageLayout(page, size), None, scale)
    weights = torch.randn(layers, num_q, size, 3 * size, generator=generator)
    expected = reference_paged.output_norms(where, weights @ weights.mT)
    values = reference.read_prompt(where, "value").float()
    for row, head in ((0, 0), (3, 1)):  # not by products of weights
        group = weights[row // prompts].view(heads, -1, size, 3 * size)[head]
        norms = (values[row, head] @ group).norm(dim=-1).mean(0)
        torch.testing.assert_close(expected[row, head], norms, rtol=1e-4, atol=1e-4)
    if made == "cpp":
        request.getfixturevalue("cpp")
        found = native.output_norms(where, weights @ weights.mT)
    else:
        parts = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in where]
        grams = (weights @ weights.mT).to(DEVICE)
        found = value_norms.output_norms(PromptPages(*parts), grams).cpu()
    rtol = 1e-4 if dtype is torch.float32 else 2e-3  # TF32 on GPUs
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-4)
