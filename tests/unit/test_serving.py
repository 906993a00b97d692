# SPDX-License-Identifier: Apache-2.0
"""What the serving benchmark makes of its measurements."""

import serving
from serving import Row, as_rows, different_answers, summary

POOLS = {"roomy": 100, "single 500": 100}


def burst(speeds, equal):
    values = {"tokens_per_s": speeds, "peak_running": [2, 2, 2], "preemptions": [0, 0, 0]}
    return values | ({"equal_answers": equal} if equal else {})


def rows_of(equal):
    stock = burst([100.0, 200.0, 400.0], None)
    ours = burst([110.0, 200.0, 200.0], equal)
    return as_rows("roomy", {"stock": stock, "pressure": ours})


def test_ratios_are_of_one_round():
    """The median of ratios, which is not the ratio of medians."""
    (row,) = (r for r in rows_of([1.0, 1.0, 1.0]) if r.arm == "pressure / stock")
    assert row == Row("roomy", "pressure / stock", "tokens_per_s", "ratio", [1.1, 1.0, 0.5])


def test_one_different_answer_is_told():
    assert different_answers(rows_of([1.0, 1.0, 1.0])) == []
    (problem,) = different_answers(rows_of([1.0, 0.75, 1.0]))
    assert problem == "roomy, pressure: only 75% of the answers equal those of stock"


def test_tables():
    stock = {"first_token_ms": [20.0, 20.0, 40.0], "blocks_held": [16, 16, 16]}
    ours = {"first_token_ms": [20.2, 20.0, 40.4], "blocks_held": [3, 3, 3],
            "compression_ms": [1.0, 1.0, 1.0], "pages_held": [24, 24, 24],
            "pages_for_kept": [24, 24, 24], "pages_for_budget": [24, 24, 24]}  # fmt: skip
    rows = rows_of([1.0, 1.0, 1.0])
    rows += as_rows("single 500", {"stock": stock, "always": ours})
    lines = list(summary(rows, POOLS))
    assert "| roomy, 100 blocks | `pressure` | output tokens/s | 200 | 200 | x 1.00 |" in lines
    assert lines[-1] == "| 500 | 16 | 3 | 20.0 ms | 1.010 | 1.0 ms | 5.0% |"


def test_short_prompts_are_repeated_most():
    plan = serving.PLANS["cpu"]
    pairs = [plan.pairs(length) for length in plan.single]
    assert pairs == sorted(pairs, reverse=True)
    assert min(pairs) >= 30
