# SPDX-License-Identifier: Apache-2.0
"""User settings: what is accepted, and that a refusal tells everything that is wrong."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvcompress.allocation import ALLOCATORS, Scope
from vllm_kvcompress.budget import Budget
from vllm_kvcompress.config import (
    KVCompressionConfig,
    KVCompressionError,
    parse_cli_json,
)
from vllm_kvcompress.merging import MERGES
from vllm_kvcompress.presets import PRESETS
from vllm_kvcompress.scoring import SCORERS, Need

METHODS = [
    f"{scorer}+{allocator}"
    for scorer in SCORERS
    for allocator in ALLOCATORS
    if SCORERS[scorer].countable or ALLOCATORS[allocator].scope is not Scope.LAYER
    if ALLOCATORS[allocator].per_layer or not SCORERS[scorer].shared_sets
]


@pytest.fixture(scope="module")
def head_scores(tmp_path_factory):
    path = tmp_path_factory.mktemp("scores") / "heads.json"
    path.write_text('{"0-0": [0.5], "0-1": [0.1]}')
    return str(path)


def reasons_of(**raw) -> str:
    with pytest.raises(KVCompressionError) as caught:
        KVCompressionConfig.parse(raw)
    return str(caught.value)


class TestBudget:
    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            (128, Budget(tokens=128)),
            ("128", Budget(tokens=128)),
            (" 128 ", Budget(tokens=128)),
            ("10%", Budget(ratio=0.1)),
            ("1.1 %", Budget(ratio=0.011)),  # 1.1 / 100 is a little more
            ("0.5%", Budget(ratio=0.005)),
            ("100%", Budget(ratio=1.0)),
            (0.25, Budget(ratio=0.25)),
            ("0.25", Budget(ratio=0.25)),
            (1e-5, Budget(ratio=1e-5)),
            (Budget(tokens=7), Budget(tokens=7)),
        ],
    )
    def test_accepted(self, value, expected):
        assert Budget.parse(value) == expected

    @pytest.mark.parametrize(
        "value",
        [0, -5, "0", "-1", "0%", "101%", 1.5, -0.1, "12.5", "nan%", float("nan"), "", "%", "many",
         True, None, [64]],
    )  # fmt: skip
    def test_refused(self, value):
        with pytest.raises(ValueError, match="number of tokens or a ratio such as 10%") as caught:
            Budget.parse(value)
        assert repr(value) in str(caught.value)

    def test_text(self):
        assert str(Budget(tokens=128)) == "128"
        assert str(Budget(ratio=0.07)) == "7%"


class TestParse:
    def test_defaults(self):
        config = KVCompressionConfig.parse({"method": "snapkv"})
        assert (config.scorer, config.allocator) == ("snapkv", "uniform")
        assert config.budget == Budget(tokens=128)
        assert config.window == 32
        assert config.method == "snapkv+uniform"

    def test_options_reach_the_methods(self):
        config = KVCompressionConfig.parse(
            {"method": "bacon+adakv", "budget": "64", "window": "8", "mode": "rel", "alpha": 0.5}
        )
        assert config.window == 8
        assert config.scoring == SCORERS["bacon"](mode="rel")
        assert config.allocation == ALLOCATORS["adakv"](alpha=0.5)
        assert config.merging is None

    def test_three_parts(self):
        raw = {"method": "snapkv+adakv+lookm", "merge_mode": "avg", "kernel": 7}
        config = KVCompressionConfig.parse(raw)
        assert config.method == "snapkv+adakv+lookm"
        assert config.merging == MERGES["lookm"](merge_mode="avg")
        assert config.scoring == SCORERS["snapkv"](kernel=7)
        assert KVCompressionConfig.parse({"method": "snapkv+adakv+none"}).merging is None

    def test_an_option_that_two_methods_share_reaches_both(self):
        config = KVCompressionConfig.parse({"method": "elastic+uniform+elastic", "sinks": 3})
        assert config.scoring == SCORERS["elastic"](sinks=3)
        assert config.merging == MERGES["elastic"](sinks=3)

    @pytest.mark.parametrize(
        ("method", "given", "expected"),
        [
            ("snapkv", {}, "all"),
            ("snapkv", {"candidates": "visual"}, "visual"),
            ("aircache+uniform", {}, "visual"),
            ("das", {}, "visual"),
            ("das", {"candidates": "all"}, "all"),
            ("h2o", {"text_prior": True}, "after text"),
            ("h2o", {"text_prior": False}, "all"),
            ("h2o", {"text_prior": True, "text_hard_cap": True}, "all"),
        ],
    )
    def test_candidates(self, method, given, expected):
        config = KVCompressionConfig.parse({"method": method, **given})
        assert config.candidates.value == expected

    @pytest.mark.parametrize(
        ("method", "needs"),
        [
            ("snapkv", Need.KEYS | Need.WINDOW_QUERIES),
            ("snapkv+uniform+recycle", Need.KEYS | Need.WINDOW_QUERIES | Need.SEGMENTS),
            ("h2o+uniform+lookm", Need.KEY_ATTENTION_SUMS),
        ],
    )
    def test_needs_of_all_methods_together(self, method, needs):
        assert KVCompressionConfig.parse({"method": method}).needs == needs

    def test_needs_of_an_option(self):
        raw = {"method": "h2o", "text_prior": True, "text_hard_cap": True}
        assert KVCompressionConfig.parse(raw).needs == Need.KEY_ATTENTION_SUMS | Need.SEGMENTS

    @pytest.mark.parametrize(
        ("method", "spans"),
        [("snapkv", False), ("snapkv+adakv", False), ("snapkv+pyramid", True)],
    )
    def test_budgets_that_span_layers(self, method, spans):
        assert KVCompressionConfig.parse({"method": method}).spans_layers == spans

    def test_the_input_is_left_as_it_is(self):
        raw = {"method": "snapkv", "kernel": 3}
        KVCompressionConfig.parse(raw)
        assert raw == {"method": "snapkv", "kernel": 3}

    @pytest.mark.parametrize("method", METHODS)
    def test_every_combination_serves_its_own_defaults(self, method, head_scores):
        scorer, allocator = method.split("+")
        required = {"head_scores": head_scores} if allocator == "sparsemm" else {}
        classes = SCORERS[scorer], ALLOCATORS[allocator]
        options = {
            f.name: f.default if f.default is not dataclasses.MISSING else f.default_factory()
            for cls in classes
            for f in dataclasses.fields(cls)
        }
        config = KVCompressionConfig.parse({"method": method, **options, **required})
        assert config.scoring == classes[0]()
        assert config.allocation == classes[1](**required)


class TestRefusals:
    @pytest.mark.parametrize("method", [None, "", 3, ["bacon"]])
    def test_method_is_required(self, method):
        assert "no method: set --kv-compression METHOD" in reasons_of(method=method)

    def test_unknown_scorer(self):
        text = reasons_of(method="snapvk")
        assert "unknown scorer 'snapvk'. Did you mean 'snapkv'? Valid: " in text
        valid = text.split("Valid: ")[1].removesuffix(".").split(", ")
        assert valid == sorted({*SCORERS, *PRESETS})

    def test_unknown_allocator(self):
        text = reasons_of(method="snapkv+adakw")
        valid = ", ".join(sorted(ALLOCATORS))
        assert f"unknown allocator 'adakw'. Did you mean 'adakv'? Valid: {valid}." in text

    def test_unknown_merge(self):
        text = reasons_of(method="snapkv+uniform+lookn")
        valid = ", ".join(sorted(["none", *MERGES]))
        assert f"unknown merge 'lookn'. Did you mean 'lookm'? Valid: {valid}." in text

    def test_too_many_parts(self):
        text = reasons_of(method="snapkv+uniform+none+none")
        assert "method 'snapkv+uniform+none+none' has too many parts" in text
        assert text.count("\n  - ") == 1

    def test_a_preset_is_a_whole_method(self):
        text = reasons_of(method="pyramidkv+adakv")
        assert "unknown scorer 'pyramidkv': it is a preset, which stands for snapkv+pyramid" in text
        assert "Did you mean" not in text
        assert text.split("Valid: ")[1].removesuffix(".").split(", ") == sorted(SCORERS)

    def test_presets_are_not_suggested_for_parts(self):
        text = reasons_of(method="pyramidkw+adakv")
        assert "unknown scorer 'pyramidkw'." in text
        assert "pyramidkv" not in text
        assert "Did you mean 'pyramidkv'?" in reasons_of(method="pyramidkw")

    @pytest.mark.parametrize(
        ("method", "options", "reason"),
        [
            ("streaming+adakv", {}, "streaming has no scores that adakv could count across heads"),
            ("elastic+adakv", {}, "elastic has no scores that adakv could count across heads"),
            ("prefixkv+adakv", {}, "prefixkv has no scores that adakv could count across heads"),
            ("elastic+sparsemm", {}, "elastic keeps the same tokens for all heads of a layer"),
            ("prefixkv+sparsemm", {}, "prefixkv keeps the same tokens for all heads of a layer"),
            ("das+sparsemm", {"base": "elastic"}, "das keeps the same tokens for all heads"),
            ("das+adakv", {"base": "elastic"}, "das has no scores that adakv could count"),
            ("snapkv+uniform+elastic", {}, "use scorer elastic or prefixkv, or merge lookm"),
            ("keydiff+uniform+recycle", {}, "merge recycle weighs dropped tokens by their scores"),
            ("streaming+uniform+recycle", {}, "those of streaming are no weights"),
            ("aircache+uniform", {"candidates": "all"}, "aircache scores visual tokens only"),
        ],
    )
    def test_methods_that_do_not_go_together(self, method, options, reason, head_scores):
        if "sparsemm" in method:
            options = {**options, "head_scores": head_scores}
        assert reason in reasons_of(method=method, **options)

    @pytest.mark.parametrize("value", ["text", "after text", None, ["all"], True])
    def test_candidates(self, value):
        text = reasons_of(method="snapkv", candidates=value)
        assert f"candidates must be one of all, visual, got {value!r}" in text
        assert text.count("\n  - ") == 1

    def test_text_prior_needs_a_budget_above_the_window(self):
        assert "includes the window" in reasons_of(method="h2o", text_prior=True, budget=32)
        visual = {"method": "snapkv", "candidates": "visual", "budget": 32}
        assert KVCompressionConfig.parse(visual).budget == Budget(tokens=32)

    def test_text_that_competes_is_a_candidate(self):
        given = {"text_prior": True, "text_hard_cap": True, "candidates": "visual"}
        assert 'set "candidates": "all"' in reasons_of(method="h2o", **given)

    def test_far_off_names_get_the_list_only(self):
        text = reasons_of(method="zzz")
        assert "Valid: " in text
        assert "Did you mean" not in text

    def test_unknown_key(self):
        text = reasons_of(method="snapkv", kernal=5)
        assert "unknown key 'kernal' for snapkv+uniform. Did you mean 'kernel'?" in text
        valid = "method, budget, window, candidates, when, workspace_mib, allow, kernel, pool"
        assert f"Valid: {valid}, reduction, score_dtype, grid, clamp, weight." in text

    def test_options_of_a_method_that_was_not_chosen(self):
        assert "unknown key 'alpha'" in reasons_of(method="bacon", alpha=0.2)

    @pytest.mark.parametrize("window", [0, -1, 1.5, "8.0", "x", None, True])
    def test_window(self, window):
        text = reasons_of(method="snapkv", window=window)
        assert "--kv-window: expected a whole number of tokens >= 1" in text
        assert repr(window) in text

    @pytest.mark.parametrize("budget", [16, 32])
    def test_budget_within_the_window(self, budget):
        text = reasons_of(method="snapkv", budget=budget, window=32)
        assert f"--kv-budget {budget} includes the window" in text
        assert "raise the budget to at least 33 or lower the window" in text

    @pytest.mark.parametrize(
        ("option", "value", "expected"),
        [
            ("kernel", 4, "an odd whole number >= 1"),
            ("kernel", 0, "an odd whole number >= 1"),
            ("kernel", 5.0, "an odd whole number >= 1"),
            ("kernel", True, "an odd whole number >= 1"),
            ("pool", "sum", "one of avg, max"),
            ("reduction", None, "one of mean, max"),
            ("mode", "ELT", "one of e, el, elt, rel"),
            ("local_k", 2, "an odd whole number >= 1"),
            ("trace_r", -1, "a whole number >= 0"),
            ("trace_r", 1.5, "a whole number >= 0"),
            ("trace_r", False, "a whole number >= 0"),
            ("lambda_c", -0.1, "a number in [0,"),
            ("lambda_c", float("inf"), "a number in [0,"),
            ("topk_frac", "2", "a number in [0,"),
            ("topk_frac", float("nan"), "a number in [0,"),
            ("alpha", 1.01, "a number in [0, 1]"),
            ("alpha", "0.2", "a number in [0, 1]"),
            ("alpha", True, "a number in [0, 1]"),
            ("normalize", 1, "true or false"),
            ("normalize", "true", "true or false"),
            ("rounding", "floor", "one of exact, official"),
        ],
    )
    def test_bad_option_values(self, option, value, expected):
        text = reasons_of(method="bacon+adakv", **{option: value})
        assert f"{option} must be {expected}" in text
        assert f"got {value!r}" in text
        assert text.count("\n  - ") == 1

    def test_all_reasons_at_once(self):
        text = reasons_of(method="snapvk+adakw", budget="many", window=0)
        assert text.startswith("KV compression cannot start:\n")
        assert text.count("\n  - ") == 4
        for part in ("unknown scorer", "unknown allocator", "--kv-budget", "--kv-window"):
            assert part in text

    def test_all_options_at_once(self):
        text = reasons_of(method="bacon+adakv", mode="x", alpha=7, kernal=3, lambda_d=1)
        assert text.count("\n  - ") == 4
        assert "Did you mean 'kernel'?" in text
        assert "Did you mean 'lambda_c'?" in text


budgets = st.one_of(
    st.integers(33, 10_000).map(lambda n: Budget(tokens=n)),
    st.floats(0, 1, exclude_min=True).map(lambda r: Budget(ratio=r)),
)


class TestJSON:
    @given(st.sampled_from(METHODS), st.sampled_from(["", "lookm"]), budgets, st.integers(1, 32))
    def test_round_trip(self, head_scores, method, merge, budget, window):
        raw = {"method": method, "budget": budget, "window": window}
        if "sparsemm" in method:
            raw["head_scores"] = head_scores
        if merge == "lookm":
            raw["method"] += "+lookm"
        config = KVCompressionConfig.parse(raw)
        assert KVCompressionConfig.parse(json.loads(json.dumps(config.to_json()))) == config

    def test_round_trip_with_options(self):
        raw = {"method": "bacon+adakv", "mode": "rel", "lambda_c": 0.3, "normalize": False}
        config = KVCompressionConfig.parse(raw)
        again = KVCompressionConfig.parse(json.loads(json.dumps(config.to_json())))
        assert again == config
        assert again.options == {"mode": "rel", "lambda_c": 0.3, "normalize": False}

    @pytest.mark.parametrize(
        "raw",
        [
            {"method": "h2o+uniform+lookm", "text_prior": True, "recent_share": 0.5},
            {"method": "das", "base": "h2o", "base_options": {"variant": "observed"}},
            {"method": "snapkv", "candidates": "visual", "budget": 5},
            {"method": "elastic+uniform+elastic", "sinks": 2},
        ],
    )
    def test_round_trip_of_candidates_and_merges(self, raw):
        config = KVCompressionConfig.parse(raw)
        again = KVCompressionConfig.parse(json.loads(json.dumps(config.to_json())))
        assert again == config
        assert (again.scoring, again.merging) == (config.scoring, config.merging)

    def test_command_line_value(self):
        assert parse_cli_json('{"mode": "rel"}') == {"mode": "rel"}

    @pytest.mark.parametrize(
        ("text", "expected"),
        [("{mode: rel}", "is not valid JSON"), ("[1]", "must be a JSON object"), ("", "not valid")],
    )
    def test_bad_command_line_value(self, text, expected):
        with pytest.raises(KVCompressionError, match=expected):
            parse_cli_json(text)
