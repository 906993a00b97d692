# SPDX-License-Identifier: Apache-2.0
"""Methods of other packages: what is added to the tables, and what is refused."""

import importlib
import re

import pytest

from vllm_kvcompress import registry
from vllm_kvcompress.allocation import ALLOCATORS, StaticAllocator
from vllm_kvcompress.allocation.uniform import Uniform
from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError
from vllm_kvcompress.merging import MERGES
from vllm_kvcompress.merging.lookm import LookM
from vllm_kvcompress.presets import PRESETS, Preset
from vllm_kvcompress.scoring import SCORERS
from vllm_kvcompress.scoring.snapkv import SnapKV
from vllm_kvcompress.tools import main as command


@pytest.fixture(autouse=True)
def tables():
    """As they were, afterwards."""
    before = [dict(table) for table in (SCORERS, ALLOCATORS, MERGES, PRESETS)]
    yield
    for table, old in zip((SCORERS, ALLOCATORS, MERGES, PRESETS), before, strict=True):
        table.clear()
        table.update(old)
    registry.load.cache_clear()


@pytest.fixture
def install(monkeypatch, tmp_path):
    """``install(name=value)``: entry points of a package of which nothing else exists."""

    def install(**values: str) -> None:
        folder = tmp_path / "outside-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
        lines = [f"{name} = {value}" for name, value in values.items()]
        (folder / "entry_points.txt").write_text("\n".join([f"[{registry.GROUP}]", *lines]))
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()
        registry.load.cache_clear()

    return install


def subclass(base: type, name: str) -> type:
    return type("Outside", (base,), {"name": name})


@pytest.mark.parametrize(
    ("base", "table"), [(SnapKV, SCORERS), (Uniform, ALLOCATORS), (LookM, MERGES)]
)
def test_a_class_goes_to_its_table(base, table):
    cls = subclass(base, "outside")
    registry.add("outside", cls)
    registry.add("outside", cls)  # again: another name for the same entry point
    assert table["outside"] is cls
    with pytest.raises(ValueError, match="another method of this name"):
        registry.add("outside", subclass(base, "outside"))


def test_a_preset_goes_to_its_table():
    registry.add("outside", Preset("nobody", {"method": "bacon+adakv", "budget": 77}))
    config = KVCompressionConfig.parse({"method": "outside"})
    assert (config.method, config.budget.tokens) == ("bacon+adakv", 77)


def test_das_raises_what_says_that_it_may():
    registry.add("outside", subclass(SnapKV, "outside"))
    KVCompressionConfig.parse({"method": "das", "base": "outside"})


@pytest.mark.parametrize(
    ("name", "found", "words"),
    [
        ("snapkv", subclass(SnapKV, "snapkv"), "another method of this name"),
        ("mine", subclass(SnapKV, "yours"), "the class calls itself 'yours'"),
        ("mine", type("Mine", (SnapKV,), {}), "the class calls itself None"),
        ("a+b", subclass(SnapKV, "a+b"), "a name consists of"),
        ("none", subclass(LookM, "none"), "a name consists of"),
        ("mine", SnapKV(), "no Scorer, Allocator, Merge or Preset"),
        ("mine", int, "no Scorer, Allocator, Merge or Preset"),
        ("mine", StaticAllocator, "no Scorer, Allocator, Merge or Preset"),
    ],
)
def test_refused(name, found, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        registry.add(name, found)


def test_what_cannot_be_loaded_is_told(install, capsys):
    """To whoever asks for compression, all at once, with the package to blame."""
    install(gone="no_such_module:X", lost="vllm_kvcompress.presets:NOTHING", wrong="json:dumps")
    with pytest.raises(KVCompressionError) as caught:
        KVCompressionConfig.parse({"method": "snapkv"})
    lines = str(caught.value).splitlines()[1:]
    names = [re.search(r"the method '(\w+)'", line)[1] for line in lines]
    assert names == ["gone", "lost", "wrong"]
    assert all(line.startswith("  - outside offers") for line in lines)
    assert all(line.endswith("Update or uninstall outside.") for line in lines)
    assert command.main(["methods"]) == 1
    assert "outside offers the method 'gone'" in capsys.readouterr().err


def test_names_are_known_without_running_code(install):
    install(gone="no_such_module:X")
    assert registry.outside_names() == ["gone"]
