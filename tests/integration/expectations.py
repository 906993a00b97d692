# SPDX-License-Identifier: Apache-2.0
"""What the oracle expects of requests under any settings, and how an engine is held against it."""

import copy
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from engine import Answer, assert_same
from every_method import (
    BLOCK_SIZE,
    OUTPUT_TOKENS,
    PIXELS_PER_TOKEN,
    Raw,
    Request,
    Served,
    checkpoint,
    mixed_requests,
)
from float_noise import MARGIN, measured_tolerance
from head_pages import assert_unshared, positions_of
from oracle import Oracle, OracleConfig, Prompt, Selection, merged_entries, select
from oracle.allocators import head_tokens, layer_capacities
from oracle.config import budget_of
from oracle.scorers import Scored, score_layers
from oracle_settings import oracle_settings
from tiny_models import TOKENIZER

from vllm_kvcompress.config import KVCompressionConfig

CEILING = 1e-4
"""No tolerance of entries and scores is above it, relative to the largest of a head."""


@functools.cache
def logprob_tolerance() -> float:
    """For the model and the requests of ``every_method``."""
    prompts = [request.prompt for request in mixed_requests()]
    return measured_tolerance(
        checkpoint(),
        prompts,
        limit_mm_per_prompt={"image": 2, "video": 0},
        # vLLM's engines share rotary embeddings, and with them the hooks of the engines under test,
        # whose buffers hold the tokens of one step
        max_num_batched_tokens=64,
    )


class PatientOracle(Oracle):
    """Computes the prefill of each request once, for any number of settings."""

    def __init__(self, model_dir: str) -> None:
        super().__init__(model_dir)
        self._prefills: dict[tuple[int, ...], tuple[Any, Prompt]] = {}
        self._selection: Selection | None = None

    def _prefill(self, inputs):
        ids = tuple(inputs["input_ids"][0].tolist())
        if ids not in self._prefills:
            self._prefills[ids] = super()._prefill(inputs)
        self._evicted = None
        result, prompt = self._prefills[ids]
        return copy.deepcopy(result), prompt  # decoding appends to the cache

    @functools.cache  # noqa: B019, one instance per run of the tests
    def token_ids(self, request: Request) -> tuple[int, ...]:
        """Of the prompt, one placeholder per visual token."""
        ids: list[int] = []
        images = iter(request.images)
        for token in TOKENIZER.encode(request.text).ids:
            count = 1
            if token == TOKENIZER.token_to_id("<|image_pad|>"):
                image = next(images)
                count = image.width * image.height // PIXELS_PER_TOKEN**2
            ids += [token] * count
        return tuple(ids)

    @functools.cache  # noqa: B019
    def prompt_of(self, request: Request) -> Prompt:
        return self.prompt(self.token_ids(request), list(request.images) or None)

    def select(self, prompt: Prompt, cfg: OracleConfig) -> Selection:
        assert self._selection is not None
        return self._selection

    def answer(self, request: Request, cfg: OracleConfig, selection: Selection) -> Answer:
        """Greedy output of the request when its heads keep this."""
        self._selection = selection
        images = list(request.images) or None
        output = self.generate(self.token_ids(request), OUTPUT_TOKENS, cfg, images)
        return Answer(output.token_ids, output.logprobs)


def oracle_config(raw: Raw) -> OracleConfig:
    """The same settings for the oracle."""
    return oracle_settings(KVCompressionConfig.parse(raw), BLOCK_SIZE)


@dataclass(frozen=True)
class Expected:
    """What the oracle says of one request.

    Attributes:
        selection: positions, pages and bins.
        keys, values: [L][Hkv] arrays [kv_len, D], what stands in the pages, in their order.
        answer: greedy output.
    """

    selection: Selection
    keys: list[list[np.ndarray]]
    values: list[list[np.ndarray]]
    answer: Answer


