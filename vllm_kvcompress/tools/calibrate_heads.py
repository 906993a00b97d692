# SPDX-License-Identifier: Apache-2.0
"""Measure how visual each query head of a model is, once, for allocators that budget by it.

The model reads synthetic pages aloud. Whenever it produces text that stands in exactly one place of
the page, every head whose most attended key is a visual token of that place scores.

Source: SparseMM, arXiv 2506.05344, and its released code. Unlike there, pages are drawn here and
annotated word by word, so blanks around a produced token are ignored.

Imports transformers and torch only where they are used: the command line must start quickly.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_kvcompress.tools.ocr_pages import Page, Word, draw_page, read_pages
from vllm_kvcompress.tools.visual_tokens import Size, TokenGrid, require_known, token_grid

if TYPE_CHECKING:
    import torch

PROMPT = "Provide all the OCR results of this image."
PATIENCE = 20
"""Pages without a single hit, from the first on, after which nothing is expected any more."""
UNREAD = "this model does not read such pages, or --prompt does not ask it to; --pages takes others"
USELESS = "this model has no heads that look where it reads"


class Reading(NamedTuple):
    """What came of one page."""

    scores: "torch.Tensor"  # [L, Hq] float64
    tokens: int  # produced
    placed: int  # of these, how many stand in exactly one place of the page

    @property
    def hit(self) -> bool:
        """Whether any head looked at what it was reading."""
        return bool((self.scores > 0).any())


class AttentionRecorder:
    """Records which key each head attends to most, while the model generates.

    Attributes:
        top_keys: one list per forward pass, with the positions [Hq] of every layer.
        num_keys: the fewest keys that a layer of the latest pass could attend to.
    """

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self.top_keys: list[list[torch.Tensor]] = []
        self.num_keys = 0

    def attach(self, decoder: Any) -> None:
        """Listen to every layer of a decoder that runs with eager attention."""
        for layer in decoder.layers:
            layer.self_attn.register_forward_hook(
                lambda _module, _arguments, output: self.record(output[1])
            )

    def record(self, weights: "torch.Tensor") -> None:
        """Take the attention probabilities of the next layer, [1, Hq, rows, keys]."""
        if not self.top_keys or len(self.top_keys[-1]) == self._layers:
            self.top_keys.append([])
            self.num_keys = weights.shape[-1]
        self.num_keys = min(self.num_keys, weights.shape[-1])
        self.top_keys[-1].append(weights[0, :, -1].argmax(dim=-1))

    def take(self) -> "torch.Tensor":
        """Everything since the last call, [steps, L, Hq]."""
        import torch

        taken = torch.stack([torch.stack(layers) for layers in self.top_keys])
        self.top_keys = []
        return taken


def place_of(text: str, words: Sequence[Word]) -> Word | None:
    """The word that `text` is part of, if there is exactly one."""
    text = text.strip()
    found = [word for word in words if text in word.text] if text else []
    return found[0] if len(found) == 1 else None


def score(
    top_keys: "torch.Tensor", texts: Sequence[str], words: Sequence[Word], grid: TokenGrid
) -> Reading:
    """Score every head on one page.

    Args:
        top_keys: position of the most attended key [steps, L, Hq], by the query of each token.
        texts: the token that each of these queries produced.
        words: on the page.
        grid: of the page's visual tokens.
    """
    import torch

    scores = torch.zeros(top_keys.shape[1:], dtype=torch.float64, device=top_keys.device)
    placed = 0
    for keys, text in zip(top_keys, texts, strict=True):
        word = place_of(text, words)
        tokens = grid.tokens_of(word.box) if word else []
        if tokens:
            placed += 1
            scores += torch.isin(keys, keys.new_tensor(tokens)).double() / len(tokens)
    return Reading(scores, len(texts), placed)


class Calibrator:
    """A checkpoint that reads pages, with a recorder in its attention layers."""

    def __init__(self, model: str, prompt: str, max_tokens: int) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

        # before the weights, which may be large
        require_known(AutoConfig.from_pretrained(model))
        self._processor = AutoProcessor.from_pretrained(model)
        # Any: the stubs of transformers do not know that such a model generates
        self._model: Any = AutoModelForImageTextToText.from_pretrained(
            model, dtype="auto", attn_implementation="eager"
        )
        self._model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        self._recorder = AttentionRecorder(self._model.config.get_text_config().num_hidden_layers)
        self._recorder.attach(self._model.get_decoder())
        self._prompt = prompt
        self._max_tokens = max_tokens

    def read(self, page: Page) -> Reading:
        """Let the model read a page, greedily."""
        import torch

        content = [{"type": "image"}, {"type": "text", "text": page.prompt or self._prompt}]
        prompt = self._processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        inputs = self._processor(text=[prompt], images=[page.image], return_tensors="pt")
        size = Size(page.image.height, page.image.width)
        grid = token_grid(self._model.config, inputs, size)
        with torch.inference_mode():
            output = self._model.generate(
                **inputs.to(self._model.device),
                max_new_tokens=self._max_tokens,
                do_sample=False,
                num_beams=1,
                # many checkpoints bring one along
                repetition_penalty=1.0,
            )
        if self._recorder.num_keys != output.shape[1] - 1:
            raise ValueError(
                f"expected attention to all {output.shape[1] - 1} tokens, got "
                f"{self._recorder.num_keys}: layers with a sliding window cannot be calibrated"
            )
        produced = output[0, inputs["input_ids"].shape[1] :].tolist()
        texts = [self._processor.decode([token]) for token in produced]
        return score(self._recorder.take(), texts, page.words, grid)


def pages(images: int, seed: int, folder: Path | None) -> Iterator[Page]:
    """So many pages: drawn, or the first ones of a folder."""
    if folder is None:
        return (draw_page(seed, index) for index in range(images))
    return itertools.islice(read_pages(folder), images)


def calibrate(calibrator: Calibrator, drawn: Iterable[Page], patience: int) -> Iterator[Reading]:
    """Read one page after the other.

    Args:
        patience: after so many pages without a hit; 0: never.

    Raises:
        ValueError: patience is at an end.
    """
    tokens = placed = 0
    hopeful = patience == 0
    for index, page in enumerate(drawn):
        reading = calibrator.read(page)
        yield reading
        tokens, placed = tokens + reading.tokens, placed + reading.placed
        hopeful |= reading.hit
        if not hopeful and index + 1 == patience:
            raise ValueError(
                f"no head looked at what was being read on the first {patience} pages "
                f"({tokens} tokens produced, {placed} of them in exactly one word): "
                + (USELESS if placed else UNREAD)
            )


def as_table(scores: Sequence[list[list[float]]]) -> dict[str, list[float]]:
    """Scores [images][L][Hq] in the published form: "layer-head" -> a number per image."""
    layers, heads = len(scores[0]), len(scores[0][0])
    return {
        f"{layer}-{head}": [image[layer][head] for image in scores]
        for layer in range(layers)
        for head in range(heads)
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: calibrate and write the file; 1 if there is none or if it is of no use."""
    parser = argparse.ArgumentParser(
        prog="vllm-kvcompress calibrate-heads",
        description="Measure how visual each query head of a model is, by letting it read "
        "synthetic pages, and write the scores. Ctrl-C ends early and keeps what is done.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder or name of the checkpoint")
    parser.add_argument(
        "-o", "--output", metavar="FILE", type=Path, required=True, help="JSON file to write"
    )
    parser.add_argument(
        "--images", metavar="N", type=_positive, default=1000, help="how many pages"
    )
    parser.add_argument(
        "--max-tokens", metavar="N", type=_positive, default=1024, help="longest answer per page"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the pages")
    parser.add_argument("--prompt", default=PROMPT, help=f"what to ask (default: {PROMPT})")
    parser.add_argument(
        "--pages",
        metavar="DIR",
        type=Path,
        help="pages and questions of your own instead of drawn ones, as examples/tiny-docvqa/"
        "pages.py writes them",
    )
    parser.add_argument(
        "--patience",
        metavar="N",
        type=_not_negative,
        default=PATIENCE,
        help="give up after so many pages on which no head looked at what was being read "
        f"(default: {PATIENCE}); 0: never",
    )
    args = parser.parse_args(argv)
    # hours of work must not end with this
    if not args.output.resolve().parent.is_dir():
        parser.error(f"-o: the folder of {args.output} does not exist")
    from tqdm import tqdm

    readings: list[Reading] = []
    failed = False
    try:
        calibrator = Calibrator(args.model, args.prompt, args.max_tokens)
        drawn = pages(args.images, args.seed, args.pages)
        with tqdm(total=None if args.pages else args.images, unit="page") as bar:
            for reading in calibrate(calibrator, drawn, args.patience):
                readings.append(reading)
                bar.set_postfix(
                    tokens=sum(each.tokens for each in readings),
                    placed=sum(each.placed for each in readings),
                    hits=sum(each.hit for each in readings),
                )
                bar.update()
    except KeyboardInterrupt:
        print(f"interrupted after {len(readings)} pages", file=sys.stderr)
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        failed = True
    if failed or not readings:
        return 1
    table = as_table([reading.scores.tolist() for reading in readings])
    args.output.write_text(json.dumps(table) + "\n", encoding="utf-8")
    placed = sum(reading.placed for reading in readings)
    print(
        f"wrote {args.output}: {len(readings)} pages, {sum(r.tokens for r in readings)} tokens, "
        f"{placed} of them in exactly one word"
    )
    if not any(reading.hit for reading in readings):
        print(
            f"{parser.prog}: no head ever looked at what the model was reading, all scores are 0: "
            + (USELESS if placed else UNREAD),
            file=sys.stderr,
        )
        return 1
    return 0


def _positive(text: str) -> int:
    """An integer above 0, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {number}")
    return number


def _not_negative(text: str) -> int:
    """An integer from 0 on, for argparse."""
    return 0 if text == "0" else _positive(text)


if __name__ == "__main__":
    raise SystemExit(main())
