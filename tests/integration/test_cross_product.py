# SPDX-License-Identifier: Apache-2.0
"""Every legal scorer x allocator x merge in the real engine, equal to the oracle's reference.

The whole product runs, not a sample, because all settings share one engine (``reconfigure``) and
the oracle one prefill of each prompt: a combination costs a few steps of a tiny Qwen2-VL. Half of
the combinations get their prompts in chunks, as many of each scorer, allocator and merge. What is
compared, for each layer and KV head of each request: head pages, keys and values in them (so kept
positions and merged entries), blocks that the request still holds, and the next tokens with their
log-probabilities.
"""

import itertools

import pytest
from engine import assert_clean, assert_same, free_blocks
from every_method import (
    BLOCK_SIZE,
    BUDGET,
    VISUAL_BUDGET,
    WINDOW,
    long_request,
    mixed_requests,
    open_engine,
    reconfigure,
    serve,
    settings,
    write_head_scores,
)
from expectations import CEILING, Reference, logprob_tolerance, oracle_config

from vllm_kvcompress import kernels
from vllm_kvcompress.allocation import ALLOCATORS
from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError
from vllm_kvcompress.merging import MERGES, LookM
from vllm_kvcompress.page_state import HeadPageState
from vllm_kvcompress.presets import PRESETS
from vllm_kvcompress.scoring import SCORERS

CHUNKS = {"whole": 2048, "chunked": 77}
"""Most tokens of a step; chunked, the longest prompt ends with fewer tokens than the window."""


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """``complete(raw)``: the settings with the file that sparsemm asks for."""
    head_scores = write_head_scores(tmp_path_factory.mktemp("scores"))

    def add(raw: dict) -> dict:
        return raw | {"head_scores": head_scores} if "sparsemm" in raw["method"] else raw

    return add


@pytest.fixture(scope="module")
def reference():
    return Reference()


@pytest.fixture(scope="module", params=CHUNKS)
def llm(request):
    with open_engine(CHUNKS[request.param]) as engine:
        yield engine


def legal(method: str) -> bool:
    """What is refused, and why, is the subject of tests/unit/test_combinations.py."""
    scorer, allocator, merge = method.split("+")
    if allocator == "sparsemm":  # needs a file, whose absence is no refusal of the combination
        return not SCORERS[scorer].shared_sets and legal(f"{scorer}+uniform+{merge}")
    try:
        KVCompressionConfig.parse(settings(method))
    except KVCompressionError:
        return False
    return True


PARTS = (tuple(SCORERS), tuple(ALLOCATORS), ("none", *MERGES))
PRODUCT = [method for method in map("+".join, itertools.product(*PARTS)) if legal(method)]


def chunks_of(method: str) -> str:
    """One of CHUNKS for each of the product; the tests below run every method both ways."""
    places = [names.index(part) for names, part in zip(PARTS, method.split("+"), strict=True)]
    return tuple(CHUNKS)[sum(places) % 2]


def check(llm, reference: Reference, raw: dict) -> None:
    """Serve the mixed requests as one batch; everything equals the oracle, nothing is left over."""
    requests = mixed_requests()
    reconfigure(llm, raw)
    free = free_blocks(llm)
    served = serve(llm, requests)
    reference.check(raw, requests, served)
    assert_clean(llm, free)


@pytest.mark.parametrize(
    ("llm", "method"),
    [(chunks_of(method), method) for method in sorted(PRODUCT, key=chunks_of, reverse=True)],
    indirect=["llm"],
    scope="module",
)
def test_product(llm, reference, complete, method):
    check(llm, reference, complete(settings(method)))


