# SPDX-License-Identifier: Apache-2.0
"""Proof that compression runs: counters, the periodic log line, the Prometheus collector."""

import atexit
import collections
import functools
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from prometheus_client import REGISTRY
from vllm.logger import init_logger
from vllm.v1.metrics import prometheus as vllm_prometheus

from vllm_kvcompress.adapter.patching import wrap
from vllm_kvcompress.config import metrics_dir, set_metrics_dir
from vllm_kvcompress.metrics import CompressionCollector, Counters, totals

logger = init_logger("vllm.kvcompress")

LOG_INTERVAL_S = 10.0


@functools.cache
def publish() -> None:
    """Make the counters visible on the ``/metrics`` of this process; once."""
    directory = metrics_dir()
    if directory is None:
        directory = tempfile.mkdtemp(prefix="vllm-kvcompress-")
        set_metrics_dir(directory)
        atexit.register(_remove, directory, os.getpid())
    collector = CompressionCollector(directory)
    REGISTRY.register(collector)

    def with_ours(original):
        def get_prometheus_registry():
            registry = original()
            if registry is not REGISTRY:  # several API servers: a fresh registry over files
                registry.register(collector)
            return registry

        return get_prometheus_registry

    wrap(vllm_prometheus, "get_prometheus_registry", with_ours)


def _remove(directory: str, owner: int) -> None:
    if os.getpid() == owner:  # a forked child inherits the handler
        shutil.rmtree(directory, ignore_errors=True)


class SchedulerTelemetry:
    """Counts blocks where they are freed, and logs one line per interval with news."""

    def __init__(self) -> None:
        self._counters = Counters(metrics_dir())
        self._last_log = time.monotonic()

    def record(self, held_before: int, held_after: int, freed: int) -> None:
        """One request gave up blocks; the pool gained ``freed``, as others may share them."""
        self._counters.add(blocks_before=held_before, blocks_after=held_after, blocks_freed=freed)
        now = time.monotonic()
        directory = metrics_dir()
        if directory is not None and now - self._last_log >= LOG_INTERVAL_S:
            self._last_log = now
            logger.info("%s", summary(totals(directory)))


def summary(values: dict[str, float]) -> str:
    """The periodic line, from the totals since start."""
    dropped = values["prompt_tokens"] - values["kept_tokens"]
    return (
        f"KV compression so far: {values['requests_compressed']:.0f} requests compressed, "
        f"{values['requests_kept_whole']:.0f} kept whole; {values['kept_tokens']:.0f} of "
        f"{values['prompt_tokens']:.0f} prompt tokens kept ({dropped:.0f} dropped); "
        f"{values['blocks_freed']:.0f} blocks returned to the pool"
    )


class WorkerTelemetry:
    """Counts requests, tokens and seconds of one worker without waiting for its device.

    Args:
        device: where the page counts live.
        active: only the first tensor-parallel rank counts.
    """

    def __init__(self, device: torch.device, active: bool) -> None:
        self._counters = Counters(metrics_dir()) if active else None
        self._on_host = device.type == "cpu"
        self._pages = torch.zeros((), dtype=torch.int64, device=device)
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        # (done, pages on the host, tokens per page, tail tokens, timed layers)
        self._pending: collections.deque = collections.deque()

    def record_prompts(self, compressed: int, kept_whole: int, prompt_tokens: int) -> None:
        """Prompts that end in this step; ``prompt_tokens`` of the compressed ones."""
        if self._counters is not None:
            self._counters.add(
                requests_compressed=compressed,
                requests_kept_whole=kept_whole,
                prompt_tokens=prompt_tokens,
            )

    @contextmanager
    def layer(self) -> Iterator[None]:
        """Times the compression of one layer."""
        if self._counters is None:
            yield
        elif self._on_host:
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start
        else:
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
            yield
            events[1].record()
            self._events.append(events)

    def record_pages(self, count: torch.Tensor) -> None:
        """Head pages [N, Hkv] that one layer keeps."""
        if self._counters is not None:
            self._pages += count.sum()

    def end_step(self, tokens_per_page: float, tail_tokens: int) -> None:
        """The last layer is compressed. ``tokens_per_page``: block_size / (layers * KV heads)."""
        if self._counters is None:
            return
        if self._on_host:
            self._publish(int(self._pages), tokens_per_page, tail_tokens, self._seconds)
            self._seconds = 0.0
        else:
            done = torch.cuda.Event()
            pages = self._pages.to("cpu", non_blocking=True)  # pinned by torch
            done.record()
            self._pending.append((done, pages, tokens_per_page, tail_tokens, self._events))
            self._events = []
        self._pages.zero_()

    def poll(self) -> None:
        """Publish the steps that the device has finished since."""
        while self._pending and self._pending[0][0].query():
            _, pages, tokens_per_page, tail_tokens, events = self._pending.popleft()
            seconds = sum(start.elapsed_time(end) for start, end in events) / 1000
            self._publish(int(pages), tokens_per_page, tail_tokens, seconds)

    def _publish(
        self, pages: int, tokens_per_page: float, tail_tokens: int, seconds: float
    ) -> None:
        assert self._counters is not None
        self._counters.add(kept_tokens=pages * tokens_per_page + tail_tokens)
        self._counters.observe_seconds(seconds)
