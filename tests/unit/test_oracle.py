# SPDX-License-Identifier: Apache-2.0
"""The oracle reproduces the published worked examples: scorers of text."""

from dataclasses import replace

import lcg
import numpy as np
import pytest
from oracle import OracleConfig, best_positions, pool1d
from oracle.attention import by_group, key_attention_sum, row_means
from oracle.proxies import expected_attention, mean_rotation
from oracle.scorers import (
    State,
    boundary_calibration,
    keydiff,
    last_row,
    mix,
    postvision,
    score_layers,
    unit,
)
from oracle.window import window_score
from worked import C4, PROMPT, SMALL, K, Q, V, close, kept, numbers, sets, top


def pooled(per_query: np.ndarray, cfg: OracleConfig) -> np.ndarray:
    """[Hq, n] -> [Hkv, n] of the two KV heads."""
    return pool1d(by_group(per_query, 2, cfg.reduction), cfg.kernel, cfg.pool)


def test_fixture():
    assert close(Q[0, 0, 0], "0.388224 -0.802941 -0.673301 0.767894")
    assert close(K[2, 1, 11], "-0.126720 0.650810 1.823435 0.310672")
    assert close(V[2, 1, 11], "-0.220803 0.001614 0.022312 -1.755179")


def test_pooling():
    assert close(pool1d(np.ones(6), 5, "avg"), ".6 .8 1 1 .8 .6")
    assert close(pool1d(np.array([1.0, 5, 2, 0, 3, 4]), 3, "max"), "5 5 5 3 4 4")


def test_ties_and_nan():
    score = np.array([0.5, np.nan, 1, -np.inf, 1, np.inf, 0.5])
    assert best_positions(score, 7).tolist() == [5, 2, 4, 0, 6, 3, 1]


class TestWindow:
    def test_scores(self):
        rows = row_means(PROMPT, 0, np.arange(9, 12))[:, :9]
        assert close(
            by_group(rows, 2),
            ".047371 .044446 .072657 .068259 .074041 .073890 .061643 .275325 .080156"
            "| .068216 .116494 .059819 .136376 .125008 .169476 .035508 .046601 .049688",
        )
        assert close(
            window_score(PROMPT, 0, C4),
            ".032895 .046547 .061355 .066659 .070098 .110632 .113011 .098203 .083425"
            "| .048906 .076181 .101183 .121435 .105237 .102594 .085256 .060254 .026359",
        )
        assert close(
            window_score(PROMPT, 1, C4),
            ".043749 .063229 .079958 .083766 .079759 .085730 .103440 .086712 .073885"
            "| .056343 .117975 .128108 .105911 .104831 .109873 .055960 .045826 .035122",
        )
        assert close(
            window_score(PROMPT, 0, replace(C4, pool="max"))[0],
            ".072657 .072657 .074041 .074041 .074041 .275325 .275325 .275325 .275325",
        )
        assert close(
            window_score(PROMPT, 0, replace(C4, reduction="max"))[0],
            ".045793 .067430 .091914 .102496 .110252 .158078 .159946 .135462 .111819",
        )

    def test_kept(self):
        assert kept(C4, 9) == ["5678 2345", "3567 1235", "2345 2346"]
        assert kept(replace(C4, pool="max"), 9)[0].split()[0] == "5678"
        assert all(head.endswith("9ab") for layer in kept(C4) for head in layer.split())


