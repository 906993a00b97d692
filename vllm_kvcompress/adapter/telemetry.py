# SPDX-License-Identifier: Apache-2.0
"""What the processes of a server tell each other: counters, and why one could not start."""

import atexit
import collections
import functools
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from prometheus_client import REGISTRY
from vllm.config import VllmConfig
from vllm.logger import init_logger

from vllm_kvcompress.choices import Choices
from vllm_kvcompress.config import (
    KVCompressionConfig,
    KVCompressionError,
    metrics_dir,
    server_dir,
    set_server_dir,
)
from vllm_kvcompress.metrics import CompressionCollector, Counters, Labels, totals
from vllm_kvcompress.policy import Outcome

logger = init_logger("vllm.kvcompress")

LOG_INTERVAL_S = 10.0
LOG_DELAY_S = 1.0


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


def info_of(config: KVCompressionConfig) -> dict[str, str]:
    """Labels of the gauge that tells what an engine was asked for."""
    return {"method": config.method, "budget": str(config.budget), "when": str(config.when)}


class SchedulerTelemetry:
    """Counts blocks where they are freed, and logs one line per interval with news.

    Workers count later what was kept, so a timer looks once more after the last news.

    Args:
        choices: what requests can have; counters know all methods from the start.
    """

    def __init__(self, labels: Labels, choices: Choices) -> None:
        self._labels = labels
        self._counters = Counters(metrics_dir(), labels, info_of(choices.own), choices.labels)
        self._last_log = time.monotonic()
        self._timer: threading.Timer | None = None
        self._has_news = False
        self._line = ""

    def configure(self, choices: Choices) -> None:
        """Requests can have other methods from now on."""
        self._counters.know(choices.labels)

    def record(
        self, method: str, outcome: Outcome, held_before: int, held_after: int, freed: int
    ) -> None:
        """One request gave up blocks; the pool gained ``freed``, as others may share them."""
        self._counters.add(
            method,
            requests_compressed=1,
            **{f"compressed_{outcome.value}": 1},
            blocks_before=held_before,
            blocks_after=held_after,
            blocks_freed=freed,
        )
        self._counters.observe("request_blocks_freed", freed)
        self._note_news()

    def record_whole(self, method: str) -> None:
        """One prompt fits its budget and is kept whole."""
        self._counters.add(method, requests_kept_whole=1)
        self._note_news()

    def _note_news(self) -> None:
        self._has_news = True
        self._plan_look()

    def _plan_look(self) -> None:
        """Look for news an interval after the last time, unless that is planned already."""
        if self._timer is None or self._timer.finished.is_set():
            wait = self._last_log + LOG_INTERVAL_S - time.monotonic()
            # workers count what was kept when the step has run
            self._timer = threading.Timer(max(wait, LOG_DELAY_S), self._look)
            self._timer.daemon = True
            self._timer.start()

    def _look(self) -> None:
        """Log a line that differs from the last one."""
        self._last_log = time.monotonic()
        directory = metrics_dir()
        assert self._timer is not None, "it calls this"
        self._timer.finished.set()  # news from now on are for the next line
        had_news, self._has_news = self._has_news, False
        if directory is not None and Path(directory).is_dir():
            line = summary(totals(directory, self._labels.engine))
            if line != self._line:
                self._line = line
                logger.info("%s", line)
            if had_news:
                self._plan_look()


def summary(values: dict[str, float]) -> str:
    """The periodic line, from the totals since start."""
    dropped = values["prompt_tokens"] - values["kept_tokens"]
    return (
        f"KV compression so far: {values['requests_compressed']:.0f} requests compressed, "
        f"{values['requests_kept_whole']:.0f} kept whole; {values['kept_tokens']:.0f} of "
        f"{values['prompt_tokens']:.0f} prompt tokens kept ({dropped:.0f} dropped); "
        f"{values['blocks_freed']:.0f} blocks returned to the pool"
    )


@functools.cache
def _refusals(labels: Labels) -> Counters:
    return Counters(metrics_dir(), labels)


def record_refusal(vllm_config: VllmConfig) -> None:
    """A request asked for what it cannot have."""
    _refusals(labels_of(vllm_config)).add(requests_refused=1)


class WorkerTelemetry:
    """Counts tokens and seconds of one worker without waiting for its device.

    Args:
        device: where the page counts live.
        labels: of the series; None where another rank counts.
    """

    def __init__(self, device: torch.device, labels: Labels | None) -> None:
        self._counters = Counters(metrics_dir(), labels) if labels is not None else None
        self._on_host = device.type == "cpu"
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
        tail_tokens: Sequence[int],
        prompt_tokens: Sequence[int],
    ) -> None:
        """What the running compression keeps.

        Args:
            count: [N, L, Hkv] head pages.
            tokens_per_page: block_size / (layers * KV heads).
            tail_tokens, prompt_tokens: of each of the N prompts.
        """
        if self._counters is None:
            return
        self._counters.add(prompt_tokens=sum(prompt_tokens))
        pages = count.sum((1, 2))
        if not self._on_host:
            pages = pages.to("cpu", non_blocking=True)  # into pinned memory, by torch
        self._pending.append(
            _Compression(
                self._start, self._start, pages, tokens_per_page, tail_tokens, prompt_tokens
            )
        )

    def poll(self) -> None:
        """Publish what the device has finished since."""
        while self._pending and self._pending[0].is_done():
            done = self._pending.popleft()
            assert self._counters is not None
            for pages, tail, length in zip(
                done.pages.tolist(), done.tail_tokens, done.prompt_tokens, strict=True
            ):
                kept = pages * done.tokens_per_page + tail
                self._counters.add(kept_tokens=kept)
                self._counters.observe("kept_share", kept / length)
            self._counters.observe("seconds", done.seconds())

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
    tail_tokens: Sequence[int]
    prompt_tokens: Sequence[int]

    def is_done(self) -> bool:
        return isinstance(self.end, float) or self.end.query()

    def seconds(self) -> float:
        if isinstance(self.start, float) or isinstance(self.end, float):
            return float(self.end) - float(self.start)  # type: ignore[arg-type]
        return self.start.elapsed_time(self.end) / 1000
