# SPDX-License-Identifier: Apache-2.0
"""One meaning per word: names and phrases that docs/layouts-and-terms.md has replaced stay away."""

import functools
import re
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
ROOTS = {
    "vllm_kvcompress": (".py",),
    "triton_kernels": (".py",),
    "benchmarks": (".py", ".cu", ".cuh"),
    "csrc": (".cpp", ".h"),
    "docs": (".md",),
    "README.md": (".md",),
    "CONTRIBUTING.md": (".md",),
}
"""What is read, and the kinds of files in it."""


class Banned(NamedTuple):
    """A word that must not come back.

    Attributes:
        pattern: regular expression, searched line by line.
        instead: what to write.
        example: text that the pattern finds.
        allowed: regular expression; a line that it finds means something else by the word.
    """

    pattern: str
    instead: str
    example: str
    allowed: str | None = None


BANNED = (
    # names
    Banned(r"\bnatural(ly)?\b", "prefill (path), uncompressed (cache)", "natural attention"),
    Banned(r"\bnatural_", "prefill_", "meta.natural_tokens"),
    Banned(r"[Vv]irtual[ _]?(b|B|cam|metadata|builder|seq|decode)", "per-head batch, per_head",
           "a virtual batch"),
    Banned(r"\bDemands?\b|\bdemands\b", "BudgetRequest, PromptBatch", "Demands(slots)"),
    Banned(r"scored[_ ]tokens|num_scored\b", "head_budgets, num_candidates, competing tokens",
           "scored tokens per head"),
    Banned(r"\bpinned\b|num_pinned|pinned_end", "protected, num_protected", "pinned = ~candidate",
           allowed=r"pinned memory|pin_memory"),
    Banned(r"\bcaptur(e|es|ed|ing)\b|capture_from", "stored, kept, stats_from; graphs are captured",
           "rows that a layer captures", allowed=r"[Gg]raph"),
    Banned(r"text_rows|TEXT_ROWS|TEXT_QUERIES", "instruction_len, INSTRUCTION_QUERIES",
           "Need.TEXT_QUERIES"),
    Banned(r"QueryMaker|LayerQueries|\bquery maker\b", "QueryProjector", "a QueryMaker"),
    Banned(r"\bhold\(", "static_buffer(", "self.hold(starts)"),
    Banned(r"\bRowPlan\b|\bSumPlan\b|\bPagePlan\b", "QueryRun, ChunkStats, PromptPlan",
           "RowPlan(owner)"),
    Banned(r"EndingPrompts|ending_prompts", "FinishedPrefills", "EndingPrompts(batch)"),
    Banned(r"\bLayerInputs\b|\blayer_inputs\b", "LayerStack", "LayerInputs(queries)"),
    Banned(r"\bLayerContext\b", "ScoringContext", "ctx: LayerContext"),
    Banned(r"\brequest_store\b|RequestStore", "RequestSlots, PrefillStats", "request_store.py"),
    Banned(r"LayerAllocator|ModelAllocator", "Allocator with a Scope", "class X(LayerAllocator)"),
    Banned(r"\btake_left\b|\btake_lost\b", "drain_released", "rows.take_left()"),
    Banned(r"group_masses|column_sums|count_votes|elite_scores|calibrate_scores",
           "group_attention_sum, key_attention_sum, cover_votes, elite_attention, bacon_calibrate",
           "kernels.group_masses"),
    Banned(r"layer_row\b|layer_rows\b", "layer_idx", "builder.layer_rows"),
    Banned(r"\bi_group\b", "i_qhead, i_g", "for i_group in range",
           allowed=r"num_groups|GROUPS_PER_PROGRAM|o_proxy|i_cover|masses_ptr"),
    Banned(r"is_served|reasons_against|\.plain\(\)", "is_supported, missing_on, base_spec",
           "kernels.reasons_against"),
    Banned(r"Scope\.EVEN|layers\.even\b", "Scope.UNIFORM", "layers.even"),
    Banned(r"settings_of|planner\.settings|settings: str", "config", "settings_of(vllm_config)"),
    # claims that are no longer true
    Banned(r"[Nn]o custom scheduler", "say which of vLLM's slots are used", "No custom scheduler"),
    # phrases
    Banned(r"stands? there", "say what is there: duplicate entry for ...", "stands there twice"),
    Banned(r"forgets everything", "nothing would be kept", "every layer forgets everything"),
    Banned(r"cannot live with", "incompatible", "that compression cannot live with"),
    Banned(r"with all it wants", "and its dependencies", "kvpress with all it wants"),
    Banned(r"as if this were not there", "is unchanged", "behaves as if this were not there"),
    Banned(r"silently does not happen", "a server that silently stopped compressing",
           "Compression that silently does not happen"),
    Banned(r"\b[Ll]eave candidates", 'set "candidates": "all"',
           "leave candidates at all"),
    Banned(r"is missing: give", "set --flag VALUE", "'method' is missing: give a scorer"),
    Banned(r"that fails is the last one", "the run stops at the first failure",
           "A stage that fails is the last one"),
    Banned(r"are not theirs", "do not quote results of these presets as the papers'",
           "Results with them are not theirs"),
)  # fmt: skip


@functools.cache
def lines() -> list[tuple[str, str]]:
    """(place, text) of every line that is read."""
    found = []
    for root, suffixes in ROOTS.items():
        top = REPOSITORY / root
        files = [top] if top.is_file() else sorted(top.rglob("*"))
        files = [path for path in files if path.suffix in suffixes]
        assert files, f"{root} has no files: nothing would be checked"
        for path in files:
            name = path.relative_to(REPOSITORY)
            text = path.read_text(encoding="utf-8")
            found += [(f"{name}:{n}", line) for n, line in enumerate(text.splitlines(), 1)]
    return found


def occurrences(banned: Banned, text: list[tuple[str, str]]) -> list[str]:
    """Places where the word stands in its banned meaning."""
    word = re.compile(banned.pattern)
    allowed = re.compile(banned.allowed) if banned.allowed else None
    return [
        f"{place}: {line.strip()}"
        for place, line in text
        if word.search(line) and not (allowed and allowed.search(line))
    ]


@pytest.mark.parametrize("banned", BANNED, ids=lambda banned: banned.example)
class TestWords:
    def test_is_gone(self, banned):
        found = occurrences(banned, lines())
        assert not found, "\n".join([f"write {banned.instead}:", *found])

    def test_would_be_found(self, banned):
        assert occurrences(banned, [("here", f"x {banned.example}")])
        assert not occurrences(banned, [("here", banned.instead)])


def test_other_meanings_are_allowed():
    text = [("a", "# into pinned memory"), ("b", "while graphs are captured"), ("c", "cudagraph")]
    assert [place for each in BANNED if each.allowed for place in occurrences(each, text)] == []
