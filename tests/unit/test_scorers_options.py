# SPDX-License-Identifier: Apache-2.0
"""Options of scorers: what is refused, and what a scorer says of itself because of them."""

import copy
import pickle

import pytest

from vllm_kvcompress.scoring import SCORERS, Need
from vllm_kvcompress.scoring.das import DAS, bases
from vllm_kvcompress.scoring.mixkv import MixKV


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("mixkv", {"diversity": "none"}, "diversity must be one of head, flat"),
        ("mixkv", {"kernel": 4}, "kernel must be an odd"),
        ("snapkv", {"score_dtype": "bfloat16"}, "score_dtype must be one of float32, model"),
        ("snapkv", {"grid": "rows"}, "grid must be true or false"),
        ("snapkv", {"clamp": 1}, "clamp must be true or false"),
        ("bacon", {"weight": "values"}, "weight must be one of none, output"),
        ("bacon-plus", {"score_dtype": "model"}, "goes without grid, clamp and weight"),
        ("snapkv", {"score_dtype": "model", "clamp": True}, "goes without grid, clamp"),
        ("bacon", {"trace_reduce": "mean"}, "trace_reduce must be one of head, head_mean"),
        ("shiftkv", {"preset": "mine"}, "preset must be one of released, paper"),
        ("shiftkv", {"proxies": 512, "groups": 30}, "multiple of groups"),
        ("shiftkv", {"groups": 0}, "groups must be a whole number >= 1"),
        ("shiftkv", {"proxies": True}, "proxies must be a whole number"),
        ("shiftkv", {"tau": 1.5}, r"tau must be a number in \[0, 1\]"),
        ("shiftkv", {"gamma": -1}, "gamma must be a number"),
        ("shiftkv", {"vote_lambda": "1"}, "vote_lambda must be a number"),
        ("shiftkv", {"stats": "median"}, "stats must be one of scalar, feature"),
        ("shiftkv", {"cover": ""}, "cover must be one of floor, min"),
        ("shiftkv", {"mix_last": 1}, "mix_last must be true or false"),
        ("shiftkv", {"stat_ctx": -1}, "stat_ctx must be a whole number >= 0"),
        ("shiftkv", {"llava_compat": "yes"}, "llava_compat must be true or false"),
        ("shiftkv", {"seed": 0.5}, "seed must be a whole number"),
        ("das", {"base": "keydiff"}, "base must be one of snapkv"),
        ("das", {"base": "das"}, "base must be one of snapkv"),
        ("das", {"base_options": [1]}, "base_options must be a mapping"),
        ("das", {"base_options": {"kernel": 2}}, "kernel must be an odd"),
        ("das", {"eta": -0.1}, "eta must be a number"),
        ("das", {"kmax": 0.5}, "kmax must be a number in"),
        ("das", {"reference": "local"}, "reference must be one of running, global"),
        ("h2o", {"variant": "mean"}, "variant must be one of sum, observed"),
        ("h2o", {"recent_share": 2}, "recent_share must be a number"),
        ("h2o", {"text_prior": 1}, "text_prior must be true or false"),
        ("h2o", {"text_hard_cap": True}, "text_hard_cap limits text_prior"),
        ("h2o", {"text_prior": True, "text_hard_cap": 1}, "text_hard_cap must be true or false"),
        ("expected", {"horizon": 0}, "horizon must be a whole number >= 1"),
        ("expected", {"sinks": -1}, "sinks must be a whole number >= 0"),
        ("expected", {"covariance": None}, "covariance must be true or false"),
        ("expected", {"vnorm": 0}, "vnorm must be true or false"),
        ("expected", {"epsilon": -1}, "epsilon must be a number"),
        ("streaming", {"sinks": 1.0}, "sinks must be a whole number"),
        ("elastic", {"sinks": -1}, "sinks must be a whole number"),
        ("prefixkv", {"sinks": "1"}, "sinks must be a whole number"),
    ],
)
def test_refused(name, options, words):
    with pytest.raises(ValueError, match=words):
        SCORERS[name](**options)