class TestBacon:
    BASE = numbers(".10 .02 .02 .05 .01 .01 .20 .03")[None]
    LAST = numbers(".06 .02 .09 .10 .08 .01 .12 .03")[None]
    TRACE = (numbers("0 0 .04 .02 .06 0 0 .09")[None], numbers("0 0 .02 .04 .02 0 0 0")[None])

    @pytest.mark.parametrize(
        ("mode", "lam", "score", "best"),
        [
            ("e", 1.149178, ".1 .02 .100442 .107459 .090442 .01 .2 .03", "0236"),
            ("el", 0.864569, ".1 .040173 .115103 .147984 .105103 .030173 .2 .03", "2346"),
            ("elt", 0.760973, ".1 .037756 .126536 .159073 .124146 .027756 .2 .064244", "2346"),
            ("rel", 0.839957, ".1 .033719 .115755 .1273 .109115 .027247 .2 .03", "2346"),
        ],
    )
    def test_micro(self, mode, lam, score, best):
        cfg = OracleConfig(budget=34, mode=mode, local_k=3)
        got = boundary_calibration(self.BASE, self.LAST, self.TRACE, 2, cfg)
        assert close(got.evidence[0], "0 0 .07 .05 .07 0 0 0")
        assert close(got.lam, str(lam))
        assert close(got.score[0], score)
        assert top(got.score, 4) == best
        if mode in ("elt", "rel"):
            trace = {"elt": "0 0 .03 .03 .04 0 0 .045", "rel": "0 0 .02 .02 .02 0 0 0"}[mode]
            assert close(got.persistence[0], trace)

    def test_nothing_above_the_window(self):
        cfg = OracleConfig(budget=34)
        got = boundary_calibration(self.LAST, self.LAST, (), 2, cfg)
        assert np.array_equal(got.score, self.LAST)
        assert got.rho == got.lam == 0

    def calibrated(self, cfg):
        trace, out = [], []
        for layer in range(lcg.LAYERS):
            base = window_score(PROMPT, layer, cfg)
            last = pooled(last_row(PROMPT, layer)[:, :9], cfg)
            out.append(boundary_calibration(base, last, trace, 4, cfg))
            trace.append(out[-1].evidence)
        return out

    def test_fixture(self):
        first, second, third = self.calibrated(C4)
        assert close([first.rho, first.lam], ".183311 .043143 | .117145 .104657")
        assert close([second.rho, second.lam], ".267166 .558436 | .054336 .224851")
        assert close([third.rho, third.lam], ".576494 .473986 | .394122 .179304")
        assert close(second.evidence[1], "0 0 0 0 .017656 .042148 .058234 .049902 .038677")
        assert close(second.persistence[1], ".001437 .003835 0 0 0 0 0 0 .013152")
        score = ".056666 .118837 .128902 .108601 .114109 .126902 .078345 .065544 .053378"
        assert close(second.score[1], score)
        cfg = replace(C4, scorer="bacon")
        for scored, calibrated in zip(
            score_layers(PROMPT, cfg, 3, [4] * 3), (first, second, third), strict=True
        ):
            assert np.array_equal(scored.final, calibrated.score)
        assert kept(cfg, 9) == ["5678 2345", "3567 1245", "2345 2346"]
        assert kept(replace(cfg, mode="e"), 9)[1] == "5678 1245"

    def test_trace_length(self):
        """The last layer looks one layer back, or at none."""
        base, last = (
            pooled(rows[:, :9], C4)
            for rows in (row_means(PROMPT, 2, np.arange(9, 12)), last_row(PROMPT, 2))
        )
        evidence = self.calibrated(C4)[1].evidence
        for trace_r, trace in ((1, [evidence]), (0, [])):
            cfg = replace(C4, scorer="bacon", trace_r=trace_r)
            expected = boundary_calibration(base, last, trace, 4, cfg).score
            assert np.array_equal(score_layers(PROMPT, cfg, 3, [4] * 3)[2].final, expected)

    @pytest.mark.parametrize(
        ("mode", "lam"),
        [("e", ".544680 .666763"), ("el", ".364514 .407985"), ("rel", ".226951 .494748")],
    )
    def test_modes(self, mode, lam):
        assert close(self.calibrated(replace(C4, mode=mode))[1].lam, lam)


class TestMixKV:
    def scores(self, layer, diversity="head", r=None):
        return mix(window_score(PROMPT, layer, C4), K[layer], V[layer], diversity, r)

    def test_parts(self):
        base = window_score(PROMPT, 1, C4)
        ds = ".061874 .030702 .060306 .280488 .038733 0 .026915 .089653 .111557"
        vs = ".111954 .107433 .067044 .093130 .021807 .119011 0 .031996 .147851"
        assert close(self.scores(1, "keydiff")[0], ds)
        assert close((self.scores(1, "vnorm") - base)[0], vs)
        assert np.array_equal(self.scores(1, "attn"), base)
        # shorter keys are better
        norms = np.linalg.norm(K[1][:, :9], axis=-1)
        assert (np.argmax(self.scores(1, "knorm") - base, axis=1) == norms.argmin(axis=1)).all()

    def test_r_is_the_mean_cosine(self):
        keys = unit(K[1])
        cosines = keys @ keys.swapaxes(1, 2)
        r = (cosines.sum(axis=(1, 2)) - 12) / (12 * 11)
        assert close(r, ".197854 .036786")
        np.testing.assert_allclose(self.scores(1), self.scores(1, r=r), rtol=1e-12)

    def test_scores(self):
        assert close(
            self.scores(1),
            ".137138 .142971 .129848 .197392 .089135 .164232 .088299 .112959 .199937"
            "| .174465 .206307 .128865 .185560 .219092 .175405 .132884 .163025 .106338",
        )
        # a negative r counts as none
        np.testing.assert_array_equal(self.scores(0), self.scores(0, "vnorm"))

    def test_kept(self):
        cfg = replace(C4, scorer="mixkv")
        assert kept(cfg, 9)[:2] == ["3678 1346", "1358 1345"]
        assert kept(replace(cfg, diversity="flat"), 9)[1] == "0378 0123"
        table = np.array([0.8, 0.3])
        assert top(self.scores(0, r=table), 4) == "0678 1346"
        assert top(self.scores(1, r=table), 4) == "0378 0134"


