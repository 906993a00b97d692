# SPDX-License-Identifier: Apache-2.0
"""The accuracy sweep: questions, statistics and tables, without any model."""

import json
import math
import random

import accuracy_sweep
import numpy as np
import pytest
from accuracy import clutter, texts
from accuracy.asked import likelihood
from accuracy.paired import compare, mcnemar, wilson
from accuracy.report import Key, gather, markdown, table

ESSAYS = " ".join(
    f"This is sentence {n} of an essay about nothing in particular." for n in range(999)
)


class TestTexts:
    @pytest.mark.parametrize("task", texts.TASKS)
    def test_a_question_follows_from_its_seed(self, task):
        first, again, other = (texts.question(task, seed, ESSAYS, 600) for seed in (1, 1, 2))
        assert first == again
        assert first.prompt != other.prompt

    @pytest.mark.parametrize("tokens", [600, 2000])
    @pytest.mark.parametrize("task", texts.TASKS)
    def test_length(self, task, tokens):
        length = len(texts.question(task, 3, ESSAYS, tokens).prompt) / texts.CHARACTERS
        assert 0.75 * tokens < length < 1.6 * tokens

    @pytest.mark.parametrize("task", ["needle", "two needles", "filler"])
    def test_what_is_asked_for_stands_there_once(self, task):
        for seed in range(20):
            question = texts.question(task, seed, ESSAYS, 600)
            assert question.prompt.count(question.answer) == 1
            place = question.prompt.rpartition("number of ")[2].partition(" ")[0]
            assert f"The secret number of {place} is {question.answer}." in question.prompt

    @pytest.mark.parametrize("task", ["needle", "two needles", "filler", "common word"])
    def test_the_prompt_ends_where_the_answer_begins(self, task):
        assert texts.question(task, 0, ESSAYS, 600).prompt.endswith("<|im_start|>assistant\n")

    def test_the_most_common_word(self):
        for seed in range(20):
            question = texts.question("common word", seed, ESSAYS, 600)
            lists = [line for line in question.prompt.splitlines() if line.startswith("List: ")]
            assert len(lists) == texts.SHOWN + 1
            words = lists[-1].removeprefix("List: ").split()
            counts = sorted((words.count(word), word) for word in set(words))
            assert counts[-1][1] == question.answer
            assert counts[-1][0] > 2 * counts[-2][0]
            assert question.answer not in " ".join(lists[:-1])

    def test_a_text_goes_on(self):
        question = texts.question("text", 0, ESSAYS, 600)
        assert question.answer == ""
        assert question.prompt + question.continuation + "." in ESSAYS + "."

    def test_facts_are_hidden_between_sentences(self):
        text = texts.hidden(random.Random(0), ["One", "Two", "Three"], ["Fact."])
        assert text.startswith("One.")
        assert text.replace("Fact. ", "").replace(" Fact.", "") == "One. Two. Three."


class TestPages:
    def test_a_page_follows_from_its_seed(self):
        layout = clutter.Layout(images=2, side=9, records=3)
        first, again, other = (clutter.make(seed, layout) for seed in (1, 1, 2))
        assert first.answer == again.answer
        assert [image.tobytes() for image in first.images] == [
            image.tobytes() for image in again.images
        ]
        assert first.images[0].tobytes() != other.images[0].tobytes()

    @pytest.mark.parametrize("direction", ["rows", "columns"])
    def test_records_and_digits(self, direction, monkeypatch):
        """All records lie in their direction, the one asked for in the last image."""
        grids = []
        render = clutter.pages.render
        monkeypatch.setattr(
            clutter.pages, "render", lambda rng, grid: grids.append(grid) or render(rng, grid)
        )
        layout = clutter.Layout(direction, images=2, side=18, records=9, late=True)
        page = clutter.make(5, layout)
        label = page.question.rpartition("record is ")[2].rstrip(".")
        lines = [
            ["".join(line) for line in (grid if direction == "rows" else grid.T)] for grid in grids
        ]
        assert [sum(f"{label}:{page.answer}" in line for line in image) for image in lines] == [
            0,
            1,
        ]
        assert [image.size for image in page.images] == [(18 * 28, 18 * 28)] * 2
        for grid in grids:  # more than any budget of the sweep that hurts
            assert np.isin(grid, list("0123456789")).sum() > 81

    def test_the_share_of_digits(self):
        few, many = (clutter.Layout("rows", digits=share) for share in (0.0, 1.0))
        assert clutter.make(0, few).images[0].tobytes() != clutter.make(0, many).images[0].tobytes()


