# SPDX-License-Identifier: Apache-2.0
"""What ``vllm-kvcompress explain`` shows: arrays, numbers, picture and page, without an engine."""

import base64
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from explanations import (
    COLUMNS,
    HEADS,
    LAYERS,
    LENGTH,
    QUESTION,
    ROWS,
    VISUAL,
    arrays,
    cell,
    column,
    explanation,
    picture,
    report,
)

from vllm_kvcompress.tools import explain, explain_drawing, explain_page
from vllm_kvcompress.tools.explain_grid import given_grid, parse_cells
from vllm_kvcompress.tools.explain_record import PromptMaps
from vllm_kvcompress.tools.visual_tokens import Size

WINDOW_MAPS = ("window", "last", "evidence", "coherence", "persistence")


class TestReports:
    def test_heads_of_all_workers_in_their_order(self):
        whole = PromptMaps.from_reports([report([0, 1])])
        parts = PromptMaps.from_reports([report([1]), None, report([0]), report([0])])
        assert whole.kept.shape == (LAYERS, HEADS, LENGTH)
        assert np.array_equal(parts.kept, whole.kept)
        assert np.array_equal(whole.kept, arrays()["kept"])
        for name, values in whole.maps.items():
            assert np.array_equal(parts.maps[name], values, equal_nan=True)

    def test_what_does_not_compete_has_no_score(self):
        final = PromptMaps.from_reports([report([0, 1])]).maps["final"]
        assert np.isnan(final[..., -4:]).all()
        assert not np.isnan(final[..., :-4]).any()

    def test_no_compression(self):
        with pytest.raises(ValueError, match="was not compressed"):
            PromptMaps.from_reports([None, None])

    def test_coverage(self):
        coverage = column().prompt.coverage()
        text = LENGTH - VISUAL[0][1]
        assert coverage.visual.tolist() == [[1, 2], [2, 3]]
        assert coverage.tokens.tolist() == [[1 + text, 2 + text], [2 + text, 3 + text]]
        # every head keeps the cell with 3 of the 4 parts, and none the other one
        assert coverage.attention["window"] == pytest.approx(np.full((LAYERS, HEADS), 0.75))
        last = arrays()["last"][1, 1, VISUAL[0][0] : VISUAL[0][1]].astype(float)
        assert coverage.attention["last"][1, 1] == pytest.approx(last[:3].sum() / last.sum())
        assert column("keydiff", WINDOW_MAPS).prompt.coverage().attention == {}

    def test_cells_of_the_image(self):
        on_grid = explanation(column()).on_grid(np.arange(LENGTH))
        assert on_grid.shape == (ROWS, COLUMNS)
        assert on_grid[2, 1] == cell(2, 1)


class TestGrid:
    def test_given(self):
        found = given_grid(parse_cells("3X4"), Size(60, 80), ((2, 14),))
        assert (found.first, found.stride, found.cells) == (2, 4, Size(3, 4))

    @pytest.mark.parametrize("text", ["3", "0x4", "3x4x5", "axb", "-1x2"])
    def test_not_a_grid(self, text):
        with pytest.raises(ValueError, match="expected ROWSxCOLUMNS"):
            parse_cells(text)

    def test_other_number_of_tokens(self):
        with pytest.raises(ValueError, match="for 12 visual tokens, and the prompt has 13"):
            given_grid(Size(3, 4), Size(60, 80), ((2, 15),))

    def test_text_between(self):
        with pytest.raises(ValueError, match="row 1 of the grid"):
            given_grid(Size(3, 4), Size(60, 80), ((2, 8), (9, 15)))


class TestPicture:
    def test_colours(self):
        colours = explain_drawing.heat(np.array([0.0, 0.5, 1.0, np.nan]))
        stops = explain_drawing.STOPS
        assert colours.tolist() == [[*stops[0]], [*stops[4]], [*stops[-1]], [255, 255, 255]]
        # brightness alone must tell values apart
        brightness = explain_drawing.heat(np.linspace(0, 1, 60)) @ [0.2126, 0.7152, 0.0722]
        assert (np.diff(brightness) > 0).all()

    def test_scale(self):
        assert explain_drawing.scaled(np.array([0.0, 1.0, 4.0])).tolist() == [0, 0.5, 1]
        below = explain_drawing.scaled(np.array([-1.0, np.nan, 0.0, 3.0]))
        assert below[[0, 2, 3]].tolist() == [0, 0.25, 1]
        assert np.isnan(below[1])
        assert explain_drawing.scaled(np.zeros(3)).tolist() == [0, 0, 0]

    def test_dropped_cells_are_veiled(self):
        share = explanation(column()).on_grid(arrays()["kept"]).mean((0, 1))
        drawn = np.asarray(explain_drawing.kept_on_image(picture(), share, (80, 60)), dtype=int)
        brightness = drawn.mean(2)[10::20, 10::20]  # the middle of each cell
        assert share[0].tolist() == [1, 0.75, 0.25, 0]
        assert brightness.shape == (ROWS, COLUMNS)
        assert (np.diff(brightness[0]) > 0).all()  # the image is black
        assert (brightness[1:] > 180).all()

    def test_captions_say_what_is_not_used(self):
        bacon, snapkv = column().prompt, column("snapkv").prompt
        assert (
            explain_drawing.caption("window", bacon) == "mean attention of the last 4 prompt tokens"
        )
        assert "does not use it" not in explain_drawing.caption("persistence", bacon)
        assert explain_drawing.caption("evidence", snapkv).endswith("snapkv does not use it")
        assert "does not use it" not in explain_drawing.caption("final", snapkv)
        bacon.config["mode"] = "el"
        assert "does not use it" not in explain_drawing.caption("coherence", bacon)
        assert explain_drawing.caption("persistence", bacon).endswith("bacon does not use it")

    def test_size(self):
        """As wide as its columns, and no taller than what is in it."""
        one = explain_drawing.draw(explanation(column()))
        two = explain_drawing.draw(explanation(column(), column("keydiff", WINDOW_MAPS)))
        assert two.width - one.width == explain_drawing.WIDTH + explain_drawing.GAP
        pixels = np.asarray(two.convert("L"))
        rows = np.flatnonzero((pixels < 250).any(axis=1))
        assert two.height - rows[-1] < 3 * explain_drawing.MARGIN
        assert rows[0] > explain_drawing.MARGIN / 2


