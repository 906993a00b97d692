# SPDX-License-Identifier: Apache-2.0
"""Counters shared through files, and what Prometheus sees of them."""

import os
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.utils import floatToGoString

from vllm_kvcompress.metrics import (
    HISTOGRAMS,
    PREFIX,
    CompressionCollector,
    Counters,
    Labels,
    totals,
)

METHODS = ("snapkv", "bacon", "off")
FIRST, SECOND = Labels("0", "tiny"), Labels("1", "tiny")


def exported(directory, register=None) -> dict[tuple[str, tuple], float]:
    """Samples of the exposition text by name and labels, those of FIRST left out."""
    registry = CollectorRegistry()
    registry.register(register or CompressionCollector(lambda: str(directory)))
    text = generate_latest(registry).decode()
    own = FIRST._asdict().items()
    return {
        (sample.name, tuple(sorted(sample.labels.items() - own))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_files_of_several_processes_are_summed(tmp_path):
    scheduler = Counters(str(tmp_path), FIRST, methods=METHODS)
    worker = Counters(str(tmp_path), FIRST, methods=METHODS)
    scheduler.add(blocks_freed=5, blocks_before=8)
    worker.add("snapkv", requests_compressed=2, kept_tokens=64.5)
    worker.add("bacon", requests_compressed=1)
    values = totals(str(tmp_path))
    assert values["blocks_freed"] == 5
    assert values["blocks_before"] == 8
    assert values["requests_compressed"] == 3
    assert values["kept_tokens"] == 64.5
    assert exported(tmp_path)[(PREFIX + "kept_tokens_total", ())] == 64.5


def test_engines_are_told_apart(tmp_path):
    for labels, freed in ((FIRST, 5), (SECOND, 7)):
        counters = Counters(str(tmp_path), labels)
        counters.add(blocks_freed=freed)
        counters.observe("seconds", 0.002 * freed)
    assert totals(str(tmp_path))["blocks_freed"] == 12
    assert totals(str(tmp_path), "1")["blocks_freed"] == 7
    assert totals(str(tmp_path), "1")["seconds_sum"] == pytest.approx(0.014)
    samples = exported(tmp_path)
    assert samples[(PREFIX + "blocks_freed_total", ())] == 5
    assert samples[(PREFIX + "blocks_freed_total", (("engine", "1"),))] == 7


def test_prometheus_reads_the_files_itself(tmp_path):
    """As a scrape of vLLM does in multiprocess mode: the same samples, without a collector."""
    counters = Counters(str(tmp_path), FIRST, methods=METHODS)
    counters.add("bacon", blocks_freed=3, requests_compressed=1)
    counters.observe("seconds", 0.5)
    itself = exported(tmp_path, MultiProcessCollector(None, str(tmp_path)))
    assert itself == exported(tmp_path)
    assert itself[(PREFIX + "blocks_freed_total", ())] == 3


def test_every_file_is_whole_when_it_appears(tmp_path, monkeypatch):
    """A scrape at any moment finds a series or not, but no file that it cannot read."""
    seen = []

    def rename(self, target):
        seen.append(exported(tmp_path))
        os.rename(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    Counters(str(tmp_path), FIRST)
    assert 0 == len(seen[0]) < len(seen[1]) < len(exported(tmp_path))


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    counters = Counters(None, FIRST)
    counters.add(blocks_freed=1)
    counters.observe("seconds", 0.5)
    assert list(tmp_path.iterdir()) == []
    assert list(CompressionCollector(lambda: None).collect()) == []


def test_unknown_counters_are_an_error():
    with pytest.raises(KeyError, match="blocks_lost"):
        Counters(None, FIRST).add(blocks_lost=1)
    with pytest.raises(KeyError, match="minutes"):
        Counters(None, FIRST).observe("minutes", 1)


def test_what_was_asked_for(tmp_path):
    """Once per engine, however many processes say so, in both ways to a scrape; no counter."""
    info = {"method": "bacon+adakv", "budget": "10%", "when": "pressure:0.8"}
    for labels in (FIRST, FIRST, SECOND):
        Counters(str(tmp_path), labels, info)
    Counters(str(tmp_path), FIRST)  # of a worker
    itself = exported(tmp_path, MultiProcessCollector(None, str(tmp_path)))
    key = PREFIX + "info", tuple(sorted(info.items()))
    other = PREFIX + "info", tuple(sorted([*info.items(), ("engine", "1")]))
    assert {name: value for name, value in itself.items() if name[0] == key[0]} == {
        key: 1,
        other: 1,
    }
    assert itself == exported(tmp_path)
    assert "info" not in totals(str(tmp_path))


@pytest.mark.parametrize(("family", "edges", "_"), HISTOGRAMS, ids=lambda part: str(part)[:20])
def test_every_histogram(tmp_path, family, edges, _):
    counters = Counters(str(tmp_path), FIRST)
    observations = [edges[0] / 2, edges[0], edges[3], edges[-1], edges[-1] * 2]
    for value in observations:
        counters.observe(family, value)
    samples = exported(tmp_path)
    for edge in edges:
        key = PREFIX + family + "_bucket", (("le", floatToGoString(edge)),)
        assert samples[key] == sum(value <= edge for value in observations)
    assert samples[PREFIX + family + "_count", ()] == len(observations)
    assert samples[PREFIX + family + "_sum", ()] == pytest.approx(sum(observations))


def test_exposition(tmp_path):
    counters = Counters(str(tmp_path), FIRST, methods=METHODS)
    counters.add("bacon", requests_compressed=2, requests_refused=4)
    counters.add("off", requests_kept_whole=1)
    counters.add(
        "snapkv",
        requests_compressed=3,
        compressed_at_once=2,
        compressed_pressure=0,
        compressed_instead_of_preemption=1,
        requests_kept_whole=1,
        prompt_tokens=900,
        kept_tokens=192,
        blocks_before=30,
        blocks_after=6,
        blocks_freed=24,
    )
    samples = exported(tmp_path)
    expected = {
        ("requests_total", (("method", "snapkv"), ("outcome", "compressed"))): 3,
        ("requests_total", (("method", "bacon"), ("outcome", "compressed"))): 2,
        ("requests_total", (("method", "off"), ("outcome", "compressed"))): 0,
        ("requests_total", (("method", "snapkv"), ("outcome", "kept_whole"))): 1,
        ("requests_total", (("method", "off"), ("outcome", "kept_whole"))): 1,
        ("requests_total", (("method", "none"), ("outcome", "refused"))): 4,
        ("compressions_total", (("when", "at_once"),)): 2,
        ("compressions_total", (("when", "pressure"),)): 0,
        ("compressions_total", (("when", "instead_of_preemption"),)): 1,
        ("request_blocks_total", (("when", "before"),)): 30,
        ("request_blocks_total", (("when", "after"),)): 6,
        ("prompt_tokens_total", ()): 900,
        ("kept_tokens_total", ()): 192,
        ("blocks_freed_total", ()): 24,
        ("seconds_count", ()): 0,
    }
    for (name, labels), value in expected.items():
        assert samples[(PREFIX + name, labels)] == value
    values = totals(str(tmp_path))
    assert values["requests_compressed"] == 5
    assert values["requests_kept_whole"] == 2
    assert values["requests_refused"] == 4


def test_methods_are_known_from_the_start(tmp_path):
    """No request can add a value to the label."""
    counters = Counters(str(tmp_path), FIRST, methods=METHODS)
    with pytest.raises(KeyError, match="h2o"):
        counters.add("h2o", requests_compressed=1)
    with pytest.raises(KeyError):
        counters.add(requests_compressed=1)


def test_an_engine_learns_methods(tmp_path):
    """Series begin at 0, and what was counted before stays."""
    counters = Counters(str(tmp_path), FIRST, methods=METHODS)
    counters.add("bacon", requests_compressed=2)
    counters.know(["bacon", "h2o"])
    compressed = {
        labels: value
        for (name, labels), value in exported(tmp_path).items()
        if name == PREFIX + "requests_total" and ("outcome", "compressed") in labels
    }
    assert compressed[("method", "h2o"), ("outcome", "compressed")] == 0
    assert compressed[("method", "bacon"), ("outcome", "compressed")] == 2
    counters.add("h2o", requests_compressed=1)
    assert totals(str(tmp_path))["requests_compressed"] == 3


def test_counters_of_two_collections_only_grow(tmp_path):
    counters = Counters(str(tmp_path), FIRST)
    counters.observe("seconds", 0.01)
    before = exported(tmp_path)
    counters.observe("seconds", 0.02)
    counters.add(blocks_freed=1)
    after = exported(tmp_path)
    assert before.keys() == after.keys()
    assert all(after[key] >= value for key, value in before.items() if "created" not in key[0])
