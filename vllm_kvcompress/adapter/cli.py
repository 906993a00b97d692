# SPDX-License-Identifier: Apache-2.0
"""Command-line flags, and the checks between the user's arguments and the engine."""

import argparse
from typing import Any

from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from vllm_kvcompress.adapter import compatibility, request_checks, telemetry
from vllm_kvcompress.adapter.compression_config import BLOCK_SIZE_KEY
from vllm_kvcompress.adapter.patching import wrap
from vllm_kvcompress.allocation import ALLOCATORS
from vllm_kvcompress.choices import Choices
from vllm_kvcompress.config import (
    ALLOWED_WORDS,
    CONFIG_KEY,
    NOTHING,
    KVCompressionConfig,
    KVCompressionError,
    parse_cli_json,
)
from vllm_kvcompress.merging import MERGES
from vllm_kvcompress.presets import PRESETS
from vllm_kvcompress.registry import outside_names
from vllm_kvcompress.scoring import SCORERS

CPU_BLOCK_SIZE = 32
"""vLLM's CPU default of 128 would round every small budget up to 128 tokens."""

_FLAGS = {
    "kv_compression": "method",
    "kv_budget": "budget",
    "kv_window": "window",
    "kv_compression_when": "when",
    "kv_compression_allow": "allow",
}


def install() -> None:
    wrap(EngineArgs, "add_cli_args", _add_flags)
    wrap(EngineArgs, "from_cli_args", _move_flags)
    wrap(EngineArgs, "create_engine_config", _check_engine)
    request_checks.install()


def _add_flags(original):
    def add_cli_args(parser):
        parser = original(parser)
        group = parser.add_argument_group(
            "KV compression", "Compress the KV caches of prompts, between steps."
        )
        # absent unless given: other front ends must not meet flags that they do not know
        group.add_argument(
            "--kv-compression",
            metavar="PRESET|SCORER[+ALLOCATOR[+MERGE]]",
            default=argparse.SUPPRESS,
            help=f"Turn compression on. Presets: {', '.join(sorted(PRESETS))}. "
            f"Scorers: {', '.join(sorted(SCORERS))}. "
            f"Allocators: {', '.join(sorted(ALLOCATORS))} (default: uniform). "
            f"Merges: {', '.join(sorted(MERGES))} (default: none).{_of_other_packages()}",
        )
        group.add_argument(
            "--kv-budget",
            metavar="N|P%",
            default=argparse.SUPPRESS,
            help="Prompt tokens that a KV head keeps, window included, or a share of the prompt "
            "such as 10%%; of its visual tokens where only these compete, and all text stays. "
            f"Default: what the preset says, else {KVCompressionConfig.budget}.",
        )
        group.add_argument(
            "--kv-window",
            metavar="W",
            default=argparse.SUPPRESS,
            help="Observation window: the last W prompt tokens score the others and always stay. "
            f"Default: {KVCompressionConfig.window}.",
        )
        group.add_argument(
            "--kv-compression-when",
            metavar="always|pressure[:MARK]",
            default=argparse.SUPPRESS,
            help="When prompts are compressed. always: at the first step after the prompt. "
            "pressure: only while more than MARK of the block pool is in use (default 0.8), and "
            "before anyone is preempted or kept waiting for blocks. Default: always.",
        )
        group.add_argument(
            "--kv-compression-allow",
            metavar="WORD|METHOD,...",
            default=argparse.SUPPRESS,
            help="What a request may choose for itself, by keys of its vllm_xargs: "
            f"{', '.join(ALLOWED_WORDS)} and further methods, separated by commas, or "
            f"{NOTHING}. Default: {','.join(KVCompressionConfig.allow)}.",
        )
        group.add_argument(
            "--kv-compression-config",
            metavar="JSON",
            default=argparse.SUPPRESS,
            help="Options of the chosen methods, as a JSON object; see `vllm-kvcompress methods`.",
        )
        return parser

    return add_cli_args


def _of_other_packages() -> str:
    """Their names; servers that do not compress run none of their code."""
    names = outside_names()
    return f" Of other packages: {', '.join(names)}." if names else ""


def _move_flags(original):
    def from_cli_args(cls, args: argparse.Namespace):
        raw: dict[str, Any] = {}
        if hasattr(args, "kv_compression_config"):
            raw.update(parse_cli_json(args.kv_compression_config))
            del args.kv_compression_config
        for flag, key in _FLAGS.items():
            if hasattr(args, flag):
                raw[key] = getattr(args, flag)
                delattr(args, flag)  # the config travels on in additional_config
        if raw:
            args.additional_config = {**(args.additional_config or {}), CONFIG_KEY: raw}
        return original(cls, args)

    return from_cli_args


def _check_engine(original):
    def create_engine_config(self: EngineArgs, *args, **kwargs):
        raw = (self.additional_config or {}).get(CONFIG_KEY)
        if raw is None:
            return original(self, *args, **kwargs)
        if not isinstance(raw, dict):
            raise KVCompressionError(
                f'additional_config["{CONFIG_KEY}"] must be an object such as '
                f'{{"method": "bacon", "budget": 128}}, got {raw!r}.'
            )
        config = KVCompressionConfig.parse(raw)
        configs = Choices.of(config, block_size=1).configs
        self.additional_config = {**self.additional_config, CONFIG_KEY: config.to_json()}
        if current_platform.is_cpu() and self.block_size is None:
            self.block_size = CPU_BLOCK_SIZE
        vllm_config = original(self, *args, **kwargs)
        compatibility.check(vllm_config, configs)
        assert isinstance(vllm_config.additional_config, dict), "ours"
        vllm_config.additional_config[BLOCK_SIZE_KEY] = vllm_config.cache_config.block_size
        # vLLM resolves both by name in the processes that need them, and fails where it cannot
        parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
        parallel.worker_cls = compatibility.WORKERS.get(parallel.worker_cls, parallel.worker_cls)
        scheduler.scheduler_cls = compatibility.SCHEDULERS[bool(scheduler.async_scheduling)]
        telemetry.publish()
        return vllm_config

    return create_engine_config
