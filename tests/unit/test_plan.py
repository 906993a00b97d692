# SPDX-License-Identifier: Apache-2.0
"""Block plans: what scheduler and workers must agree on for every prompt."""

import json
import math
from dataclasses import replace
from fractions import Fraction

import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle.allocators import static_tokens
from oracle.config import budget_of
from oracle.prompt import visual_mask
from planners import LAYERS, NUM_KV_HEADS, oracle_config, planner_of, planners, prompts

from vllm_kvcompress.allocation import ALLOCATORS
from vllm_kvcompress.allocation.uniform import Uniform
from vllm_kvcompress.prompt import MAX_INSTRUCTION_LEN, PromptFacts
from vllm_kvcompress.scoring import Need

IMAGE = PromptFacts(500, ((10, 400),))
"""390 visual tokens, 10 + 100 of text."""


@given(planners(), prompts())
def test_equals_the_oracle(planner, facts):
    cfg, plan = oracle_config(planner), planner.plan(facts)
    pages = oracle.page_plan(facts.length, cfg, LAYERS, NUM_KV_HEADS, facts.visual)
    assert (plan.num_full_blocks, plan.tail) == (pages.full, pages.tail)
    assert plan.compresses == pages.compressed
    assert plan.num_kept_blocks == (pages.uniform if pages.compressed else pages.full)
    budget = budget_of(visual_mask(facts.length, facts.visual), cfg)
    if plan.compresses:
        assert plan.num_protected_in_blocks == pages.fixed
        assert plan.num_recent == budget.recent
        assert (plan.capacity, plan.num_candidates) == (budget.capacity, budget.num_candidates)
        assert plan.num_protected == budget.pinned
        assert 0 <= plan.capacity < plan.num_candidates


@pytest.fixture(scope="module")
def head_scores(tmp_path_factory):
    """A file in which one head is ten times as visual as the others."""
    path = tmp_path_factory.mktemp("scores") / "heads.json"
    heads = [(layer, head) for layer in range(LAYERS) for head in range(2 * NUM_KV_HEADS)]
    path.write_text(json.dumps({f"{a}-{b}": [10 if (a, b) == (1, 2) else 1] for a, b in heads}))
    return str(path)