VARIANTS = [
    settings("snapkv+adakv", kernel=7, pool="max", reduction="max", alpha=0.0),
    settings("snapkv+adakv", rounding="official", normalize=False),
    settings("snapkv+pyramid", rounding="official", beta=4),
    settings("snapkv+sparsemm", rounding="official", rho=0.5),
    settings("snapkv+uniform", candidates="visual"),
    settings("snapkv+adakv+lookm", budget=VISUAL_BUDGET, candidates="visual", alpha=0.0),
    settings("snapkv+pyramid+recycle", budget=VISUAL_BUDGET, candidates="visual"),
    settings("snapkv+uniform", budget="40%", window=40),
    settings("bacon+uniform", mode="e"),
    settings("bacon+pyramid", mode="rel", beta=3, trace_r=1),
    settings("bacon+adakv", mode="el", local_k=3, alpha=0.0),
    settings("bacon+uniform", trace_reduce="head_mean", lambda_c=3.0),
    settings("snapkv+uniform", grid=True, kernel=3, pool="max"),
    settings("snapkv+adakv", clamp=True, weight="output", alpha=0.0),
    settings("bacon+uniform", grid=True, mode="rel", clamp=True),
    settings("bacon-plus+uniform", trace_reduce="head_mean", local_k=3),
    settings("das+uniform", base="bacon-plus"),
    settings("das+uniform", base="snapkv", base_options={"grid": True, "weight": "output"}),
    *(
        settings("mixkv+adakv", diversity=diversity)
        for diversity in ("flat", "attn", "keydiff", "vnorm", "knorm")
    ),
    settings("aircache+uniform", budget="30%", elite=0.5),
    settings("aircache+adakv", elite=0.0, elite_scope="layer"),
    settings("shiftkv+uniform", preset="paper"),
    settings("shiftkv+adakv", proxies=64, groups=8, seed=3, stat_ctx=50),
    settings("das+uniform", base="bacon", base_options={"mode": "rel"}, reference="global"),
    settings("das+adakv", base="mixkv", candidates="all", budget=BUDGET, eta=0.5, kmax=2.0),
    settings("das+uniform", base="h2o", base_options={"recent_share": 0.5}, budget="60%"),
    settings("das+adakv", base="postvision", candidates="all", budget=BUDGET),
    settings("das+uniform", base="expected"),
    settings("das+uniform", base="shiftkv"),
    settings("das+uniform+elastic", base="elastic"),
    settings("h2o+adakv", variant="observed"),
    settings("h2o+adakv+lookm", budget=120, recent_share=0.25, text_prior=True),
    settings("h2o+adakv+lookm", recent_share=0.25, text_prior=True, text_hard_cap=True),
    settings("h2o+uniform", budget="50%", recent_share=0.5),
    settings("expected+adakv", sinks=0, covariance=False, epsilon=0.01),
    settings("expected+uniform", horizon=7, vnorm=False, candidates="visual"),
    settings("keydiff+uniform", budget="30%", window=1),
    settings("streaming+pyramid", sinks=9),
    settings("elastic+pyramid+elastic", sinks=4),
    settings("postvision+adakv", budget="60%"),
    settings("postvision+uniform", candidates="visual"),
    settings("snapkv+uniform+lookm", merge_mode="avg"),
    settings("bacon+adakv+lookm", merge_mode="weighted"),
    settings("bacon+adakv+recycle", bins=3, alpha=0.0),
    settings("das+uniform+recycle", bins=60),
]


def name_of(raw: dict) -> str:
    return "-".join(str(value) for key, value in raw.items() if key != "window")


@pytest.mark.parametrize("raw", VARIANTS, ids=name_of)
def test_options(llm, reference, complete, raw):
    check(llm, reference, complete(raw))


@pytest.mark.parametrize("llm", ["chunked"], indirect=True, scope="module")
@pytest.mark.parametrize("preset", PRESETS)
def test_presets(llm, reference, complete, preset):
    """Published systems; those that name no budget get that of the other tests."""
    own = {"budget": BUDGET, "window": WINDOW} | dict(PRESETS[preset].settings)
    check(llm, reference, complete(own))


METHODS = [
    *(f"{scorer}+uniform+none" for scorer in SCORERS),
    *(f"snapkv+{allocator}+none" for allocator in ALLOCATORS if allocator != "uniform"),
    *(f"{'elastic' if merge == 'elastic' else 'snapkv'}+uniform+{merge}" for merge in MERGES),
]


