# SPDX-License-Identifier: Apache-2.0
"""Counters that the processes of a server share, and their Prometheus form.

Each process owns one file of float64 counters; whoever exports sums the files. A counter is what
was seen in the block pool and in the kept sets, never what the configuration promises.
"""

import bisect
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from vllm_kvcompress.policy import Outcome

PREFIX = "vllm:kv_compression_"
SECONDS_BUCKETS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)

_NAMES = (
    "requests_compressed",
    *(f"compressed_{outcome.value}" for outcome in Outcome),
    "requests_kept_whole",
    "prompt_tokens",
    "kept_tokens",
    "blocks_before",
    "blocks_after",
    "blocks_freed",
    "seconds_sum",
    *(f"seconds_le_{edge:g}" for edge in SECONDS_BUCKETS),
    "seconds_le_inf",
)
_INDEX = {name: i for i, name in enumerate(_NAMES)}


class Counters:
    """The counters of this process, in a file of ``directory`` (None: in memory only)."""

    def __init__(self, directory: str | None) -> None:
        if directory is None:
            self._values = np.zeros(len(_NAMES))
            return
        path = Path(directory) / f"{os.getpid()}-{id(self):x}.counters"
        self._values = np.memmap(path, dtype=np.float64, mode="w+", shape=(len(_NAMES),))

    def add(self, **amounts: float) -> None:
        for name, amount in amounts.items():
            self._values[_INDEX[name]] += amount

    def observe_seconds(self, seconds: float) -> None:
        """One compression step took this long."""
        edge = bisect.bisect_left(SECONDS_BUCKETS, seconds)
        self._values[_INDEX["seconds_sum"]] += seconds
        self._values[_INDEX["seconds_le_0.0001"] + edge] += 1


def totals(directory: str) -> dict[str, float]:
    """Every counter, summed over the processes that count in ``directory``."""
    result = np.zeros(len(_NAMES))
    for path in Path(directory).glob("*.counters"):
        values = np.fromfile(path, dtype=np.float64)
        if values.shape == result.shape:  # a file that is just being created is still empty
            result += values
    return dict(zip(_NAMES, result.tolist(), strict=True))


class CompressionCollector(Collector):
    """Exports the counters of ``directory`` to Prometheus."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def collect(self) -> Iterator[Metric]:
        values = totals(self._directory)
        requests = CounterMetricFamily(
            PREFIX + "requests",
            "Prompts by outcome; kept_whole fits its budget.",
            labels=["outcome"],
        )
        requests.add_metric(["compressed"], values["requests_compressed"])
        requests.add_metric(["kept_whole"], values["requests_kept_whole"])
        yield requests
        compressions = CounterMetricFamily(
            PREFIX + "compressions",
            "Compressed prompts by occasion: at_once, when the pool ran short (pressure), or "
            "instead_of_preemption.",
            labels=["when"],
        )
        for outcome in Outcome:
            compressions.add_metric([outcome.value], values[f"compressed_{outcome.value}"])
        yield compressions
        blocks = CounterMetricFamily(
            PREFIX + "request_blocks",
            "KV blocks held by compressed requests, before and after compression.",
            labels=["when"],
        )
        blocks.add_metric(["before"], values["blocks_before"])
        blocks.add_metric(["after"], values["blocks_after"])
        yield blocks
        for name, text in (
            ("prompt_tokens", "Prompt tokens of compressed requests."),
            ("kept_tokens", "Prompt tokens that compressed requests keep, mean over KV heads."),
            ("blocks_freed", "KV blocks that compression gave back to the block pool."),
        ):
            yield CounterMetricFamily(PREFIX + name, text, value=values[name])
        cumulative = np.cumsum([values[f"seconds_le_{edge:g}"] for edge in SECONDS_BUCKETS])
        everything = cumulative[-1] + values["seconds_le_inf"]
        yield HistogramMetricFamily(
            PREFIX + "seconds",
            "Time of one compression, all layers of the prompts that are compressed together.",
            buckets=[
                *((f"{edge:g}", n) for edge, n in zip(SECONDS_BUCKETS, cumulative, strict=True)),
                ("+Inf", everything),
            ],
            sum_value=values["seconds_sum"],
        )
