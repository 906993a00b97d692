# SPDX-License-Identifier: Apache-2.0
"""Head scores: pages, visual tokens, the score itself, and the command on tiny checkpoints."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_families
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.image_processing_utils import select_best_resolution

from vllm_kvcompress.allocation.sparsemm import SparseMM
from vllm_kvcompress.tools import calibrate_heads
from vllm_kvcompress.tools.calibrate_heads import AttentionRecorder, Calibrator, place_of, score
from vllm_kvcompress.tools.main import main
from vllm_kvcompress.tools.ocr_pages import WORDS, Box, Page, Word, draw_page
from vllm_kvcompress.tools.visual_tokens import Size, TokenGrid, token_grid

QWEN = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl-moe")
LLAVA = ("llava-next-mistral", "llava-onevision")
LAYERS, HEADS = 2, 4
MESSAGE = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Read."}]}]


def checkpoint(family: str) -> Path:
    cache = Path(__file__).resolve().parents[2] / ".cache" / "models"
    return tiny_families.make(family, cache)


class TestPages:
    def test_no_word_contains_another(self):
        words = WORDS.split()
        assert len(set(words)) == len(words)
        assert not [(a, b) for a in words for b in words if a != b and a in b]

    def test_a_page_follows_from_seed_and_index(self):
        page, again = draw_page(5, 1), draw_page(5, 1)
        assert page.words == again.words
        assert page.image.tobytes() == again.image.tobytes()
        assert page.words != draw_page(5, 2).words
        assert page.words != draw_page(6, 1).words

    @pytest.mark.parametrize("index", range(4))
    def test_ink_is_where_the_boxes_say(self, index):
        image, words, _ = draw_page(0, index)
        assert len(words) > 30
        pixels = np.asarray(image).astype(int)
        ink = (pixels != pixels[0, 0]).any(axis=-1)
        everywhere = ink.copy()
        for word in words:
            left, top, right, bottom = (round(side) for side in word.box)
            assert 0 <= left < right < image.width
            assert 0 <= top < bottom < image.height
            rows, columns = ink[top : bottom + 1, left : right + 1].nonzero()
            gaps = (
                rows.min(),
                columns.min(),
                bottom - top - rows.max(),
                right - left - columns.max(),
            )
            assert max(gaps) <= 5, f"the box of {word.text} is too large"
            everywhere[top : bottom + 1, left - 1 : right + 2] = False
        assert not everywhere.any()


class TestTokenGrid:
    def test_a_scaled_box(self):
        """A page of 400 x 200, shown as 140 x 84: cells of 28 pixels, 80 x 66.67 of the page."""
        grid = TokenGrid(10, Size(3, 5), 5, Size(200, 400), Size(84, 140))
        assert grid.cell == (28, 28)
        assert grid.tokens_of(Box(0, 0, 79, 66)) == [10]
        # the cell that the lower right corner touches belongs to it
        assert grid.tokens_of(Box(0, 0, 80, 66)) == [10, 11]
        assert grid.tokens_of(Box(0, 0, 79, 67)) == [10, 15]
        assert grid.tokens_of(Box(161, 70, 250, 140)) == [17, 18, 22, 23]

    def test_newlines_and_the_edge(self):
        """Cells of 100 // 7 = 14 pixels: the last two columns of pixels are past the grid."""
        grid = TokenGrid(20, Size(2, 7), 8, Size(30, 100), Size(30, 100))
        assert grid.cell == (15, 14)
        assert grid.tokens_of(Box(90, 0, 99, 29)) == [26, 34]
        assert grid.tokens_of(Box(98, 0, 99, 14)) == []
        assert grid.tokens_of(Box(13, 16, 14, 17)) == [28, 29]

    def test_too_small_an_image(self):
        with pytest.raises(ValueError, match="too small"):
            TokenGrid(0, Size(8, 8), 8, Size(7, 100), Size(7, 100))


def processed(family: str, width: int, height: int) -> dict:
    processor = AutoProcessor.from_pretrained(checkpoint(family))
    text = processor.apply_chat_template(MESSAGE, add_generation_prompt=True, tokenize=False)
    return processor(text=[text], images=[Image.new("RGB", (width, height))], return_tensors="pt")


