# SPDX-License-Identifier: Apache-2.0
"""The plugin's flags in vLLM's command line."""

import pytest

from vllm_kvcompress.allocation import ALLOCATORS
from vllm_kvcompress.budget import Budget
from vllm_kvcompress.config import CONFIG_KEY, KVCompressionConfig, KVCompressionError
from vllm_kvcompress.scoring import SCORERS


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
            "bacon",
            "adakv",
            budget=Budget(ratio=0.1),
            window=16,
            options={"mode": "rel", "alpha": 0.5},
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
        with pytest.raises(KVCompressionError, match="no method: set --kv-compression METHOD"):
            engine.create_engine_config()

    def test_install_is_idempotent(self, engine_args):
        from vllm_kvcompress.adapter import cli

        wrapped = vars(engine_args.__mro__[1])["add_cli_args"]
        cli.install()
        assert vars(engine_args.__mro__[1])["add_cli_args"] is wrapped

    def test_help_names_every_method(self, parser):
        text = parser._option_string_actions["--kv-compression"].help
        assert all(name in text for name in (*SCORERS, *ALLOCATORS))