def test_unknown_option_of_a_base():
    with pytest.raises(TypeError, match="trace_r"):
        DAS(base_options={"trace_r": 1})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not readable JSON"),
        ("[1]", "must be a JSON object"),
        ("{}", "must be a JSON object"),
        ('{"1-2": [0.5]}', "not of the form"),
        ('{"1-2-key": 0.5}', "must be a list of numbers"),
        ('{"1-2-key": []}', "must be a list of numbers"),
        ('{"1-2-key": [0.5, 7]}', r"numbers in \[-1, 1\]"),
        ('{"1-2-key": ["0.5"]}', "must be a list of numbers"),
        ('{"1-2-key": [0.5], "1-2-values": [0.5]}', "not of the form"),
        ('{"1-2-key": [0.5], "1-2-value": [7]}', r"numbers in \[-1, 1\]"),
        ('{"1-2-value": [0.5]}', "no entry for keys"),
    ],
)
def test_refused_ratio_table(text, words, tmp_path):
    path = tmp_path / "ratios.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        MixKV(ratio_table=str(path))


def test_missing_ratio_table(tmp_path):
    with pytest.raises(ValueError, match="not readable JSON"):
        MixKV(ratio_table=str(tmp_path / "none.json"))


def test_das_needs_what_its_base_needs():
    assert DAS.needs == Need.SEGMENTS | bases()["snapkv"].needs
    for name, base in bases().items():
        das = DAS(base=name)
        assert das.needs == Need.SEGMENTS | base.needs
        assert das.shared_sets == base.shared_sets
        assert das.countable == base.countable
        assert das.recent_fraction == base.recent_fraction
        assert das.num_recent(32, 100) == base().num_recent(32, 100)
    assert DAS.needs == Need.SEGMENTS | bases()["snapkv"].needs
    assert DAS(base="expected", base_options={"sinks": 7}).stats_from(100) == 7


def test_what_options_need():
    """Nothing is read for options that are off, whatever the class has by default."""
    off = {"grid": False, "clamp": False, "weight": "none"}
    grid, output = Need.SEGMENTS | Need.GRIDS, Need.VALUES | Need.OUTPUT_GRAMS
    for name in ("snapkv", "bacon", "mixkv"):
        scorer = SCORERS[name]
        assert scorer().needs == scorer.needs
        assert scorer(grid=True).needs == scorer.needs | grid
        assert scorer(clamp=True).needs == scorer.needs
        assert scorer(weight="output").needs == scorer.needs | output
    plus = SCORERS["bacon-plus"]
    assert plus().needs == plus.needs == SCORERS["bacon"].needs | grid | output
    assert plus(**off).needs == SCORERS["bacon"].needs
    assert DAS(base="bacon", base_options={"grid": True}).needs == SCORERS["bacon"].needs | grid


def test_das_survives_the_way_to_a_worker():
    das = DAS(base="h2o", base_options={"variant": "observed"}, eta=0.5)
    for twin in (copy.deepcopy(das), pickle.loads(pickle.dumps(das))):
        assert twin == das
        assert twin.needs == das.needs
        assert twin.scorer == das.scorer
    assert hash(das) == hash(DAS(base="h2o", base_options={"variant": "observed"}, eta=0.5))


@pytest.mark.parametrize(
    ("expected", "names"),
    [
        (32, ("snapkv", "bacon", "bacon-plus", "mixkv", "das", "h2o")),
        (1, ("aircache", "shiftkv", "expected", "keydiff", "streaming", "elastic", "prefixkv",
             "postvision")),
    ],
)  # fmt: skip
def test_recent_tokens(expected, names):
    """R by method, with a window of 32 and 100 kept tokens."""
    assert {SCORERS[name]().num_recent(window=32, kept=100) for name in names} == {expected}