@pytest.mark.parametrize("rounding", ["exact", "official"])
@pytest.mark.parametrize("allocator", ["pyramid", "sparsemm"])
@pytest.mark.parametrize("length", [95, 200, 1201])
def test_static_budgets_decide_the_blocks(allocator, rounding, length, head_scores):
    """Whole blocks for the mean over all layers and heads, which clipping lowers."""
    options = {"head_scores": head_scores} if allocator == "sparsemm" else {}
    settings = {"method": f"snapkv+{allocator}", "budget": 64, "rounding": rounding}
    planner = planner_of(16, **settings, **options)
    plan = planner.plan(PromptFacts(length))
    cfg = oracle_config(planner)
    budget = budget_of(visual_mask(length, ()), cfg)
    tokens = [
        [k - plan.num_protected for k in row] for row in static_tokens(LAYERS, 2, budget, cfg)
    ]
    assert planner.head_budgets(plan) == tokens
    mean = Fraction(sum(map(sum, tokens)), LAYERS * NUM_KV_HEADS) + 32
    assert plan.num_kept_blocks == min(math.ceil((mean - plan.tail) / 16), length // 16)
    assert plan.compresses


def test_recent_tokens_fit_though_static_budgets_fall_short(head_scores):
    """Clipping lowers the mean to 60 tokens, but every head keeps the last 64."""
    settings = {"method": "h2o+sparsemm", "recent_share": 1.0, "head_scores": head_scores}
    planner = planner_of(16, budget=64, rounding="official", **settings)
    plan = planner.plan(PromptFacts(95))
    assert sum(map(sum, planner.head_budgets(plan))) / 6 + 32 < 60
    assert (plan.num_recent, plan.tail, plan.num_protected_in_blocks) == (64, 15, 49)
    assert plan.num_kept_blocks == 4


@given(planners(), prompts(5000))
def test_blocks_add_up(planner, facts):
    plan = planner.plan(facts)
    assert plan.num_full_blocks * planner.block_size + plan.tail == facts.length
    assert 0 <= plan.tail < planner.block_size
    assert 0 <= plan.num_kept_blocks <= plan.num_full_blocks
    dropped = plan.num_full_blocks - plan.num_kept_blocks
    assert plan.num_freed_blocks == dropped // planner.pool_block
    assert plan.compresses == (plan.num_freed_blocks > 0) == (dropped > 0)


@given(planners(allocators=("uniform",)), prompts())
def test_kept_tokens_never_fall_below_the_budget(planner, facts):
    """Rounding to whole pages adds less than a block."""
    plan = planner.plan(facts)
    kept = plan.num_kept_blocks * planner.block_size + plan.tail
    if plan.compresses:
        budget = plan.capacity + plan.num_protected
        assert budget <= kept
        assert kept <= max(budget + planner.block_size - 1, planner.block_size + plan.tail)
        assert plan.num_protected_in_blocks <= plan.num_kept_blocks * planner.block_size
        assert plan.num_kept_blocks >= 1
    else:
        assert kept == facts.length


@given(planners(), prompts())
def test_compaction_only_touches_recomputed_blocks(planner, facts):
    """No hit covers a row that is looked at, or a block that compaction writes; else it may."""
    plan, size = planner.plan(facts), planner.block_size * planner.pool_block
    if not plan.compresses:
        assert plan.max_hit == max(facts.length - 1, 0)
        return
    bounds = plan.num_freed_blocks * size, facts.length - plan.num_rows, plan.stats_from
    assert plan.max_hit % size == 0
    assert plan.max_hit <= min(bounds)
    assert plan.max_hit + size > min(bounds)


ROWS = [
    # method, rows of a text of 500, of IMAGE, and of one that ends with its image
    ("snapkv", 20, 20, 20),
    ("bacon+adakv", 20, 20, 20),
    ("shiftkv", 20, 20, 20),
    ("das", 20, 20, 20),
    ("postvision", 20, 100, 1),
    ("aircache+uniform", 20, 100, 1),
    ("expected+uniform", 0, 0, 0),
    ("keydiff+uniform", 0, 0, 0),
    ("streaming+uniform", 0, 0, 0),
    ("h2o+uniform", 0, 0, 0),
]


@pytest.mark.parametrize(("method", "text", "image", "end"), ROWS)
def test_rows_whose_queries_are_looked_at(method, text, image, end):
    planner = planner_of(16, method=method, window=20)
    found = [
        planner.plan(facts).num_rows
        for facts in (PromptFacts(500), IMAGE, PromptFacts(500, ((10, 500),)))
    ]
    assert found == [text, image, end]


def test_the_longer_of_window_and_instruction_is_looked_at(monkeypatch):
    """An allocator may ask for other rows than the scorer."""

    class Listener(Uniform):
        needs = Need.INSTRUCTION_QUERIES

    monkeypatch.setitem(ALLOCATORS, "listener", Listener)
    planner = planner_of(16, method="snapkv+listener", window=20)
    assert planner.plan(IMAGE).num_rows == 100
    assert planner.plan(PromptFacts(500, ((10, 490),))).num_rows == 20


@given(planners(), prompts())
def test_stored_rows_have_a_bound(planner, facts):
    plan = planner.plan(facts)
    assert plan.num_rows <= min(planner.config.max_rows, facts.length)
    assert planner.config.max_rows <= max(planner.config.window, MAX_INSTRUCTION_LEN)


@pytest.mark.parametrize(
    ("settings", "stats_from", "max_hit"),
    [
        ({"method": "snapkv"}, 500, 368),  # 8 blocks of 16 are rewritten, 3 more are a tail
        ({"method": "keydiff+uniform"}, 500, 368),
        ({"method": "h2o+uniform"}, 0, 0),
        ({"method": "elastic+uniform"}, 0, 0),
        ({"method": "das", "base": "h2o", "candidates": "all"}, 0, 0),
        ({"method": "expected+uniform"}, 4, 0),
        ({"method": "expected+uniform", "sinks": 40}, 40, 32),
        ({"method": "shiftkv"}, 0, 0),
        ({"method": "shiftkv", "stat_ctx": 64}, 436, 368),
        ({"method": "shiftkv", "stat_ctx": 300}, 200, 192),
    ],
)
def test_sums_over_the_prompt_bound_hits(settings, stats_from, max_hit):
    plan = planner_of(16, **settings).plan(PromptFacts(500))
    assert plan.stats_from == stats_from
    assert plan.max_hit == max_hit


@given(planners(), prompts())
def test_equal_planners_agree(planner, facts):
    twin = replace(planner)
    assert hash(twin) == hash(planner)
    assert twin.plan(replace(facts)) == planner.plan(facts)


@given(
    planners(scorers=("snapkv", "keydiff"), allocators=("uniform",)),
    st.integers(0, 5000),
    st.integers(0, 5000),
)
def test_longer_prompts_free_no_fewer_blocks(planner, one, two):
    short, long = (planner.plan(PromptFacts(n)) for n in sorted((one, two)))
    if planner.config.budget.tokens is not None:
        assert short.num_freed_blocks <= long.num_freed_blocks
    if planner.pool_block == 1:
        assert short.num_kept_blocks <= long.num_kept_blocks + 1


@pytest.mark.parametrize(
    ("length", "full", "kept", "tail", "max_hit"),
    [
        (1201, 37, 2, 17, 1120),  # 64 + 17 kept, the window reaches 15 tokens into the last block
        (128, 4, 2, 0, 64),
        (96, 3, 2, 0, 32),
        (95, 2, 2, 31, 94),
        (64, 2, 2, 0, 63),
        (10, 0, 0, 10, 9),
    ],
)
def test_examples(length, full, kept, tail, max_hit):
    plan = planner_of(32, method="snapkv", budget=64).plan(PromptFacts(length))
    assert (plan.num_full_blocks, plan.num_kept_blocks, plan.tail) == (full, kept, tail)
    assert plan.max_hit == max_hit
    assert (plan.capacity, plan.num_protected, plan.num_candidates) == (32, 32, length - 32)


@pytest.mark.parametrize(
    ("length", "freed", "kept", "max_hit"),
    [
        (1119, 0, 34, 1118),  # 32 before the kept ones: not one block of the pool
        (5000, 4, 2, 4 * 1056),  # 154 before the kept ones, which are inside the fifth
        (4 * 1056 + 64, 4, 2, 4 * 1056),
        (4 * 1056 + 63, 3, 2, 3 * 1056),  # a kept block reaches into the fourth
    ],
)
def test_blocks_of_the_pool(length, freed, kept, max_hit):
    """Of 1,056 tokens, of which attention kernels make 33."""
    plan = planner_of(32, 33, method="snapkv", budget=64).plan(PromptFacts(length))
    assert (plan.num_freed_blocks, plan.num_kept_blocks) == (freed, kept)
    assert plan.max_hit == max_hit


@pytest.mark.parametrize(
    ("ratio", "length", "block_size", "kept"),
    [
        ("10%", 1001, 16, 101),  # rounded up
        ("10%", 100, 16, 33),  # the window and one more
        ("10%", 100, 128, 128),  # a block
        ("7%", 1100, 16, 77),  # exactly, not what floats make of 0.07 * 1100
        (0.07, 1100, 16, 77),
    ],
)
def test_ratios(ratio, length, block_size, kept):
    planner = planner_of(block_size, method="snapkv", budget=ratio)
    plan = planner.plan(PromptFacts(length))
    assert plan.capacity + plan.num_protected == kept


class TestVisualCandidates:
    """Prompts with 10 tokens of text, 390 of an image, 100 of text; blocks of 16."""

    @pytest.mark.parametrize(
        ("budget", "capacity", "kept_blocks"),
        [
            (40, 40, 10),  # 110 + 40 tokens, of which 4 in the tail
            (1000, 390, 31),
            ("10%", 39, 10),
            ("0.1%", 1, 7),  # at least one
            ("0.5%", 2, 7),  # 1.95
            ("35%", 136, 16),  # 136.5: half to even
        ],
    )
    def test_capacity(self, budget, capacity, kept_blocks):
        plan = planner_of(16, method="snapkv", candidates="visual", budget=budget, window=32).plan(
            IMAGE
        )
        assert (plan.capacity, plan.num_candidates, plan.num_protected) == (capacity, 390, 110)
        assert plan.num_kept_blocks == kept_blocks
        assert plan.num_protected_in_blocks == 106  # text in full blocks

    @pytest.mark.parametrize(("scorer", "recent"), [("snapkv", 32), ("aircache+uniform", 1)])
    def test_recent_visual_tokens_do_not_compete(self, scorer, recent):
        """The prompt ends with its image, 4 tokens of which are in the tail block."""
        planner = planner_of(16, method=scorer, candidates="visual", budget=50, window=32)
        plan = planner.plan(PromptFacts(500, ((100, 500),)))
        assert plan.num_candidates == 400 - recent
        assert plan.num_protected == 100 + recent
        assert plan.num_protected_in_blocks == 100 + max(0, recent - 4)

    def test_a_prompt_without_images_is_left_alone(self):
        planner = planner_of(16, method="aircache+uniform", budget="10%")
        assert not planner.plan(PromptFacts(500)).compresses
        assert planner.plan(IMAGE).compresses

    def test_a_budget_within_the_window_is_fine(self):
        plan = planner_of(16, method="aircache+uniform", budget=5, window=32).plan(IMAGE)
        assert plan.capacity == 5


class TestTextPrior:
    @pytest.mark.parametrize(
        ("budget", "share", "recent", "capacity"),
        [
            ("50%", 0.5, 125, 115),  # 250 less 125 recent less the first 10
            (400, 0.0, 32, 290),  # the window; 10 + 68 of text
            (60, 0.5, 30, 0),  # the text alone is more than the budget
            (100, 0.29, 29, 0),
            (500, 0.29, 145, 345),  # all that competes
        ],
    )
    def test_visual_tokens_get_what_the_text_leaves(self, budget, share, recent, capacity):
        planner = planner_of(
            16, method="h2o+uniform", text_prior=True, recent_share=share, budget=budget, window=32
        )
        plan = planner.plan(IMAGE)
        assert plan.num_recent == recent
        competing = min(390, 500 - recent - 10)
        assert (plan.capacity, plan.num_candidates) == (capacity, competing)
        assert plan.num_protected == 500 - competing
        assert plan.compresses == (capacity < competing)


@pytest.mark.parametrize(("share", "recent"), [(0.0, 32), (0.5, 50), (0.29, 29), (1.0, 100)])
def test_recent_share_of_h2o(share, recent):
    plan = planner_of(16, method="h2o+uniform", recent_share=share, budget=100).plan(
        PromptFacts(500)
    )
    assert plan.num_recent == recent
    assert plan.num_protected_in_blocks == recent - 4
    assert (plan.capacity, plan.num_protected) == (68, 32)  # allocators share out by the window


def test_plans_know_one_recent_token_of_postvision():
    """How many a head keeps follows from its own budget, when it is selected."""
    plan = planner_of(1, method="postvision", budget=100).plan(PromptFacts(500))
    assert (plan.num_recent, plan.num_protected_in_blocks) == (1, 1)
