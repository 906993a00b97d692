# SPDX-License-Identifier: Apache-2.0
"""``vllm_kvcompress.testing.check_scorer`` finds what is wrong with a scorer, and only that."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from vllm_kvcompress.scoring import Need, Scorer, Scores, ScoringContext
from vllm_kvcompress.testing import check_scorer


@dataclass(frozen=True)
class Norm(Scorer):
    """How large a key is."""

    name: ClassVar[str] = "norm"
    source: ClassVar[str] = "nobody"
    cost: ClassVar[str] = "2*L*Hkv*P*D"
    needs: ClassVar[Need] = Need.KEYS

    power: float = 1.0

    def score(self, ctx: ScoringContext) -> Scores:
        return self.both(ctx.keys.norm(dim=-1) ** self.power)

    def both(self, score: torch.Tensor) -> Scores:
        return Scores(base=score, final=score)


def named(scorer: type[Norm]) -> type[Norm]:
    """The class with what it has to have of its own."""
    scorer.name, scorer.source, scorer.cost = "x", "nobody", "2*L*Hkv*P*D"
    return dataclass(frozen=True)(scorer)


class LooksAtOthers(Norm):
    """Divides by the whole batch."""

    def score(self, ctx):
        score = ctx.keys.norm(dim=-1)
        return self.both(score / score.sum())


class LooksBehind(Norm):
    """Sums over whatever a page holds."""

    def score(self, ctx):
        tokens = ctx.prompts.pages.float().abs().sum()
        return self.both(ctx.keys.norm(dim=-1) + 0 * tokens)


class Waits(Norm):
    """Asks how large the largest is."""

    def score(self, ctx):
        score = ctx.keys.norm(dim=-1)
        return self.both(score if float(score.max()) > 0 else score + 1)


class Boolean(Norm):
    """Indexes with a mask."""

    def score(self, ctx):
        score = ctx.keys.norm(dim=-1)
        score[score > 1] += score[score > 1]
        return self.both(score)


class ReadsValues(Norm):
    """Reads what it does not name."""

    def score(self, ctx):
        return self.both(ctx.values.norm(dim=-1))


class ReadsImages(Norm):
    """Reads another thing that it does not name."""

    def score(self, ctx):
        return self.both(ctx.keys.norm(dim=-1) + (ctx.segment >= 0)[:, None])


class Negative(Norm):
    """Claims to be countable."""

    def score(self, ctx):
        return self.both(-ctx.keys.norm(dim=-1))


class Half(Norm):
    """Computes in the precision of the queries."""

    def score(self, ctx):
        return self.both(ctx.keys.to(ctx.queries.dtype).norm(dim=-1).float())


class Divides(Norm):
    """By the largest, which may be 0."""

    def score(self, ctx):
        score = ctx.keys.norm(dim=-1)
        return self.both(score / score.amax(2, keepdim=True))


class Mixes(Norm):
    """Heads with heads."""

    def score(self, ctx):
        score = ctx.keys.norm(dim=-1)
        return self.both(score + score.sum(1, keepdim=True))


class Doubles(Norm):
    """Returns float64."""

    def score(self, ctx):
        return self.both(ctx.keys.norm(dim=-1).double())


class Remembers(Norm):
    """Keeps what one layer leaves in the class."""

    seen: ClassVar[list[float]] = []

    def score(self, ctx):
        self.seen.append(1.0)
        return self.both(ctx.keys.norm(dim=-1) + len(self.seen))


def test_a_sound_scorer():
    check_scorer(Norm)
    check_scorer(Norm, power=2.0)


@pytest.mark.parametrize(
    ("scorer", "check"),
    [
        (LooksAtOthers, "scores_rows_alone"),
        (LooksBehind, "ignores_what_follows_a_prompt"),
        (Waits, "never_waits_for_the_device"),
        (Boolean, "never_waits_for_the_device"),
        (ReadsValues, "reads_only_what_it_needs"),
        (ReadsImages, "reads_only_what_it_needs"),
        (Negative, "keeps_its_promises"),
        (Half, "computes_in_float32"),
        (Divides, "survives_plain_prompts"),
        (Mixes, "keeps_heads_apart"),
        (Doubles, "returns_float32_for_every_group_size"),
        (Remembers, "scores_layers_alone"),
    ],
)
def test_a_fault_is_found(scorer, check):
    with pytest.raises(AssertionError, match=f"  - {check}: "):
        check_scorer(named(scorer))


def test_all_faults_at_once():
    class Nameless(Negative):
        """Has no name of its own."""

    with pytest.raises(AssertionError) as caught:
        check_scorer(dataclass(frozen=True)(Nameless))
    assert "describes_itself: the class has no name of its own" in str(caught.value)
    assert "keeps_its_promises" in str(caught.value)