@pytest.mark.parametrize("method", METHODS)
def test_batch_equals_requests_alone(llm, complete, method):
    """Tokens and log-probabilities of a request do not depend on what it shares steps with."""
    reconfigure(llm, complete(settings(method)))
    requests = mixed_requests()
    together = [served.answer for served in serve(llm, requests)]
    for request, answer in zip(requests, together, strict=True):
        assert llm.reset_prefix_cache()
        assert_same([serve(llm, [request])[0].answer], [answer], logprob_tolerance())


def test_pages_held(llm, reference, complete):
    """Budgets that move between heads and layers waste no pages; ``-s`` prints the table."""
    requests = [*mixed_requests()[:3], long_request()]
    table = [f"{'allocator':<10} {'tokens':>6} {'ideal':>6} {'held':>6} {'ratio':>6}  (blocks)"]
    for allocator, budget in itertools.product(ALLOCATORS, (BUDGET, 650)):
        raw = complete(settings(f"snapkv+{allocator}", budget=budget))
        reconfigure(llm, raw)
        chosen = requests if budget == BUDGET else requests[-1:]
        for request, served in zip(chosen, serve(llm, chosen), strict=True):
            length = len(reference.oracle.token_ids(request))
            held = served.kept_blocks + length % BLOCK_SIZE / BLOCK_SIZE
            ideal = reference.ideal_blocks(raw, request)
            table.append(
                f"{allocator:<10} {length:>6} {ideal:>6.2f} {held:>6.2f} {held / ideal:>6.3f}"
            )
            # less than one block above the budget, and never below it
            assert 0 <= held - ideal < 1, table[-1]
            if budget > BUDGET:
                assert held / ideal <= 1.05, table[-1]
    print("", *table, sep="\n")


# the tests above must be able to fail


def _worst_first(original):
    return lambda scores, *args: original(-scores, *args)


def _one_token_off(original):
    return lambda *args: (original(*args) - 1).clamp_min(0)


def _of_the_other_head(original):
    return lambda prompts, kept, *args: original(prompts, kept.flip(1), *args)


def _nothing_merged(original):
    return lambda self, ctx: tuple(
        rows.gather(2, ctx.kept.clamp(max=rows.shape[2] - 1)[..., None].expand(-1, -1, -1, size))
        for rows, size in ((ctx.keys, ctx.keys.shape[3]), (ctx.values, ctx.values.shape[3]))
    )


def _pages_of_another_owner(original):
    return lambda *args: original(*args[:-2], args[-2].flip(1, 2), args[-1].flip(1, 2))


@pytest.mark.parametrize(
    ("method", "owner", "name", "mutation"),
    [
        ("keydiff+uniform", kernels, "select_tokens", _worst_first),
        ("h2o+pyramid", kernels, "select_tokens", _one_token_off),
        ("bacon+aircache", kernels, "stage_tokens", _of_the_other_head),
        ("snapkv+uniform+lookm", LookM, "merge", _nothing_merged),
        ("snapkv+adakv", HeadPageState, "store", _pages_of_another_owner),
        ("elastic+pyramid", HeadPageState, "store", _pages_of_another_owner),
    ],
)
def test_mutations_are_noticed(
    llm, reference, complete, monkeypatch, method, owner, name, mutation
):
    raw = complete(settings(method))
    reconfigure(llm, raw)
    served = serve(llm, mixed_requests())
    reference.check(raw, mixed_requests(), served)
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, mutation(original))
    reconfigure(llm, raw)
    with pytest.raises(AssertionError, match="request 0"):
        reference.check(raw, mixed_requests(), serve(llm, mixed_requests()))


def test_only_near_ties_are_forgiven(reference):
    """A kept token may be another one than the oracle's if both have nearly the same score."""
    raw, request = settings("streaming+uniform"), mixed_requests()[0]
    want = reference.expected(raw, [request])[0].selection
    kept = [[positions.copy() for positions in heads] for heads in want.kept]
    assert not reference.near_ties(request, oracle_config(raw), kept, want, CEILING)
    first = SCORERS["streaming"]().sinks  # of the recent tokens, in the order of the positions
    kept[1][0][first] -= 1
    with pytest.raises(AssertionError, match="layer 1 head 0 keeps"):
        reference.near_ties(request, oracle_config(raw), kept, want, CEILING)
    assert reference.near_ties(request, oracle_config(raw), kept, want, 0.1)
