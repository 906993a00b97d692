# SPDX-License-Identifier: Apache-2.0
"""Questions about long texts that a chat model of 135 million parameters can answer.

In the manner of RULER (arXiv 2404.06654): facts in essays and in repeated filler, keyed facts, the
most common word of a list; and plain running text. A prompt ends where the assistant's turn begins:
an answer that begins inside the prompt tells every method what to keep.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

SYSTEM = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n"
)
TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
PLACES = """\
Oslo Lima Cairo Delhi Quito Tunis Sofia Hanoi Accra Paris Rome Berlin Madrid Vienna Dublin Athens
Prague Warsaw Lisbon Tokyo Seoul Nairobi Havana Ottawa"""
WORDS = """\
river stone window garden winter letter market road morning bottle candle forest mirror pencil
basket engine island jacket ladder orange piano rabbit saddle ticket tunnel valley wagon yellow
anchor bridge copper dragon falcon guitar hammer kettle lemon marble needle ocean pepper rocket
silver temple velvet walnut"""
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
CHARACTERS = 4.5
"""Of English text, for each token."""
SHOWN = 3
"""Rounds before the list whose most common word is asked for."""


class TextQuestion(NamedTuple):
    """A prompt, what the answer must contain, or, where nothing is asked, how the text goes on."""

    prompt: str
    answer: str
    continuation: str = ""


def passage(rng: random.Random, essays: str, tokens: int) -> list[str]:
    """Whole sentences of about so many tokens, from anywhere in the essays."""
    size = int(tokens * CHARACTERS)
    start = rng.randrange(len(essays) - 2 * size)
    start = essays.index(". ", start) + 2
    return essays[start : start + size].rpartition(". ")[0].split(". ")


def hidden(rng: random.Random, sentences: list[str], facts: list[str]) -> str:
    """The sentences as one text, with the facts at places of their own."""
    parts = [sentence.rstrip(".") + "." for sentence in sentences]
    for fact in facts:
        parts.insert(rng.randrange(1, len(parts)), fact)
    return " ".join(parts)


def lookup(rng: random.Random, sentences: list[str], facts: int) -> TextQuestion:
    """Numbers of some places, hidden in a text; one of them is asked for."""
    places = rng.sample(PLACES.split(), facts)
    numbers = rng.sample(range(1000, 10000), facts)
    told = [
        f"The secret number of {place} is {number}."
        for place, number in zip(places, numbers, strict=True)
    ]
    text = hidden(rng, sentences, told)
    ask = f"What is the secret number of {places[0]} mentioned in the text above?"
    return TextQuestion(SYSTEM + TURN.format(f"{text}\n\n{ask}"), str(numbers[0]))


def filler(rng: random.Random, essays: str, tokens: int) -> TextQuestion:
    """One number in a text that repeats itself."""
    del essays
    rounds = max(1, round(tokens * CHARACTERS / len(FILLER)))
    return lookup(rng, [part.strip() for part in (FILLER * rounds).split(".") if part.strip()], 1)


def needle(rng: random.Random, essays: str, tokens: int) -> TextQuestion:
    """One number in an essay."""
    return lookup(rng, passage(rng, essays, tokens), 1)


def two_needles(rng: random.Random, essays: str, tokens: int) -> TextQuestion:
    """Two numbers of two places in an essay; one is asked for."""
    return lookup(rng, passage(rng, essays, tokens), 2)


def word_list(rng: random.Random, words: list[str], length: int) -> tuple[str, str]:
    """A shuffled list of so many words, and the one that makes up a third of it."""
    common = words[0]
    others = [rng.choice(words[1:]) for _ in range(length - length // 3)]
    chosen = [common] * (length // 3) + others
    rng.shuffle(chosen)
    return " ".join(chosen), common


def common_word(rng: random.Random, essays: str, tokens: int) -> TextQuestion:
    """The most common word of a list, after three rounds that show what is wanted."""
    del essays
    words = rng.sample(WORDS.split(), len(WORDS.split()))
    ask = "List: {}\nWhich word appears most often in the list? Answer with one word."
    prompt = SYSTEM
    for number in range(SHOWN):
        text, common = word_list(rng, words[8 * number : 8 * number + 8], 21)
        prompt += TURN.format(ask.format(text)) + f"{common}<|im_end|>\n"
    length = max(30, int((tokens - len(prompt) / CHARACTERS) / 1.2))
    text, common = word_list(rng, words[8 * SHOWN :], length)
    return TextQuestion(prompt + TURN.format(ask.format(text)), common)


def running_text(rng: random.Random, essays: str, tokens: int) -> TextQuestion:
    """Part of an essay, and the sentences that follow."""
    sentences = passage(rng, essays, tokens + 100)
    cut = next(n for n in range(len(sentences)) if len(". ".join(sentences[n:])) < 100 * CHARACTERS)
    return TextQuestion(". ".join(sentences[:cut]) + ".", "", " " + ". ".join(sentences[cut:]))


TASKS: dict[str, Callable[[random.Random, str, int], TextQuestion]] = {
    "needle": needle,
    "two needles": two_needles,
    "filler": filler,
    "common word": common_word,
    "text": running_text,
}


def question(task: str, seed: int, essays: str, tokens: int) -> TextQuestion:
    """Number `seed` of a task, of about so many tokens; always the same."""
    return TASKS[task](random.Random(f"{task}-{tokens}-{seed}"), essays, tokens)