class TestStatistics:
    @pytest.mark.parametrize(
        ("right", "count", "low", "high"),
        [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)],
    )
    def test_wilson(self, right, count, low, high):
        """Newcombe 1998, table I, method 3."""
        assert wilson(right, count) == pytest.approx((low, high), abs=5e-5)

    def test_wilson_at_the_ends(self):
        assert wilson(0, 0) == (0, 1)
        assert wilson(7, 7).high == 1
        assert wilson(0, 7).low == 0

    @pytest.mark.parametrize(
        ("wins", "losses", "p"),
        [(0, 0, 1.0), (3, 3, 1.0), (5, 0, 2 / 2**5), (1, 9, 2 * (1 + 10) / 2**10), (46, 2, 0.0)],
    )
    def test_mcnemar(self, wins, losses, p):
        assert mcnemar(wins, losses) == pytest.approx(p, abs=1e-9)
        assert mcnemar(losses, wins) == mcnemar(wins, losses)

    def test_pairs(self):
        first = [True, True, True, False, False]
        second = [True, False, False, True, False]
        assert compare(first, second) == (2, 1, 1.0)
        with pytest.raises(ValueError, match="shorter"):
            compare(first, second[:3])

    def test_likelihood(self):
        whole = np.log([[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]])
        seen = np.log([[0.1, 0.9], [0.5, 0.5], [0.2, 0.8]])
        found = likelihood([1, 0, 1], seen, whole)
        assert found.logprob == pytest.approx(math.log(0.9 * 0.5 * 0.8) / 3)
        distance = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
        assert found.divergence == pytest.approx(distance / 2)  # the first token does not count
        assert likelihood([1], seen[:1], whole[:1]).divergence == 0


def row(method: str, batch: int, right: list[bool], budget: str = "64") -> dict:
    cell = {"task": "t", "batch": batch, "method": method, "budget": budget}
    return cell | {"kept": 70.0 + batch, "right": right, "logprob": [-1.0], "divergence": [0.5]}


class TestTables:
    ROWS = (
        row("uncompressed", 0, [True, True], ""),
        row("bacon", 0, [True, False]),
        row("bacon", 1, [True, True]),
        row("snapkv", 0, [False, True]),
        {"task": "t", "batch": 0, "method": "aircache", "budget": "64"},
    )

    def test_batches_are_put_together(self):
        tallies = gather(self.ROWS)
        assert list(tallies) == [
            Key("t", "uncompressed", ""), Key("t", "bacon", "64"), Key("t", "snapkv", "64")
        ]  # fmt: skip
        bacon = tallies[Key("t", "bacon", "64")]
        assert bacon.right == {0: True, 1: False, 2: True, 3: True}
        assert (bacon.kept, bacon.logprob, bacon.divergence) == (70.5, -1.0, 0.5)

    def test_only_common_questions_are_compared(self):
        rows = {found["method"]: found for found in table(gather(self.ROWS), "bed")}
        assert rows["snapkv"]["against bacon"] == "1/1"
        assert rows["bacon"]["against snapkv"] == "1/1"
        assert rows["bacon"]["against bacon"] == ""
        assert (rows["bacon"]["n"], rows["bacon"]["right"]) == (4, "0.750")
        assert rows["bacon"]["answers"] == "1011"

    def test_methods_are_compared_where_they_keep_as_much(self):
        """Whatever budget it took: some round their budgets up."""
        more = row("pyramidkv", 0, [False, True], "32")
        less = row("keydiff", 0, [False, True]) | {"kept": 40.0}
        rows = {found["method"]: found for found in table(gather([*self.ROWS, more, less]), "bed")}
        assert rows["pyramidkv"]["against bacon"] == "1/1"
        assert rows["keydiff"]["against bacon"] == ""

    def test_every_cell_is_shown(self):
        text = markdown(table(gather(self.ROWS), "bed"), {"bed": "bed"})
        assert "Full cache: **100.0** 34-100, n 2" in text
        assert "| bacon | **75.0** 30-95, n 4; [-, 1/1]; KL 0.5000; kept 70.5 |" in text

    def test_what_is_done_is_not_done_again(self, tmp_path):
        file = tmp_path / "bed.jsonl"
        cell = accuracy_sweep.Cell("t", 3, "bacon", "64")
        results = accuracy_sweep.Results(file)
        assert cell not in results.done
        results.write(cell, kept=1.0)
        assert accuracy_sweep.Results(file).done == {cell}
        assert json.loads(file.read_text()) == cell._asdict() | {"kept": 1.0}
