# SPDX-License-Identifier: Apache-2.0
"""What the processes of a server tell each other: counters, and why one could not start."""

import atexit
import collections
import functools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from prometheus_client import REGISTRY
from vllm.config import VllmConfig
from vllm.logger import init_logger

from vllm_kvcompress.config import KVCompressionError, metrics_dir, server_dir, set_server_dir
from vllm_kvcompress.metrics import CompressionCollector, Counters, Labels, totals
from vllm_kvcompress.policy import Outcome

logger = init_logger("vllm.kvcompress")

LOG_INTERVAL_S = 10.0


@functools.cache
def publish() -> None:
    """Make the counters visible on the ``/metrics`` of this process; once."""
    if server_dir() is None:
        directory = tempfile.mkdtemp(prefix="vllm-kvcompress-")
        set_server_dir(directory)
        atexit.register(_leave, directory, os.getpid())
    # only seen where vLLM is not in Prometheus' multiprocess mode
    REGISTRY.register(CompressionCollector(metrics_dir))


def _leave(directory: str, owner: int) -> None:
    if os.getpid() != owner:  # a forked child inherits the handler
        return
    # whoever has an engine in this very process has seen the error itself
    others = [path for path in Path(directory).glob("*.refusal") if path.stem != str(owner)]
    # after vLLM's own last words, which only say that a process failed
    for refusal in {path.read_text() for path in others}:
        print(refusal, file=sys.stderr, flush=True)
    shutil.rmtree(directory, ignore_errors=True)


def last_words(method: Callable[..., Any]) -> Callable[..., Any]:
    """Make a refusal that ``method`` raises in a process of its own the server's last line."""

    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except KVCompressionError as error:
            directory = server_dir()
            if directory is not None:
                Path(directory, f"{os.getpid()}.refusal").write_text(str(error))
            raise

    return wrapper


def labels_of(vllm_config: VllmConfig) -> Labels:
    """Labels of an engine's series; its processes have been told its index."""
    index = vllm_config.parallel_config.data_parallel_index
    name = vllm_config.model_config.served_model_name
    assert isinstance(name, str), "vLLM has resolved it"
    return Labels(str(index), name)


class SchedulerTelemetry:
    """Counts blocks where they are freed, and logs one line per interval with news."""

    def __init__(self, labels: Labels) -> None:
        self._labels = labels
        self._counters = Counters(metrics_dir(), labels)
        self._last_log = time.monotonic()

    def record(self, outcome: Outcome, held_before: int, held_after: int, freed: int) -> None:
        """One request gave up blocks; the pool gained ``freed``, as others may share them."""
        self._counters.add(
            requests_compressed=1,
            **{f"compressed_{outcome.value}": 1},
            blocks_before=held_before,
            blocks_after=held_after,
            blocks_freed=freed,
        )
        self._log()

    def record_whole(self) -> None:
        """One prompt fits its budget and is kept whole."""
        self._counters.add(requests_kept_whole=1)

    def _log(self) -> None:
        now = time.monotonic()
        directory = metrics_dir()
        if directory is not None and now - self._last_log >= LOG_INTERVAL_S:
            self._last_log = now
            logger.info("%s", summary(totals(directory, self._labels.engine)))


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
    """Counts tokens and seconds of one worker without waiting for its device.

    Args:
        device: where the page counts live.
        labels: of the series; None where another rank counts.
    """

    def __init__(self, device: torch.device, labels: Labels | None) -> None:
        self._counters = Counters(metrics_dir(), labels) if labels is not None else None
        self._on_host = device.type == "cpu"
        # (start, end, pages on the host, tokens per page, tail tokens)
        self._pending: collections.deque[_Compression] = collections.deque()
        self._start: float | torch.cuda.Event = 0.0

    @contextmanager
    def compression(self) -> Iterator[None]:
        """Times one compression of all layers; ``record`` is called inside."""
        if self._counters is None:
            yield
            return
        self._start = self._now()
        yield
        self._pending[-1] = self._pending[-1]._replace(end=self._now())
        self.poll()

    def record(
        self,
        count: torch.Tensor,
        *,
        tokens_per_page: float,
        tail_tokens: int,
        prompt_tokens: int,
    ) -> None:
        """What the running compression keeps.

        Args:
            count: [N, L, Hkv] head pages.
            tokens_per_page: block_size / (layers * KV heads).
        """
        if self._counters is None:
            return
        self._counters.add(prompt_tokens=prompt_tokens)
        pages = count.sum()
        if not self._on_host:
            pages = pages.to("cpu", non_blocking=True)  # into pinned memory, by torch
        self._pending.append(
            _Compression(self._start, self._start, pages, tokens_per_page, tail_tokens)
        )

    def poll(self) -> None:
        """Publish what the device has finished since."""
        while self._pending and self._pending[0].is_done():
            done = self._pending.popleft()
            assert self._counters is not None
            kept = int(done.pages) * done.tokens_per_page + done.tail_tokens
            self._counters.add(kept_tokens=kept)
            self._counters.observe_seconds(done.seconds())

    def _now(self) -> "float | torch.cuda.Event":
        if self._on_host:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class _Compression(NamedTuple):
    """One compression; times are seconds on a CPU, else events."""

    start: float | torch.cuda.Event
    end: float | torch.cuda.Event
    pages: torch.Tensor
    tokens_per_page: float
    tail_tokens: int

    def is_done(self) -> bool:
        return isinstance(self.end, float) or self.end.query()

    def seconds(self) -> float:
        if isinstance(self.start, float) or isinstance(self.end, float):
            return float(self.end) - float(self.start)  # type: ignore[arg-type]
        return self.start.elapsed_time(self.end) / 1000
