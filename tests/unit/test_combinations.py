# SPDX-License-Identifier: Apache-2.0
"""Which scorers, allocators and merges go together; the rest is refused, with the reason.

The rules stand here in their own words, and the whole product is held against them.
"""

import itertools
import json

import pytest

from vllm_kvcompress.allocation import ALLOCATORS
from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError
from vllm_kvcompress.merging import MERGES
from vllm_kvcompress.scoring import SCORERS
from vllm_kvcompress.scoring.das import bases

ONE_SET_PER_LAYER = ("elastic", "prefixkv")
NO_WEIGHTS = ("keydiff", "streaming")
COMBINATIONS = list(itertools.product(SCORERS, ALLOCATORS, ("none", *MERGES)))


def reasons(scorer: str, allocator: str, merge: str) -> list[str]:
    """Parts of the messages that must appear."""
    found = []
    if allocator == "adakv" and scorer in (*ONE_SET_PER_LAYER, "streaming"):
        found.append(f"{scorer} has no scores that adakv could count across heads")
    if allocator in ("adakv", "sparsemm") and scorer in ONE_SET_PER_LAYER:
        found.append(f"so {allocator} cannot give heads different budgets")
    if merge == "elastic" and scorer not in ONE_SET_PER_LAYER:
        found.append("use scorer elastic or prefixkv, or merge lookm")
    if merge == "recycle" and scorer in NO_WEIGHTS:
        found.append(f"those of {scorer} are no weights")
    return found


@pytest.fixture
def head_scores(tmp_path) -> str:
    file = tmp_path / "heads.json"
    file.write_text(json.dumps({"0-0": [1.0], "0-1": [2.0]}))
    return str(file)


def parse(head_scores: str, scorer: str, allocator: str, merge: str, **options):
    raw = {"method": f"{scorer}+{allocator}+{merge}", **options}
    if allocator == "sparsemm":
        raw["head_scores"] = head_scores
    return KVCompressionConfig.parse(raw)


def check(parts: list[str], head_scores: str, *names: str, **options) -> None:
    """Accepted if there are no reasons; else refused with these and no others."""
    if not parts:
        config = parse(head_scores, *names, **options)
        assert (config.scorer, config.allocator, config.merge) == names
        assert KVCompressionConfig.parse(config.to_json()) == config
        return
    with pytest.raises(KVCompressionError) as caught:
        parse(head_scores, *names, **options)
    text = str(caught.value)
    for part in parts:
        assert part in text
    assert text.count("\n  - ") == len(parts)


@pytest.mark.parametrize(("scorer", "allocator", "merge"), COMBINATIONS)
def test_product(head_scores, scorer, allocator, merge):
    check(reasons(scorer, allocator, merge), head_scores, scorer, allocator, merge)


@pytest.mark.parametrize("base", bases())
@pytest.mark.parametrize(("allocator", "merge"), itertools.product(ALLOCATORS, ("none", *MERGES)))
def test_das_is_refused_what_its_base_is(head_scores, base, allocator, merge):
    parts = [part.replace(f"{base} ", "das ") for part in reasons(base, allocator, merge)]
    check(parts, head_scores, "das", allocator, merge, base=base)


@pytest.mark.parametrize("scorer", SCORERS)
def test_candidates(head_scores, scorer):
    """All scorers can be confined to visual tokens; aircache knows no others."""
    check([], head_scores, scorer, "uniform", "none", candidates="visual")
    refused = ["aircache scores visual tokens only"] if scorer == "aircache" else []
    check(refused, head_scores, scorer, "uniform", "none", candidates="all")


def test_all_reasons_at_once(head_scores):
    check(
        [
            "streaming has no scores that adakv could count",
            "use scorer elastic or prefixkv",
            "--kv-budget 8 includes the window",
        ],
        head_scores,
        *("streaming", "adakv", "elastic"),
        budget=8,
        window=8,
    )


def test_sparsemm_without_its_file():
    with pytest.raises(KVCompressionError, match="sparsemm: head_scores is required"):
        KVCompressionConfig.parse({"method": "snapkv+sparsemm"})