class Reference:
    """The oracle's expectations, computed once for each of the settings."""

    def __init__(self) -> None:
        self.oracle = PatientOracle(checkpoint())
        self._expected: dict[str, list[Expected]] = {}

    def expected(self, raw: Raw, requests: Sequence[Request]) -> list[Expected]:
        key = json.dumps(raw, sort_keys=True)
        if key not in self._expected:
            cfg = oracle_config(raw)
            self._expected[key] = [self._expect(request, cfg) for request in requests]
        return self._expected[key]

    def _expect(self, request: Request, cfg: OracleConfig) -> Expected:
        prompt = self.oracle.prompt_of(request)
        selection = select(prompt, cfg)
        keys, values = contents(prompt, selection, cfg)
        return Expected(selection, keys, values, self.oracle.answer(request, cfg, selection))

    def check(self, raw: Raw, requests: Sequence[Request], served: Sequence[Served]) -> None:
        """Pages, what they hold, and the answers equal the oracle's."""
        cfg, expected = oracle_config(raw), self.expected(raw, requests)
        tolerance = measured_noise(served, expected)
        for index, (request, got, want) in enumerate(zip(requests, served, expected, strict=True)):
            try:
                assert_unshared(got.held)
                assert_pages(got, want.selection)
                answer = want.answer
                if cfg.merge == "none" or not want.selection.plan.compressed:
                    kept = positions_of(got.held, self.oracle.prompt_of(request).k)
                    if self.near_ties(request, cfg, kept, want.selection, tolerance):
                        selection = want.selection._replace(kept=kept)
                        prompt = self.oracle.prompt_of(request)
                        keys, values = contents(prompt, selection, cfg)
                        answer = self.oracle.answer(request, cfg, selection)
                        want = Expected(selection, keys, values, answer)
                assert_entries(got.held.keys, want.keys, "key", tolerance)
                assert_entries(got.held.values, want.values, "value", tolerance)
                assert_same([got.answer], [answer], logprob_tolerance())
            except AssertionError as error:
                raise AssertionError(f"request {index}: {error}") from error

    def near_ties(
        self,
        request: Request,
        cfg: OracleConfig,
        got: list[list[np.ndarray]],
        want: Selection,
        tolerance: float,
    ) -> bool:
        """Whether sets differ at all; fails unless all differences lie at the boundary's score.

        Args:
            tolerance: relative gap of scores that this machine may order differently.
        """
        differs = False
        for layer, heads in enumerate(want.kept):
            for head, positions in enumerate(heads):
                if got[layer][head].tolist() == positions.tolist():
                    continue
                differs = True
                where = f"layer {layer} head {head}"
                extra = np.setdiff1d(got[layer][head], positions)
                lost = np.setdiff1d(positions, got[layer][head])
                message = f"{where} keeps {extra.tolist()} instead of {lost.tolist()}"
                assert len(extra) == len(lost) > 0, f"{message}, or in another order"
                scores = self._scores(request, cfg)[layer].final[head]
                disputed = scores[np.concatenate([extra, lost])]
                spread = disputed.max() - disputed.min()
                assert spread <= tolerance * np.abs(disputed).max(), f"{message}: {disputed}"
        return differs

    def _scores(self, request: Request, cfg: OracleConfig) -> list[Scored]:
        prompt = self.oracle.prompt_of(request)
        budget = budget_of(prompt.visual, cfg)
        capacities = layer_capacities(prompt.num_layers, budget, cfg)
        return score_layers(prompt, cfg, budget.recent, capacities)

    def ideal_blocks(self, raw: Raw, request: Request) -> float:
        """Blocks that the tokens which the method means to keep would fill without rounding."""
        cfg, prompt = oracle_config(raw), self.oracle.prompt_of(request)
        budget, scores = budget_of(prompt.visual, cfg), self._scores(request, cfg)
        return float(np.mean(head_tokens(prompt, budget, scores, cfg))) / BLOCK_SIZE


def contents(
    prompt: Prompt, selection: Selection, cfg: OracleConfig
) -> tuple[list[list[np.ndarray]], list[list[np.ndarray]]]:
    """Keys and values [L][Hkv] of [kv_len, D] in page order: full blocks, bins, tail."""
    blocks_end = prompt.length - selection.plan.tail
    merged = merged_entries(prompt, selection, cfg)
    keys: list[list[np.ndarray]] = []
    values: list[list[np.ndarray]] = []
    for layer, heads in enumerate(selection.kept):
        keys.append([])
        values.append([])
        for head, positions in enumerate(heads):
            inside, tail = positions[positions < blocks_end], positions[positions >= blocks_end]
            entries = merged[layer][head] if merged else None
            for cached, out, part in (
                (prompt.k[layer, head], keys, "keys"),
                (prompt.v[layer, head], values, "values"),
            ):
                rows, bins = cached[inside].astype(np.float64), cached[:0]
                if entries is not None and cfg.merge == "recycle":
                    bins = getattr(entries, part)
                elif entries is not None:
                    rows[np.searchsorted(inside, entries.positions)] = getattr(entries, part)
                out[-1].append(np.concatenate([rows, bins, cached[tail]]))
    return keys, values


def assert_pages(got: Served, selection: Selection) -> None:
    """Every head has its pages; together they fill the blocks that the request holds."""
    plan = selection.plan
    tail_pages = -(-plan.tail // BLOCK_SIZE)
    pages = [[len(ids) - tail_pages for ids in heads] for heads in got.held.page_ids]
    assert pages == selection.pages, f"pages {pages}, expected {selection.pages}"
    blocks = plan.uniform if plan.compressed else plan.full
    assert got.kept_blocks == blocks, f"{got.kept_blocks} blocks, expected {blocks}"
    heads = [count for layer in pages for count in layer]
    assert sum(heads) == blocks * len(heads), "pages that no head owns"


def measured_noise(served: Sequence[Served], expected: Sequence[Expected]) -> float:
    """What keys, values and what is computed from them may differ by on this machine.

    Measured on the tails of the prompts, which every head keeps as they are, whatever it scored.
    """
    errors = []
    for got, want in zip(served, expected, strict=True):
        tail = want.selection.plan.tail
        for found, rows in ((got.held.keys, want.keys), (got.held.values, want.values)):
            for ours, theirs in zip(chain(*found), chain(*rows), strict=True):
                error = np.abs(ours[len(ours) - tail :] - theirs[len(theirs) - tail :])
                errors.append(error.max(initial=0.0) / np.abs(theirs).max())
    assert max(errors) > 0, "no request has a tail"
    return min(MARGIN * float(max(errors)), CEILING)


def assert_entries(
    got: list[list[np.ndarray]], want: list[list[np.ndarray]], what: str, tolerance: float
) -> None:
    """Entries [L][Hkv] of [kv_len, D] are equal up to the tolerance, relative to the largest."""
    for layer, heads in enumerate(want):
        for head, rows in enumerate(heads):
            found = got[layer][head]
            assert found.shape == rows.shape, f"layer {layer} head {head}: {found.shape}"
            error = np.abs(found - rows).max(axis=1) / np.abs(rows).max()
            wrong = np.flatnonzero(~(error <= tolerance))
            assert not len(wrong), (
                f"layer {layer} head {head}: {what}s at {wrong.tolist()} of {len(rows)} differ by "
                f"up to {error.max():.2e}"
            )