class TestH2O:
    def test_scores(self):
        score = by_group(key_attention_sum(PROMPT, 0), 2)
        assert close(
            score[0],
            "2.862675 1.731760 1.920264 1.175784 .816472 .520604 .832917 1.218692 .314196 .333380"
            " .260141 .013114",
        )
        np.testing.assert_allclose(score.sum(axis=1), 12)
        assert kept(replace(C4, scorer="h2o"))[0] == "01279ab 01239ab"

    def test_observed(self):
        cfg = replace(C4, scorer="h2o", variant="observed")
        (scored, *_) = score_layers(PROMPT, cfg, 0, [4] * 3)
        assert close(
            scored.final[0],
            ".238556 .157433 .192026 .130643 .102059 .074372 .138820 .243738 .078549 .111127"
            " .130071 .013114",
        )


class TestExpected:
    CFG = OracleConfig(budget=6, scorer="expected", sinks=2, horizon=4, **SMALL)

    def test_rotation(self):
        assert close(
            mean_rotation(PROMPT, 0, 4),
            ".282088 0 -.381122 0 | 0 .990839 0 -.134582 | .381122 0 .282088 0"
            "| 0 .134582 0 .990839",
        )

    def test_scores(self):
        assert close(
            expected_attention(PROMPT, 0, self.CFG)[:, 2:],
            ".206146 .220631 .244505 .102711 .370534 .343639 .169788 .173479 .171792 .089108"
            "| .096187 .459436 .256108 .176128 .211365 .169278 .124211 .226459 .109412 .164628",
        )
        plain = replace(self.CFG, covariance=False, vnorm=False)
        assert close(
            expected_attention(PROMPT, 0, plain)[0, 2:],
            ".110812 .104589 .085921 .098068 .112010 .121691 .091410 .083174 .091988 .100337",
        )

    def test_kept(self):
        assert kept(self.CFG)[0] == "01467b 01349b"

    def test_sinks(self):
        """They rank first, but adakv does not count them."""
        (scored, *_) = score_layers(PROMPT, self.CFG, 1, [4] * 3)
        assert np.isposinf(scored.final[:, :2]).all()
        assert not scored.base[:, :2].any()
        assert np.array_equal(scored.final[:, 2:], scored.base[:, 2:])

    def test_epsilon(self):
        norms = np.linalg.norm(V[0], axis=-1)
        more = expected_attention(PROMPT, 0, replace(self.CFG, epsilon=0.5))
        np.testing.assert_allclose(
            more - expected_attention(PROMPT, 0, self.CFG), 0.5 * norms, rtol=1e-9
        )


class TestKeyDiff:
    CFG = OracleConfig(budget=5, scorer="keydiff", **SMALL)

    def test_scores(self):
        scored = keydiff(PROMPT, 0, self.CFG, State(1, 2))
        assert close(
            scored.final[0],
            ".325192 -.883268 -.166828 -.709878 -.894806 -.867953 .407396 .775044 .318234 -.892071"
            " -.049113",
        )
        assert (scored.base >= 0).all()

    def test_kept(self):
        assert kept(self.CFG)[0] == "0678b 2678b"


def test_streaming():
    assert set(kept(OracleConfig(budget=6, scorer="streaming", **SMALL))) == {"0123ab 0123ab"}


@pytest.mark.parametrize("scorer", ["elastic", "prefixkv"])
def test_shared_sets(scorer):
    """The mean of h2o's sums over all heads, sinks and the last token kept."""
    cfg = OracleConfig(budget=5, scorer=scorer, **SMALL)
    for layer, heads in enumerate(kept(cfg)):
        mean = key_attention_sum(PROMPT, layer).mean(axis=0)[1:11]
        best = np.sort(best_positions(mean, 3) + 1)
        assert heads == sets([[[0, *best, 11]] * 2])[0]


def test_postvision():
    cfg = OracleConfig(budget=5, scorer="postvision", **SMALL)
    scored = postvision(PROMPT, 0, cfg, State(1, 2))
    assert close(
        scored.final[0],
        ".329528 .165663 .286212 .312121 .250552 .262454 .317126 1.155514 .314196 .333380 .260141",
    )
    # without an image the window's rows look back
    text = postvision(replace(PROMPT, segments=()), 0, cfg, State(1, 2)).final
    window = by_group(row_means(PROMPT, 0, np.arange(9, 12)), 2) * 3
    np.testing.assert_allclose(text, window[:, :11])
