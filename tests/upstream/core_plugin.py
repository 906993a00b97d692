# SPDX-License-Identifier: Apache-2.0
"""Runs vLLM's own tests of its scheduler and block managers with ours in their place.

A plugin of pytest (``-p core_plugin``), for ``make vllm-core``:

| ``--compression`` | what vLLM's tests get                                           |
|-------------------|-----------------------------------------------------------------|
| stock             | vLLM alone                                                      |
| inert             | vLLM, with the plugin loaded and no compression                 |
| covering          | our schedulers and managers, with a budget that all prompts fit |
| real              | the same, with one of 64 tokens                                 |

Tests of what compression refuses are skipped. Some of vLLM's tests need models that are not at
hand: what fails in a ``stock`` run is written down, and a later run passes if nothing else fails.
At a real budget, tests that count blocks or prefix hits of long prompts differ by design: such a
run only names them.
"""

import dataclasses
import inspect
import logging
import os
from pathlib import Path

import pytest
import tiny_families
import tiny_models
from vllm.plugins import load_general_plugins
from vllm.v1.core import kv_cache_manager
from vllm.v1.core.sched import async_scheduler, scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, SlidingWindowSpec

from vllm_kvcompress.adapter import scheduler as ours
from vllm_kvcompress.adapter.kv_cache import (
    CompressedKVCacheManager,
    CompressedSpec,
    manager_of,
)
from vllm_kvcompress.adapter.telemetry import SchedulerTelemetry
from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.metrics import Labels

BUDGETS = {"covering": "100%", "real": 64}
CHECKPOINTS = Path(__file__).resolve().parents[2] / ".cache" / "models"
MODELS = {
    "Qwen/Qwen1.5-7B": (tiny_models, "llama"),
    "Qwen/Qwen2.5-VL-3B-Instruct": (tiny_families, "qwen2.5-vl"),
    "Qwen/Qwen3-0.6B": (tiny_models, "llama"),
    "facebook/opt-125m": (tiny_models, "llama"),
    "llava-hf/llava-1.5-7b-hf": (tiny_families, "llava-next-mistral"),
}
"""Checkpoints of vLLM's tests, which only read their configuration, and what they get instead."""


def pytest_addoption(parser):
    parser.addoption("--compression", choices=["stock", "inert", *BUDGETS], default="inert")
    parser.addoption("--stock-failures", type=Path, required=True, metavar="FILE")


def pytest_configure(config):
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name, (maker, family) in MODELS.items():
        place = Path(name)
        place.parent.mkdir(exist_ok=True)
        if not place.exists():
            place.symlink_to(maker.make(family, CHECKPOINTS))
    chosen = config.getoption("compression")
    if chosen == "stock":
        os.environ["VLLM_PLUGINS"] = ""
    load_general_plugins()
    config.pluginmanager.register(Failures(chosen, config.getoption("stock_failures")))
    if chosen in BUDGETS:
        settings = {"method": "snapkv", "budget": BUDGETS[chosen], "window": 16}
        replace(KVCompressionConfig.parse(settings))


class Failures:
    """Compares what fails with what fails without us.

    Args:
        mode: of ``--compression``.
        file: node ids, one per line; written by a run of mode "stock".
    """

    def __init__(self, mode: str, file: Path) -> None:
        self.mode, self.file = mode, file
        self.found: set[str] = set()

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.found.add(report.nodeid)

    def pytest_collectreport(self, report):
        if report.failed:
            self.found.add(report.nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session):
        if self.mode == "stock":
            self.file.write_text("".join(f"{name}\n" for name in sorted(self.found)))
        ours = self.found - set(self.file.read_text().splitlines())
        if session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            fails = bool(ours) and self.mode != "real"
            session.exitstatus = pytest.ExitCode.TESTS_FAILED if fails else pytest.ExitCode.OK

    def pytest_terminal_summary(self, terminalreporter):
        names = sorted(self.found - set(self.file.read_text().splitlines()))
        terminalreporter.section(f"{self.mode}: {len(names)} fail here and not in stock vLLM")
        for name in names:
            terminalreporter.line(name)


@pytest.fixture
def caplog_vllm(caplog):
    """As in vLLM's own conftest, which needs packages that these tests do not."""
    logger = logging.getLogger("vllm")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def replace(compression: KVCompressionConfig) -> None:
    """Put our classes where vLLM's tests import theirs from; no test has been imported yet."""
    signature = inspect.signature(scheduler.Scheduler)

    def tested(base: type) -> type:
        class Tested(base):
            def __init__(self, *args, **kwargs):
                given = signature.bind(*args, **kwargs).arguments
                refuse(given["vllm_config"])
                given["kv_cache_config"] = compressed(given["kv_cache_config"], compression)
                super().__init__(**given)

        return Tested

    scheduler.Scheduler = tested(ours.CompressedScheduler)
    async_scheduler.AsyncScheduler = tested(ours.CompressedAsyncScheduler)

    stock = kv_cache_manager.KVCacheManager
    of_manager = inspect.signature(stock)

    def manager(*args, **kwargs):
        given = of_manager.bind(*args, **kwargs).arguments
        given["kv_cache_config"] = compressed(given["kv_cache_config"], compression)
        made = stock(**given)
        compressing = manager_of(made)
        assert compressing is not None
        compressing.telemetry = SchedulerTelemetry(Labels("0", "tests"), compressing.choices)
        return CompressedKVCacheManager.adopt(made, lambda request: False)

    kv_cache_manager.KVCacheManager = manager


def refuse(vllm_config) -> None:
    if vllm_config.speculative_config or vllm_config.kv_transfer_config:
        pytest.skip("refused: speculative decoding and KV connectors")
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        pytest.skip("refused: pipeline parallelism")


def compressed(config: KVCacheConfig, compression: KVCompressionConfig) -> KVCacheConfig:
    """The groups of a test, its full-attention layers compressed."""
    specs = [group.kv_cache_spec for group in config.kv_cache_groups]
    full = [spec for spec in specs if type(spec) is FullAttentionSpec]
    if len(full) != 1 or any(
        type(spec) not in (FullAttentionSpec, SlidingWindowSpec) for spec in specs
    ):
        pytest.skip("refused: groups of these kinds")
    groups = []
    for group in config.kv_cache_groups:
        spec = group.kv_cache_spec
        if type(spec) is FullAttentionSpec:
            spec = CompressedSpec.of(
                spec,
                config=compression,
                kernel_block_size=spec.block_size,
                model_kv_heads=spec.num_kv_heads,
                max_entries=256,
                num_layers=len(group.layer_names),
            )
        groups.append(dataclasses.replace(group, kv_cache_spec=spec))
    return dataclasses.replace(config, kv_cache_groups=groups)