@pytest.mark.parametrize(("width", "height"), [(300, 200), (91, 333), (840, 560)])
@pytest.mark.parametrize("family", QWEN)
def test_qwen_grid(family, width, height):
    """All placeholders are cells, and a cell is two patches wide and high."""
    config = AutoConfig.from_pretrained(checkpoint(family))
    inputs = processed(family, width, height)
    grid = token_grid(config, inputs, Size(height, width))
    places = (inputs["input_ids"][0] == config.image_token_id).nonzero().flatten().tolist()
    assert grid.tokens_of(Box(0, 0, width - 1, height - 1)) == places
    patch = 16 if family == "qwen3-vl-moe" else 14
    assert grid.cell == (2 * patch, 2 * patch)
    assert grid.resized.width / grid.resized.height == pytest.approx(width / height, rel=0.15)


@pytest.mark.parametrize(
    ("width", "height"), [(224, 224), (300, 200), (91, 333), (333, 91), (500, 480)]
)
@pytest.mark.parametrize("family", LLAVA)
def test_llava_grid(family, width, height):
    """The model itself packs features that say where they come from; the grid finds them."""
    config = AutoConfig.from_pretrained(checkpoint(family))
    model = AutoModelForImageTextToText.from_config(config).model
    inputs = processed(family, width, height)
    grid = token_grid(config, inputs, Size(height, width))

    side = tiny_families.TILE // tiny_families.PATCH
    tiles = inputs["pixel_values"].shape[1] - 1
    line = torch.arange(side).float()
    tile = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1)  # row, column inside a tile
    best = select_best_resolution((height, width), config.image_grid_pinpoints)
    across = best[1] // tiny_families.TILE
    features = torch.full((1 + tiles, side * side, 2), -1.0)  # the base view counts for nothing
    for index in range(tiles):
        corner = torch.tensor([index // across * side, index % across * side])
        features[1 + index] = (tile + corner).flatten(0, 1)
    strategy = {"vision_feature_select_strategy": "default"} if "next" in family else {}
    packed, _ = model.pack_image_features(
        [features], inputs["image_sizes"], image_newline=torch.tensor([-2.0, -2.0]), **strategy
    )
    packed = packed[0]

    first_image_token = int((inputs["input_ids"][0] == config.image_token_id).nonzero()[0])
    everything = grid.tokens_of(Box(0, 0, width * 2, height * 2))
    tokens = torch.tensor(everything).sub(first_image_token)
    places = packed[tokens].view(*grid.cells, 2)
    rows, columns = places[:, 0, 0], places[0, :, 1]
    assert torch.equal(places[..., 0], rows[:, None].expand(grid.cells))
    assert torch.equal(places[..., 1], columns[None].expand(grid.cells))
    # one after the other, and as much padding above as below
    assert torch.equal(rows.diff(), torch.ones(len(rows) - 1))
    assert torch.equal(columns.diff(), torch.ones(len(columns) - 1))
    assert rows[0] + rows[-1] == tiles // across * side - 1
    assert columns[0] + columns[-1] == across * side - 1
    assert (packed[tokens[grid.cells.width - 1] + 1] == -2).all()


def test_onevision_shrinks_large_grids():
    config = AutoConfig.from_pretrained(checkpoint("llava-onevision"))
    config.vision_aspect_ratio = "anyres_max_4"
    processor = AutoProcessor.from_pretrained(checkpoint("llava-onevision"))
    processor.vision_aspect_ratio = "anyres_max_4"
    page = Image.new("RGB", (400, 400))
    inputs = processor(text=["<|image_pad|>"], images=[page], return_tensors="pt")
    grid = token_grid(config, inputs, Size(400, 400))
    assert grid.cells == (16, 16)  # of 24 x 24


def test_misplaced_tokens_are_noticed():
    inputs = processed("qwen2-vl", 300, 200)
    inputs["input_ids"] = inputs["input_ids"][:, :-40]
    config = AutoConfig.from_pretrained(checkpoint("qwen2-vl"))
    with pytest.raises(ValueError, match="expected 77 visual tokens"):
        token_grid(config, inputs, Size(200, 300))


WORDS_OF_PAGE = (Word("alpha", Box(0, 0, 29, 9)), Word("omega", Box(40, 10, 59, 19)))
GRID = TokenGrid(3, Size(2, 6), 6, Size(20, 60), Size(20, 60))
"""Tokens 3..8 above, 9..14 below; alpha is 3, 4, 5 and omega is 13, 14."""


def test_place_of_a_token():
    alpha, omega = WORDS_OF_PAGE
    assert place_of(" alp", WORDS_OF_PAGE) == alpha
    assert place_of("omega\n", WORDS_OF_PAGE) == omega
    assert place_of("a", WORDS_OF_PAGE) is None  # in both
    assert place_of("beta", WORDS_OF_PAGE) is None
    assert place_of(" ", WORDS_OF_PAGE) is None


def test_planted_attention():
    """The one head that looks at what is being read gets 1 / |box tokens| per hit, all others 0."""
    assert [GRID.tokens_of(word.box) for word in WORDS_OF_PAGE] == [[3, 4, 5], [13, 14]]
    prompt = 20
    texts = ["alp", "ha", "a", " ome", "ga", "<end>"]
    looks = {  # (layer, head): most attended key of each step
        (1, 2): [3, 5, 4, 14, 2, 13],  # alpha, alpha, ambiguous, omega, nowhere, no word
        (0, 0): [0, 0, 0, 0, 0, 0],
        (0, 1): [13, 14, 13, 3, 4, 5],  # always at the other word
        (1, 0): [6, 2, 3, 12, 15, 14],  # beside the words
        (1, 3): [21, 22, 23, 24, 24, 24],  # in front of or behind the image
    }
    recorder = AttentionRecorder(LAYERS)
    for step in range(len(texts)):
        keys = prompt + max(step, 5)
        rows = prompt if step == 0 else 1
        for layer in range(LAYERS):
            weights = torch.full((1, HEADS, rows, keys), 0.001)
            weights[:, :, :-1, 3] = 0.9  # other rows than the last look at alpha
            for head in range(HEADS):
                weights[0, head, -1, looks.get((layer, head), [1] * 6)[step]] = 0.4
            recorder.record(weights)
    scores, tokens, placed = score(recorder.take(), texts, WORDS_OF_PAGE, GRID)
    expected = torch.zeros(LAYERS, HEADS, dtype=torch.float64)
    expected[1, 2] = 1 / 3 + 1 / 3 + 1 / 2
    assert torch.equal(scores, expected)
    assert (tokens, placed) == (6, 4)


ALL_CHARACTERS = "".join(chr(code) for code in range(ord("!"), ord("~") + 1))


def lettered_page(seed: int, index: int) -> Page:
    """Noise; whatever the model says, it stands in the upper left."""
    pixels = np.random.default_rng([seed, index]).integers(0, 256, (224, 280, 3), dtype=np.uint8)
    return Page(Image.fromarray(pixels), (Word(ALL_CHARACTERS, Box(0, 0, 150, 120)),))


def naive_scores(folder: Path, page: Page, prompt: str, max_tokens: int) -> list[list[float]]:
    """The definition, with nothing in common but the model: all attentions, Python loops."""
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager")
    processor = AutoProcessor.from_pretrained(folder)
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    text = processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=[page.image], return_tensors="pt")
    output = model.generate(
        **inputs,
        max_new_tokens=max_tokens,
        do_sample=False,
        output_attentions=True,
        return_dict_in_generate=True,
    )
    first = inputs["input_ids"][0].tolist().index(model.config.image_token_id)
    columns = 280 // 28
    # 150 // 28 = 5 and 120 // 28 = 4: rows 0..4, columns 0..5
    box = {first + row * columns + column for row in range(5) for column in range(6)}
    scores = [[0.0] * HEADS for _ in range(LAYERS)]
    for step in output.attentions:
        for layer in range(LAYERS):
            for head in range(HEADS):
                weights = step[layer][0][head][-1].tolist()
                if weights.index(max(weights)) in box:
                    scores[layer][head] += 1 / len(box)
    return scores


def test_command(tmp_path, monkeypatch, capsys):
    """Two pages on a tiny Qwen2-VL: the published format, the naive definition's numbers."""
    monkeypatch.setattr(calibrate_heads, "draw_page", lettered_page)
    folder, output = checkpoint("qwen2-vl"), tmp_path / "scores.json"
    options = ["--images", "2", "--max-tokens", "12", "--seed", "3", "--prompt", "Speak!"]
    assert main(["calibrate-heads", str(folder), "-o", str(output), *options]) == 0
    table = json.loads(output.read_text())
    names = [f"{layer}-{head}" for layer in range(LAYERS) for head in range(HEADS)]
    assert list(table) == names
    for index in range(2):
        expected = naive_scores(folder, lettered_page(3, index), "Speak!", 12)
        got = [table[name][index] for name in names]
        assert got == pytest.approx([value for layer in expected for value in layer], abs=1e-12)
    assert all(len(values) == 2 for values in table.values())
    assert sum(map(sum, table.values())) > 0
    shown = capsys.readouterr()
    assert "2 pages, 24 tokens, 24 of them in exactly one word" in shown.out
    assert "2/2" in shown.err
    hits = sum(any(values[index] for values in table.values()) for index in range(2))
    assert f"hits={hits}, placed=24, tokens=24" in shown.err


def test_the_shipped_model(docvqa, make_page, tmp_path, monkeypatch, capsys):
    """The example's pages and model make a file that sparsemm takes."""
    drawn = sys.modules[make_page.__module__]
    monkeypatch.setattr(sys, "argv", ["pages.py", "--out", str(tmp_path), "--count", "3"])
    drawn.main()
    output = tmp_path / "heads.json"
    arguments = [str(docvqa), "-o", str(output), "--pages", str(tmp_path), "--max-tokens", "8"]
    assert main(["calibrate-heads", *arguments]) == 0
    assert "wrote" in capsys.readouterr().out
    table = json.loads(output.read_text())
    assert {len(values) for values in table.values()} == {3}
    means = sorted(sum(values) / 3 for values in table.values())
    assert means[-1] > 2  # of at most 4: some heads look at the digit that is being read
    assert means[len(means) // 2] < 0.5
    SparseMM(head_scores=str(output))


def test_a_model_that_does_not_read_is_given_up(docvqa, tmp_path, monkeypatch, capsys):
    """Pages of another kind than the model knows: after three of a thousand, with a reason."""
    words = (Word("absent", Box(9, 9, 99, 30)),)
    page = Page(Image.new("RGB", (280, 224)), words)
    monkeypatch.setattr(calibrate_heads, "draw_page", lambda seed, index: page)
    output = tmp_path / "heads.json"
    arguments = ["calibrate-heads", str(docvqa), "-o", str(output), "--max-tokens", "2"]
    assert main([*arguments, "--patience", "3"]) == 1
    message = capsys.readouterr().err
    assert "no head looked at what was being read on the first 3 pages" in message
    assert "--pages" in message
    assert not output.exists()
    assert main([*arguments, "--patience", "0", "--images", "4"]) == 1
    assert len(json.loads(output.read_text())["0-0"]) == 4


def test_a_folder_of_something_else(docvqa, tmp_path, capsys):
    (tmp_path / "questions.json").write_text('[{"image": "page-0.png", "question": "?"}]')
    output = tmp_path / "heads.json"
    assert main(["calibrate-heads", str(docvqa), "-o", str(output), "--pages", str(tmp_path)]) == 1
    assert '"words"' in capsys.readouterr().err


def test_a_trained_reader(docvqa, make_page, monkeypatch):
    """A model that copies digits off pages has heads that look at each digit as they produce it.

    A digit is one visual token wide, so a look at its neighbour would not count.
    """
    pages, grids = sys.modules[make_page.__module__], []
    render = pages.render

    def keep_grid(rng, grid):
        grids.append(["".join(row) for row in grid])
        return render(rng, grid)

    monkeypatch.setattr(pages, "render", keep_grid)
    scores = []
    for seed in (1000, 1002, 1004, 1005):
        page = make_page(seed)
        assert len(set(page.answer)) == 4  # or else it is not certain which digit is being read
        ((row, column),) = [
            (row, line.index(f":{page.answer}") + 1)
            for row, line in enumerate(grids[-1])
            if f":{page.answer}" in line
        ]
        cells = [pages.CELL * (column + i) for i in range(len(page.answer))]
        words = tuple(
            Word(digit, Box(left + 2, row * pages.CELL + 2, left + 25, row * pages.CELL + 25))
            for digit, left in zip(page.answer, cells, strict=True)
        )
        given = tuple(Word(word["text"], Box(*word["box"])) for word in page.words)
        assert [word.text for word in given] == [word.text for word in words]
        assert np.abs(np.subtract([w.box for w in given], [w.box for w in words])).max() <= 1
        reading = Calibrator(docvqa, page.question, 8).read(Page(page.image, words))
        assert reading.placed == len(page.answer)
        scores.append(reading.scores)
    mean = torch.stack(scores).mean(dim=0)
    assert mean.max() > 3.5  # of 4
    assert (mean < 0.5).sum() > mean.numel() / 2


@pytest.mark.parametrize("family", [*QWEN[1:], *LLAVA])
def test_other_families(family, tmp_path):
    """They run through, on pages as they are drawn."""
    output = tmp_path / "scores.json"
    main(
        [
            "calibrate-heads",
            str(checkpoint(family)),
            "-o",
            str(output),
            "--images",
            "1",
            "--max-tokens",
            "3",
        ]
    )
    table = json.loads(output.read_text())
    assert len(table) == LAYERS * HEADS
    assert all(len(values) == 1 and values[0] >= 0 for values in table.values())


def test_zeros_are_told(tmp_path, monkeypatch, capsys):
    blank = Page(Image.new("RGB", (280, 224)), ())
    monkeypatch.setattr(calibrate_heads, "draw_page", lambda seed, index: blank)
    output = tmp_path / "scores.json"
    arguments = [str(checkpoint("qwen2-vl")), "-o", str(output), "--images", "1"]
    assert calibrate_heads.main([*arguments, "--max-tokens", "2"]) == 1
    assert "all scores are 0" in capsys.readouterr().err
    assert output.exists()


def test_interruption_keeps_what_is_done(tmp_path, monkeypatch):
    def page(seed: int, index: int) -> Page:
        if index == 1:
            raise KeyboardInterrupt
        return lettered_page(seed, index)

    monkeypatch.setattr(calibrate_heads, "draw_page", page)
    output = tmp_path / "scores.json"
    calibrate_heads.main([str(checkpoint("qwen2-vl")), "-o", str(output), "--max-tokens", "2"])
    assert all(len(values) == 1 for values in json.loads(output.read_text()).values())


@pytest.mark.parametrize("family", ["mistral", "internvl3"])
def test_other_models_are_refused(family, tmp_path, capsys):
    """Before their weights are read."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint(family), folder)
    (folder / "model.safetensors").unlink()
    output = tmp_path / "scores.json"
    assert calibrate_heads.main([str(folder), "-o", str(output)]) == 1
    assert "expected a model of type qwen2_vl, " in capsys.readouterr().err
    assert not output.exists()


def test_sliding_windows_are_refused(tmp_path, capsys):
    """Keys would have other indices than tokens."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("llava-next-mistral"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["sliding_window"] = 64
    (folder / "config.json").write_text(json.dumps(config))
    arguments = [str(folder), "-o", str(tmp_path / "scores.json"), "--max-tokens", "3"]
    assert calibrate_heads.main(arguments) == 1
    assert "sliding window" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "/nowhere/scores.json"], "does not exist"),
        (["-o", "scores.json", "--images", "0"], "above 0"),
        ([], "required: -o"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as status:
        main(["calibrate-heads", "model", *arguments])
    assert status.value.code == 2
    assert message in capsys.readouterr().err


def test_no_such_model(tmp_path, capsys):
    missing = str(tmp_path / "missing")
    assert main(["calibrate-heads", missing, "-o", str(tmp_path / "scores.json")]) == 1
    assert "vllm-kvcompress calibrate-heads: " in capsys.readouterr().err