class TestPage:
    def page(self) -> str:
        return explain_page.page(
            explanation(column(), column("keydiff", WINDOW_MAPS), full_answer="41")
        )

    def data(self) -> dict:
        found = re.search(r'<script type="application/json" id="data">(.*?)</script>', self.page())
        return json.loads(found[1])

    def test_nothing_is_fetched(self):
        page = self.page()
        assert "default-src 'none'" in page
        assert not re.search(r"https?:|//[a-z]+\.|@import|url\(|fetch\(|<link|<iframe", page)
        assert set(re.findall(r"\ssrc=[\"']?(\w+:)?", page)) <= {"data:"}

    def test_what_users_write_stays_text(self):
        page = self.page()
        assert QUESTION not in page
        assert page.count("</script>") == 2
        assert "<b>row" not in page
        assert self.data()["question"] == QUESTION

    def test_content(self):
        data = self.data()
        first, second = data["methods"]
        assert (data["rows"], data["columns"], data["fullAnswer"]) == (ROWS, COLUMNS, "41")
        assert first["answer"] == "42"
        assert first["layers"] == [1, 3]
        assert [m["title"] for m in first["maps"]] == list(explain_drawing.TITLES.values())
        assert [m["title"] for m in second["maps"]] == ["Final score"]
        kept = np.frombuffer(base64.b64decode(first["kept"]), np.uint8)
        expected = explanation(column()).on_grid(arrays()["kept"])
        assert np.array_equal(kept.reshape(expected.shape), expected)

    def test_quantized(self):
        values = np.random.default_rng(1).normal(size=(2, 3, 4, 5))
        values[0, 0], values[0, 1, 2, 3], values[1, 2] = np.nan, np.nan, 7.0
        packed = explain_page.quantized(values)
        steps = np.frombuffer(base64.b64decode(packed["steps"]), "<u2").reshape(values.shape)
        low, high = (np.reshape(packed[name], (2, 3, 1, 1)) for name in ("low", "high"))
        decoded = low + steps * (high - low) / (explain_page.UNKNOWN - 1)
        known = ~np.isnan(values)
        assert np.array_equal(steps == explain_page.UNKNOWN, ~known)
        error = np.abs(decoded - values)[known]
        assert error.max() <= (high - low).max() / (explain_page.UNKNOWN - 1)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
class TestBrowser:
    """The page in a real browser: its script runs to the end and shows the right numbers."""

    FLAGS = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
        "--enable-logging=stderr --disable-background-networking --disable-component-update "
        "--disable-sync --virtual-time-budget=5000 --dump-dom"
    )

    def test_page(self, tmp_path):
        file = tmp_path / "page.html"
        file.write_text(explain_page.page(explanation(column(), column("snapkv"))))
        done = subprocess.run(
            [
                "chromium",
                *self.FLAGS.split(),
                f"--user-data-dir={tmp_path}/profile",
                f"file://{file}",
            ],
            capture_output=True,
            text=True,
            check=True,
            timeout=240,
        )
        shown = done.stdout
        assert "CONSOLE" not in done.stderr, done.stderr
        assert 'data-ready="yes"' in shown
        assert "kept by none (veiled) to all 4 heads" in shown
        assert "Of what either keeps here, 100% is kept by both." in shown
        assert shown.count("<canvas") == 2 * (2 + 6 + LAYERS * HEADS) + 1
        assert "75%" in shown
        assert "snapkv does not use it" in shown
        assert "</script>&lt;b&gt;row" not in shown
        assert "Which &lt;/script&gt;&lt;b&gt;row&lt;/b&gt; &amp; column?" in shown


class TestArguments:
    @pytest.fixture
    def image(self, tmp_path):
        picture().save(tmp_path / "image.png")
        return str(tmp_path / "image.png")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "give a MODEL to load, or --server URL"),
            (["model", "--method", "bacn"], "unknown scorer 'bacn'"),
            (["model", "--budget", "8", "--window", "32"], "--kv-budget 8 includes the window"),
            (["model", *["--method", "bacon"] * 3], "two side by side at most, got 3"),
            (["model", "--max-tokens", "1"], "at least 2"),
            (["model", "--grid", "18"], "expected ROWSxCOLUMNS"),
            (["model", "--method", "{bad"], "not valid JSON"),
            (["model", "-o", "nowhere/page"], "the folder of nowhere/page does not exist"),
            (["--server", "http://x", "--method", "bacon"], "leave it out with --server"),
            (["--server", "http://x", "--full-cache"], "--full-cache: a server has its own"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_refused_before_anything_is_loaded(self, image, arguments, message, capsys):
        with pytest.raises(SystemExit):
            explain.main([*arguments, "--image", image, "--question", "?"])
        assert message in capsys.readouterr().err

    def test_no_image(self, capsys):
        with pytest.raises(SystemExit):
            explain.main(["model", "--image", "none.png", "--question", "?"])
        assert "there is no file none.png" in capsys.readouterr().err
