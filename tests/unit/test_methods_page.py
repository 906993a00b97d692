# SPDX-License-Identifier: Apache-2.0
"""docs/methods.md and `vllm-kvcompress methods` say what the code does."""

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from vllm_kvcompress.allocation import ALLOCATORS
from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.merging import MERGES
from vllm_kvcompress.plan import BlockPlanner
from vllm_kvcompress.presets import PRESETS
from vllm_kvcompress.prompt import PromptFacts
from vllm_kvcompress.scoring import SCORERS, Need
from vllm_kvcompress.tools import main as command
from vllm_kvcompress.tools import methods, refused

PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods.md"
METHODS = [*SCORERS.values(), *ALLOCATORS.values(), *MERGES.values()]


@pytest.fixture
def head_scores(tmp_path) -> str:
    path = tmp_path / "scores.json"
    path.write_text('{"0-0": [1.0]}')
    return str(path)


def test_the_page_is_what_the_command_prints(capsys):
    assert command.main(["methods", "--markdown"]) == 0
    assert PAGE.read_text() == capsys.readouterr().out, (
        "docs/methods.md is out of date; make it again: "
        "vllm-kvcompress methods --markdown > docs/methods.md"
    )


class TestList:
    @pytest.fixture
    def text(self, capsys) -> str:
        assert command.main(["methods"]) == 0
        return capsys.readouterr().out

    def test_everything_is_there(self, text):
        for name in (*PRESETS, *SCORERS, *ALLOCATORS, *MERGES):
            assert f"\n  {name}: " in text

    def test_every_method_tells_its_source_and_options(self, text):
        for method in METHODS:
            assert method.source in text
            assert ", ".join(methods.options_of(method)) in text

    def test_unknown_arguments_are_refused(self, capsys):
        with pytest.raises(SystemExit):
            command.main(["methods", "--markup"])
        assert "--markup" in capsys.readouterr().err


class TestOptions:
    def test_defaults_are_written_as_the_configuration_takes_them(self):
        @dataclass(frozen=True)
        class Example:
            text: str = "a"
            flag: bool = True
            nothing: str | None = None
            made: dict[str, Any] = field(default_factory=lambda: {"x": [1]})

        assert methods.options_of(Example) == [
            'text="a"', "flag=true", "nothing=null", 'made={"x": [1]}',
        ]  # fmt: skip

    def test_das(self):
        """The one method whose default is made anew each time."""
        assert "base_options={}" in methods.options_of(SCORERS["das"])

    def test_a_summary_is_one_sentence_without_its_source(self):
        for method in METHODS:
            summary = methods.summary_of(method)
            assert summary.endswith(".")
            assert "Source:" not in summary


class TestProperties:
    def test_every_need_has_words(self):
        for need in Need:
            method = type("Method", (SCORERS["snapkv"],), {"needs": need})
            assert methods.row_of(method).needs != "nothing"

    @pytest.mark.parametrize(
        ("name", "budget"),
        [
            ("snapkv", "all tokens, the window included"),
            ("keydiff", "all tokens, the last one included"),
            ("postvision", "all tokens, the last 10 % included"),
            ("aircache", "visual tokens; all text stays"),
        ],
    )
    def test_budget_of_scorers(self, name, budget):
        assert methods.row_of(SCORERS[name]).budget == budget

    def test_prefix_cache_of_queries(self):
        """Kept blocks usually hold the window anyway, so plans hardly show it."""
        assert methods.prefix_cache_of(Need.KEYS) == "everything"
        assert methods.prefix_cache_of(Need.LAST_QUERY) == "all before the last token"
        assert methods.prefix_cache_of(SCORERS["snapkv"].needs) == "all before the window"

    @pytest.mark.parametrize("scorer", SCORERS)
    @pytest.mark.parametrize("allocator", ["uniform", "vlcache", "prefixkv"])
    def test_prefix_cache_as_planned(self, scorer, allocator):
        """The words, and the most that a plan takes from the cache."""
        window, instruction, length, block = 32, 90, 1000, 10
        config = KVCompressionConfig.parse({"method": f"{scorer}+{allocator}", "budget": "5%"})
        facts = PromptFacts(length, ((100, length - instruction),))
        plan = BlockPlanner(config, block, 2, 2).plan(facts)
        parts = (SCORERS[scorer], ALLOCATORS[allocator])
        most = {
            "nothing": 0,
            "all before the instruction": length - instruction,
            "all before the window": (length - window) // block * block,
            "everything": length,
        }
        promised = min(most[methods.row_of(part).prefix_cache] for part in parts)
        assert plan.compresses
        assert plan.max_hit == min(promised, plan.num_freed_blocks * block)


class TestRefused:
    def test_products_are_the_set(self):
        names = [axis[:3] for axis in refused.axes().values()]
        every = [*itertools.product(*names)]
        for step in (1, 2, 3, 5, 7):
            some = set(every[::step])
            rows = refused.products(some)
            assert sorted(c for row in rows for c in itertools.product(*row)) == sorted(some)

    def test_the_whole_is_one_product(self):
        every = set(itertools.product(*refused.axes().values()))
        assert refused.products(every) == [[*refused.axes().values()]]

    def test_every_combination_was_tried(self, head_scores):
        found = refused.refused_combinations(head_scores)
        assert found.tried == 2 * len(SCORERS) * len(ALLOCATORS) * (1 + len(MERGES))
        assert found.served == found.tried - len(set().union(*found.reasons.values()))

    def test_reasons_speak_of_methods_in_general(self, head_scores):
        reasons = refused.refused_combinations(head_scores).reasons
        (where,) = [w for reason, w in reasons.items() if "SCORER has no scores" in reason]
        assert {(names[0], names[1]) for names in where} == {
            (scorer.name, "adakv") for scorer in SCORERS.values() if not scorer.countable
        }
