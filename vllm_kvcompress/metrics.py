# SPDX-License-Identifier: Apache-2.0
"""Counters that the processes of a server share, and their Prometheus form.

Each process that counts writes two files in the format of prometheus_client's multiprocess mode.
Where vLLM is in that mode, they lie among its own, and its ``/metrics`` sums all of them; elsewhere
a collector reads them. A counter is what was seen in the block pool and in the kept sets, never
what the configuration promises.
"""

import bisect
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from prometheus_client.metrics_core import Metric
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from vllm_kvcompress.policy import Outcome

PREFIX = "vllm:kv_compression_"
SECONDS_BUCKETS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)

METHOD_LABEL = "method"


class _Histogram(NamedTuple):
    """Name, edges of buckets and help of a histogram."""

    family: str
    edges: tuple[float, ...]
    text: str


HISTOGRAMS = (
    _Histogram(
        "seconds",
        SECONDS_BUCKETS,
        "Time of one compression, all layers of the prompts that are compressed together.",
    ),
    _Histogram(
        "kept_share",
        (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
        "Share of a compressed prompt's tokens that it keeps, mean over KV heads.",
    ),
    _Histogram(
        "request_blocks_freed",
        (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000),
        "KV blocks that one request gave back to the block pool.",
    ),
)
_EDGES = {h.family: (*h.edges, float("inf")) for h in HISTOGRAMS}
# a gauge of this kind is the same in every process: the largest is what each of them says
_GAUGE = "gauge_max"
INFO = "info"
"""Family of the one gauge: 1, with the compression config as labels."""


class Labels(NamedTuple):
    """Labels of every series, as vLLM's own have them.

    Attributes:
        engine: index of the data-parallel replica.
        model_name: that the server answers to.
    """

    engine: str
    model_name: str


class _Series(NamedTuple):
    """One number on ``/metrics``.

    Attributes:
        family: name without prefix.
        suffix: that the sample adds to it.
        text: help.
        label: name and value of the label beside those of an engine, if there is one, as a tuple.
        by_method: there is one for each method, in a label of its own.
    """

    family: str
    suffix: str
    text: str
    label: tuple[tuple[str, str], ...] = ()
    by_method: bool = False

    @property
    def kind(self) -> str:
        if self.family == INFO:
            return _GAUGE
        return "counter" if self.suffix == "_total" else "histogram"

    @property
    def sample(self) -> str:
        return PREFIX + self.family + self.suffix

    def key(self, labels: Labels, method: str) -> str:
        """The name of the number in a file."""
        values = labels._asdict() | dict(self.label)
        if self.by_method:
            values[METHOD_LABEL] = method
        family = PREFIX + self.family
        return mmap_key(family, self.sample, [*values], [*values.values()], self.text)


def _all_series() -> Iterator[tuple[str, _Series]]:
    requests = (
        "requests",
        "_total",
        "Prompts by method and outcome; kept_whole fits its budget, or compression is off for it; "
        "refused requests asked for what they cannot have.",
    )
    for became in ("compressed", "kept_whole"):
        label = (("outcome", became),)
        yield f"requests_{became}", _Series(*requests, label, by_method=True)
    yield "requests_refused", _Series(*requests, (("outcome", "refused"), (METHOD_LABEL, "none")))
    for outcome in Outcome:
        yield (
            f"compressed_{outcome.value}",
            _Series(
                "compressions",
                "_total",
                "Compressed prompts by occasion: at_once, when the pool ran short (pressure), or "
                "instead_of_preemption.",
                (("when", outcome.value),),
            ),
        )
    for when in ("before", "after"):
        yield (
            f"blocks_{when}",
            _Series(
                "request_blocks",
                "_total",
                "KV blocks held by compressed requests, before and after compression.",
                (("when", when),),
            ),
        )
    for name, text in (
        ("prompt_tokens", "Prompt tokens of compressed requests."),
        ("kept_tokens", "Prompt tokens that compressed requests keep, mean over KV heads."),
        ("blocks_freed", "KV blocks that compression gave back to the block pool."),
    ):
        yield name, _Series(name, "_total", text)
    for family, _, text in HISTOGRAMS:
        yield f"{family}_sum", _Series(family, "_sum", text)
        for edge in _EDGES[family]:  # in a file a bucket counts what lies between two edges
            le = floatToGoString(edge)
            yield f"{family}_le_{le}", _Series(family, "_bucket", text, (("le", le),))


_SERIES = dict(_all_series())
_serial_numbers = itertools.count()


class Counters:
    """The counters of this process, in files of ``directory`` (None: in memory only).

    Args:
        info: labels of the gauge ``info``, which is 1; None for no such gauge.
        methods: values of the label of counters that are kept by method. A process that counts
            none of these gives none.
    """

    def __init__(
        self,
        directory: str | None,
        labels: Labels,
        info: Mapping[str, str] | None = None,
        methods: Sequence[str] = (),
    ) -> None:
        self._labels = labels
        self._series = dict(_SERIES)
        if info is not None:
            text = "What the engine was asked for; always 1."
            self._series[INFO] = _Series(INFO, "", text, tuple(info.items()))
        self._keys = {
            (name, method): series.key(labels, method)
            for name, series in self._series.items()
            for method in (methods if series.by_method else ("",))
        }
        self._values = dict.fromkeys(self._keys, 0.0)
        if info is not None:
            self._values[INFO, ""] = 1.0
        self._files: dict[str, MmapedDict] = {}
        if directory is None:
            return
        place = f"kvcompress-{os.getpid()}-{next(_serial_numbers)}.db"
        for kind in sorted({series.kind for series in self._series.values()}):
            path = Path(directory, f"{kind}_{place}")
            beside = path.with_suffix(".new")  # nobody reads a file that is only half written
            self._files[kind] = MmapedDict(str(beside))
            for name, method in self._keys:
                if self._series[name].kind == kind:
                    self._write(name, method)
            beside.rename(path)

    def know(self, methods: Iterable[str]) -> None:
        """Count these methods, too, where counters are kept by method."""
        for name, series in self._series.items():
            for method in methods if series.by_method else ():
                if (name, method) not in self._values:
                    self._keys[name, method] = series.key(self._labels, method)
                    self._values[name, method] = 0.0
                    self._write(name, method)

    def add(self, method: str = "", **amounts: float) -> None:
        """``method``: of those counters that are kept by method."""
        for name, amount in amounts.items():
            key = name, method if _SERIES[name].by_method else ""
            self._values[key] += amount
            self._write(*key)

    def observe(self, family: str, value: float) -> None:
        """Count a value in a histogram.

        Raises:
            KeyError: there is no such histogram.
        """
        edges = _EDGES[family]
        edge = edges[bisect.bisect_left(edges, value)]
        self.add("", **{f"{family}_sum": value, f"{family}_le_{floatToGoString(edge)}": 1})

    def _write(self, name: str, method: str) -> None:
        if self._files:
            file, key = self._files[self._series[name].kind], (name, method)
            file.write_value(self._keys[key], self._values[key], 0.0)


def totals(directory: str, engine: str | None = None) -> dict[str, float]:
    """Every counter, summed over methods and over the processes that count in ``directory``.

    Args:
        directory: of the counters.
        engine: the replica whose processes count; None for all of them.
    """
    result = dict.fromkeys(_SERIES, 0.0)
    names = {(series.sample, _without(series.label)): name for name, series in _SERIES.items()}
    for metric in _merged(directory, accumulate=False):
        for sample in metric.samples:
            if sample.name != PREFIX + INFO and engine in (None, sample.labels["engine"]):
                result[names[sample.name, _without(sample.labels.items())]] += sample.value
    return result


def _without(labels: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Labels but for those that are summed over."""
    return tuple(label for label in labels if label[0] not in (*Labels._fields, METHOD_LABEL))


def _merged(directory: str, accumulate: bool) -> Iterable[Metric]:
    files = [str(path) for path in Path(directory).glob("*_kvcompress-*.db")]
    return MultiProcessCollector.merge(files, accumulate)


class CompressionCollector(Collector):
    """Exports the counters to a registry that does not read the files itself.

    Args:
        directory: says where they are, at each scrape.
    """

    def __init__(self, directory: Callable[[], str | None]) -> None:
        self._directory = directory

    def collect(self) -> Iterable[Metric]:
        directory = self._directory()
        return _merged(directory, accumulate=True) if directory else ()
