# SPDX-License-Identifier: Apache-2.0
"""Synthetic pages of words whose places are known, for measuring which heads read.

Drawn with the font that Pillow brings along, so that nothing has to be downloaded. Every word
occurs once on its page and none contains another: text that a model produces points to one place.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from PIL import Image

WORDS = """\
absent acorn adult almond amber anchor angle apron arctic artist autumn badge bakery bamboo banana
basket beach belief bench bishop blanket blossom bottle branch breeze bridge bronze bucket butter
cabin cactus camera candle canyon carpet castle cedar cement cherry chorus cinema circus clever
clock cobalt coffee comet copper coral cotton cousin cradle crystal curtain dancer debate desert
diary dinner doctor dolphin donkey dragon drawer eagle earth editor elbow empire engine escape
export fabric falcon farmer feather fiddle finger flame flute forest fossil fountain fruit galaxy
garden garlic giant ginger glacier globe gospel grain gravel guitar hammer harbor harvest hazel
helmet hockey honey hotel humble hunter iceberg insect island ivory jacket jaguar jungle kettle
kidney kitchen knight ladder lagoon lantern laptop lawyer lemon leopard liquid lizard lobster lucky
magnet mammal marble market meadow melody mercury mirror monkey mosaic muscle museum needle nephew
noble notebook novel nugget oasis ocean office olive onion orange orchid oxygen oyster paddle palace
panther parrot pebble pencil pepper piano pigeon pilot planet plumber pocket poetry potato powder
pretzel pumpkin puzzle quartz quiver rabbit radio raven receipt ribbon river rocket saddle salmon
satin scarlet school seagull shadow shelter shrimp silver sketch soccer spider spinach squash
stadium statue summer sunset sweater tablet talent teapot temple theory thunder ticket timber tomato
topaz trumpet tulip tunnel turtle unicorn valley vanilla velvet vessel village violin volcano wagon
walnut weasel whisper willow window winter wizard yellow yogurt zebra zipper"""

MARGIN = 32  # pixels, on all sides
FONT_SIZES = range(22, 41)
WIDTHS = range(560, 841)
HEIGHTS = range(560, 1121)


class Box(NamedTuple):
    """A rectangle in pixels of its image; the lower right corner belongs to it."""

    left: float
    top: float
    right: float
    bottom: float


class Word(NamedTuple):
    """Text on a page and the place of its ink."""

    text: str
    box: Box


class Page(NamedTuple):
    """One page."""

    image: "Image.Image"  # RGB
    words: tuple[Word, ...]  # in reading order
    prompt: str = ""  # what to ask about this page; "": the same as about all others


def read_pages(folder: Path) -> Iterator[Page]:
    """Pages of a folder with a file ``questions.json``.

    Its entries have an "image" (the name of a file), a "question", and "words", each with a "text"
    and a "box" of four numbers: left, top, right and bottom pixel.

    Raises:
        ValueError: the file is not like that.
    """
    from PIL import Image

    file = folder / "questions.json"
    for entry in json.loads(file.read_text(encoding="utf-8")):
        try:
            words = tuple(Word(word["text"], Box(*word["box"])) for word in entry["words"])
            name, question = entry["image"], entry["question"]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f'{file}: expected entries with "image", "question" and "words", each of these '
                f'with "text" and "box", got {entry}'
            ) from error
        with Image.open(folder / name) as image:
            yield Page(image.convert("RGB"), words, question)


def draw_page(seed: int, index: int) -> Page:
    """Draw page number `index` of the series `seed`: full lines, sizes and colors at random."""
    from PIL import Image, ImageDraw, ImageFont

    rng = random.Random(f"{seed}-{index}")
    width, height = rng.choice(WIDTHS), rng.choice(HEIGHTS)
    paper = tuple(rng.randrange(215, 256) for _ in range(3))
    image = Image.new("RGB", (width, height), paper)
    draw = ImageDraw.Draw(image)
    supply = WORDS.split()
    rng.shuffle(supply)

    words: list[Word] = []
    top = MARGIN
    while True:
        size = rng.choice(FONT_SIZES)
        font = ImageFont.load_default(size)
        ink = tuple(rng.randrange(0, 90) for _ in range(3))
        left, bottom = float(MARGIN), top
        while supply:
            text = rng.choice((str.lower, str.capitalize, str.upper))(supply[-1])
            box = Box(*draw.textbbox((left, top), text, font=font))
            if box.right > width - MARGIN:
                break
            if box.bottom > height - MARGIN:
                return Page(image, tuple(words))
            supply.pop()
            draw.text((left, top), text, fill=ink, font=font)
            words.append(Word(text, box))
            left = box.right + rng.uniform(0.4, 1.2) * size
            bottom = max(bottom, int(box.bottom))
        if not supply:
            return Page(image, tuple(words))
        top = bottom + rng.randrange(8, 24)
