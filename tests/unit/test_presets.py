# SPDX-License-Identifier: Apache-2.0
"""Published systems under their names: each is served, and the user's word counts."""

import json

import pytest

from vllm_kvcompress.allocation import ALLOCATORS
from vllm_kvcompress.budget import Budget, Candidates
from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.merging import MERGES
from vllm_kvcompress.presets import PRESETS
from vllm_kvcompress.scoring import SCORERS


def parse(name: str, path: str, **given) -> KVCompressionConfig:
    """Settings of a preset; ``path`` of head scores where they are required."""
    if "sparsemm" in PRESETS[name].settings["method"]:
        given["head_scores"] = path
    return KVCompressionConfig.parse({"method": name, **given})


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    file = tmp_path_factory.mktemp("scores") / "heads.json"
    file.write_text('{"0-0": [0.5], "0-1": [0.1]}')
    return str(file)


@pytest.mark.parametrize("name", PRESETS)
class TestEveryPreset:
    def test_parses_to_its_parts(self, name, path):
        config = parse(name, path)
        scorer, allocator, merge = [*PRESETS[name].settings["method"].split("+"), "none"][:3]
        assert (config.scorer, config.allocator, config.merge) == (scorer, allocator, merge)
        for key, value in PRESETS[name].settings.items():
            if key == "budget":
                assert config.budget == Budget.parse(value)
            elif key != "method":
                assert config.options[key] == value

    def test_round_trip(self, name, path):
        config = parse(name, path)
        raw = json.loads(json.dumps(config.to_json()))
        assert raw["method"] == f"{config.scorer}+{config.allocator}+{config.merge}"
        assert KVCompressionConfig.parse(raw) == config

    def test_the_user_wins(self, name, path):
        config = parse(name, path, budget=77, window=9)
        assert (config.budget, config.window) == (Budget(tokens=77), 9)

    def test_names_a_source(self, name, path):
        source = PRESETS[name].source
        assert "arXiv" in source or "CVPR" in source


@pytest.mark.parametrize(
    ("name", "given", "option"),
    [
        ("mm-shiftkv", {"preset": "paper"}, "preset"),
        ("h2o", {"recent_share": 0.1}, "recent_share"),
        ("pyramidkv", {"rounding": "exact"}, "rounding"),
        ("look-m", {"merge_mode": "avg"}, "merge_mode"),
    ],
)
def test_options_of_a_preset_can_be_changed(name, given, option):
    config = KVCompressionConfig.parse({"method": name, **given})
    assert config.options[option] == given[option]
    assert config != KVCompressionConfig.parse({"method": name})


def test_look_m_keeps_the_text():
    config = KVCompressionConfig.parse({"method": "look-m"})
    assert config.candidates is Candidates.AFTER_TEXT
    without = KVCompressionConfig.parse({"method": "look-m", "text_prior": False})
    assert without.candidates is Candidates.ALL


def test_presets_are_not_parts_of_other_methods():
    """A name that is a scorer, too, stands for the preset only when it stands alone."""
    h2o = KVCompressionConfig.parse({"method": "h2o+uniform"})
    assert h2o.options == {}
    assert KVCompressionConfig.parse({"method": "h2o"}).options == {"recent_share": 0.5}


def test_every_method_is_part_of_a_preset():
    """What we publish under no name would be a method that nobody finds."""
    parts = [preset.settings["method"].split("+") for preset in PRESETS.values()]
    assert {part[0] for part in parts} == set(SCORERS)
    assert {part[1] for part in parts} >= set(ALLOCATORS)
    assert {part[2] for part in parts if len(part) > 2} == set(MERGES)
