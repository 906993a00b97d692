# SPDX-License-Identifier: Apache-2.0
"""``vllm-kvcompress explain`` with a real engine: kept sets and maps are those of the oracle."""

import json

import numpy as np
import pytest
from oracle import Oracle, OracleConfig
from oracle.attention import by_group, row_means
from oracle.scorers import boundary_calibration, last_row
from oracle.window import window_rows
from PIL import Image
from transformers import AutoProcessor

from vllm_kvcompress.tools import explain

BUDGET, WINDOW = 64, 32
TOLERANCE = 1e-3
"""Relative to the largest of a map; other maps are off by more than 100 times as much."""
ENGINE_ARGS = {
    "dtype": "float32",
    "block_size": 32,
    "max_model_len": 1024,
    "kv_cache_memory_bytes": 64 << 20,
}


@pytest.fixture(scope="module")
def page(make_page):
    return make_page(1000)


@pytest.fixture(scope="module")
def image(page, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "page.png"
    page.image.save(file)
    return file


@pytest.fixture(scope="module")
def explained(docvqa, page, image):
    """The command's own way from its arguments to what it draws."""
    arguments = [docvqa, "--image", str(image), "--question", page.question]
    arguments += ["--budget", str(BUDGET), "--engine-args", json.dumps(ENGINE_ARGS)]
    return explain.explain(explain.parser().parse_args(arguments))


@pytest.fixture(scope="module")
def oracle_prompt(docvqa, page):
    processor = AutoProcessor.from_pretrained(docvqa)
    content = [{"type": "image"}, {"type": "text", "text": page.question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    ids = processor(text=[text], images=[page.image])["input_ids"][0]
    oracle = Oracle(docvqa)
    return oracle, oracle.prompt(ids, page.image)


CONFIG = OracleConfig(budget=BUDGET, scorer="bacon", window=WINDOW, block_size=32)


def test_answer_and_kept_tokens(explained, oracle_prompt, page):
    (column,) = explained.columns
    oracle, prompt = oracle_prompt
    assert column.answer.strip() == page.answer
    assert column.prompt.length == prompt.length
    assert np.array_equal(column.prompt.is_visual, prompt.visual)
    expected = oracle.select(prompt, CONFIG).kept
    for layer, heads in enumerate(expected):
        for head, positions in enumerate(heads):
            kept = np.flatnonzero(column.prompt.kept[layer, head])
            assert kept.tolist() == list(positions)


def test_maps(explained, oracle_prompt):
    (column,) = explained.columns
    _, prompt = oracle_prompt
    n = prompt.length - WINDOW
    trace: list[np.ndarray] = []
    for layer in range(prompt.num_layers):
        base, last, _ = window_rows(prompt, layer, CONFIG)
        earlier = trace[max(0, layer - CONFIG.trace_r) :]
        found = boundary_calibration(base, last, earlier, BUDGET - WINDOW, CONFIG)
        rows = np.arange(n, prompt.length)
        expected = {
            "window": by_group(row_means(prompt, layer, rows)[:, :n], prompt.num_kv),
            "last": by_group(last_row(prompt, layer)[:, :n], prompt.num_kv),
            "evidence": found.evidence,
            "persistence": found.persistence,
            "final": found.score,
        }
        for name, values in expected.items():
            seen = column.prompt.maps[name][layer][:, :n]
            atol = TOLERANCE * np.abs(values).max()
            np.testing.assert_allclose(seen, values, rtol=0, atol=atol, err_msg=name)
        trace.append(found.evidence)


def test_cells_lie_where_the_page_has_them(explained, page):
    """Grid, image and prompt fit together: a page has as many cells as the model has tokens."""
    grid = explained.grid
    assert grid.cells.height * grid.cells.width == explained.columns[0].prompt.is_visual.sum()
    assert explained.on_grid(explained.columns[0].prompt.is_visual).all()
    assert (grid.resized.width, grid.resized.height) == page.image.size


def test_files(explained, image, page, monkeypatch, tmp_path, capsys):
    """What the command writes and prints, of the same answer."""
    monkeypatch.setattr(explain, "explain", lambda args: explained)
    name = tmp_path / "shown"
    arguments = ["any", "--image", str(image), "--question", page.question, "-o", str(name)]
    assert explain.main(arguments) == 0
    with Image.open(f"{name}.png") as picture:
        assert picture.width > 700
    assert page.question in name.with_suffix(".html").read_text()
    printed = capsys.readouterr().out
    assert f"bacon, budget 64 tokens, window 32: {page.answer}" in printed
    assert "tokens kept per head: 81 of 369" in printed
