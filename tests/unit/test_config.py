# SPDX-License-Identifier: Apache-2.0
"""User settings: what is accepted, and that a refusal tells everything that is wrong."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvcompress.allocation import ALLOCATORS
from vllm_kvcompress.config import (
    CONFIG_KEY,
    Budget,
    KVCompressionConfig,
    KVCompressionError,
    parse_cli_json,
)
from vllm_kvcompress.scoring import SCORERS

METHODS = [f"{scorer}+{allocator}" for scorer in SCORERS for allocator in ALLOCATORS]


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
        assert config.make_scorer() == SCORERS["bacon"](mode="rel")
        assert config.make_allocator() == ALLOCATORS["adakv"](alpha=0.5)

    def test_the_input_is_left_as_it_is(self):
        raw = {"method": "snapkv", "kernel": 3}
        KVCompressionConfig.parse(raw)
        assert raw == {"method": "snapkv", "kernel": 3}

    @pytest.mark.parametrize("method", METHODS)
    def test_every_combination_serves_its_own_defaults(self, method):
        scorer, allocator = method.split("+")
        options = {
            f.name: f.default
            for cls in (SCORERS[scorer], ALLOCATORS[allocator])
            for f in dataclasses.fields(cls)
        }
        config = KVCompressionConfig.parse({"method": method, **options})
        assert config.make_scorer() == SCORERS[scorer]()
        assert config.make_allocator() == ALLOCATORS[allocator]()


class TestRefusals:
    @pytest.mark.parametrize("method", [None, "", 3, ["bacon"]])
    def test_method_is_required(self, method):
        assert "'method' is missing" in reasons_of(method=method)

    def test_unknown_scorer(self):
        text = reasons_of(method="snapvk")
        assert "unknown scorer 'snapvk'. Did you mean 'snapkv'? Valid: bacon, snapkv." in text

    def test_unknown_allocator(self):
        text = reasons_of(method="snapkv+adakw")
        assert "unknown allocator 'adakw'. Did you mean 'adakv'? Valid: adakv, uniform." in text

    def test_far_off_names_get_the_list_only(self):
        text = reasons_of(method="zzz")
        assert "Valid: bacon, snapkv." in text
        assert "Did you mean" not in text

    def test_unknown_key(self):
        text = reasons_of(method="snapkv", kernal=5)
        assert "unknown key 'kernal' for snapkv. Did you mean 'kernel'?" in text
        assert "Valid: method, budget, window, kernel, pool, reduction." in text

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
    @given(st.sampled_from(METHODS), budgets, st.integers(1, 32))
    def test_round_trip(self, method, budget, window):
        config = KVCompressionConfig.parse({"method": method, "budget": budget, "window": window})
        assert KVCompressionConfig.parse(json.loads(json.dumps(config.to_json()))) == config

    def test_round_trip_with_options(self):
        raw = {"method": "bacon+adakv", "mode": "rel", "lambda_c": 0.3, "normalize": False}
        config = KVCompressionConfig.parse(raw)
        again = KVCompressionConfig.parse(json.loads(json.dumps(config.to_json())))
        assert again == config
        assert again.scorer_options == {"mode": "rel", "lambda_c": 0.3}
        assert again.allocator_options == {"normalize": False}

    def test_command_line_value(self):
        assert parse_cli_json('{"mode": "rel"}') == {"mode": "rel"}

    @pytest.mark.parametrize(
        ("text", "expected"),
        [("{mode: rel}", "is not valid JSON"), ("[1]", "must be a JSON object"), ("", "not valid")],
    )
    def test_bad_command_line_value(self, text, expected):
        with pytest.raises(KVCompressionError, match=expected):
            parse_cli_json(text)


@pytest.fixture(scope="module")
def engine_args():
    """vLLM's class of engine arguments, with the plugin's flags."""
    pytest.importorskip("vllm")
    from vllm.engine.arg_utils import AsyncEngineArgs

    from vllm_kvcompress.adapter import cli

    cli.install()
    return AsyncEngineArgs


@pytest.fixture(scope="module")
def parser(engine_args):
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return engine_args.add_cli_args(FlexibleArgumentParser())


@pytest.fixture
def parse(parser, tmp_path):
    """``parse(*flags)``: the namespace; the model is some folder, so that nothing is looked up."""
    return lambda *flags: parser.parse_args(["--model", str(tmp_path), *flags])


class TestCommandLine:
    """Through vLLM's own parser and its own way from flags to arguments."""

    def test_all_flags(self, engine_args, parse):
        args = parse(
            "--kv-compression", "bacon+adakv", "--kv-budget", "10%", "--kv-window", "16",
            "--kv-compression-config", '{"mode": "rel", "alpha": 0.5}',
        )  # fmt: skip
        engine = engine_args.from_cli_args(args)
        raw = engine.additional_config[CONFIG_KEY]
        assert KVCompressionConfig.parse(raw) == KVCompressionConfig(
            "bacon", "adakv", Budget(ratio=0.1), 16, {"mode": "rel"}, {"alpha": 0.5}
        )

    def test_flags_leave_the_namespace(self, engine_args, parse):
        """What remains must be what vLLM knows: front ends pass the namespace on."""
        args = parse(
            "--kv-compression", "snapkv", "--kv-budget", "64", "--kv-window", "8",
            "--kv-compression-config", "{}",
        )  # fmt: skip
        engine_args.from_cli_args(args)
        ours = {"kv_compression", "kv_budget", "kv_window", "kv_compression_config"}
        assert not ours & set(vars(args))

    def test_absent_flags_change_nothing(self, engine_args, parse, tmp_path):
        args = parse()
        before = dict(vars(args))
        engine = engine_args.from_cli_args(args)
        assert vars(args) == before
        assert not [name for name in before if name.startswith(("kv_comp", "kv_budget"))]
        assert engine.additional_config == engine_args(model=str(tmp_path)).additional_config
        assert CONFIG_KEY not in (engine.additional_config or {})

    def test_other_additional_config_is_kept(self, engine_args, parse):
        args = parse("--additional-config", '{"other": 1}', "--kv-compression", "snapkv")
        engine = engine_args.from_cli_args(args)
        assert engine.additional_config == {"other": 1, CONFIG_KEY: {"method": "snapkv"}}

    def test_bad_json_stops_with_our_message(self, engine_args, parse):
        args = parse("--kv-compression-config", "{")
        with pytest.raises(KVCompressionError, match="--kv-compression-config is not valid JSON"):
            engine_args.from_cli_args(args)

    def test_a_lone_budget_is_refused(self, engine_args, parse):
        """A budget without a method must not be served uncompressed."""
        engine = engine_args.from_cli_args(parse("--kv-budget", "64"))
        with pytest.raises(KVCompressionError, match="'method' is missing"):
            engine.create_engine_config()

    def test_install_is_idempotent(self, engine_args):
        from vllm_kvcompress.adapter import cli

        wrapped = vars(engine_args.__mro__[1])["add_cli_args"]
        cli.install()
        assert vars(engine_args.__mro__[1])["add_cli_args"] is wrapped

    def test_help_names_every_method(self, parser):
        text = parser._option_string_actions["--kv-compression"].help
        assert all(name in text for name in (*SCORERS, *ALLOCATORS))
