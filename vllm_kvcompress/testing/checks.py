# SPDX-License-Identifier: Apache-2.0
"""What no scorer may do, whatever it scores; each check raises AssertionError."""

import copy
import dataclasses
import inspect
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_kvcompress.scoring import LayerTrace, Need, Scorer, Scores, ScoringContext
from vllm_kvcompress.testing.inputs import Prompt, context, random_prompt, together

WINDOW = 8
RAGGED = (
    random_prompt(0, 23, images=((2, 7), (7, 12))),
    random_prompt(1, 70, images=((1, 20), (25, 35), (40, 50))),  # 20 rows of instruction
    random_prompt(2, 41),
    random_prompt(8, 12, images=((0, 2),)),  # shorter than that
)
"""Prompts of unlike lengths."""


def num_meaningful(scorer: Scorer, length: int) -> int:
    """Positions below which every score counts."""
    return length - max(1, scorer.num_recent(WINDOW, 12))


def _require(fine: object, fault: str) -> None:
    if not fine:
        raise AssertionError(fault)


def _of_layer(scorer: Scorer, *prompts: Prompt, layer: int = 0, **how: Any) -> ScoringContext:
    return context(list(prompts), layer, scorer, how.pop("trace", None) or LayerTrace(), **how)


def describes_itself(scorer: Scorer) -> None:
    """It has a name, a source, a cost and a docstring, from which lists and pages are made."""
    for attribute in ("name", "source", "cost"):
        _require(vars(type(scorer)).get(attribute), f"the class has no {attribute} of its own")
    _require(inspect.getdoc(type(scorer)), "the class has no docstring")
    _require(isinstance(scorer.needs, Need), "needs is no Need")


def travels_to_workers(scorer: Scorer) -> None:
    """Equal copies are equal, hashable and pickled: configurations travel between processes."""
    fields = {field.name: getattr(scorer, field.name) for field in dataclasses.fields(scorer)}
    try:
        sent = pickle.loads(pickle.dumps(scorer))
    except (AttributeError, TypeError, pickle.PicklingError) as error:
        raise AssertionError(f"it cannot be pickled: {error}") from error
    for twin in (copy.deepcopy(scorer), sent, type(scorer)(**fields)):
        _require(twin == scorer and hash(twin) == hash(scorer), f"{twin} is not equal to {scorer}")
        _require(twin.needs == scorer.needs, "a copy has other needs")


def returns_float32_for_every_group_size(scorer: Scorer) -> None:
    """[R, Hkv, T] float32, whatever the numbers of heads."""
    for num_q, num_kv in ((2, 2), (6, 2), (3, 1)):
        prompt = random_prompt(3, 30, ((2, 9), (9, 18)), num_q=num_q, num_kv=num_kv)
        for part in scorer.score(_of_layer(scorer, prompt)):
            _require(
                part.shape == (1, num_kv, 30) and part.dtype == torch.float32,
                f"scores are {list(part.shape)} {part.dtype}, not [1, {num_kv}, 30] float32",
            )


def scores_rows_alone(scorer: Scorer) -> None:
    """A batch equals batches of one, layer after layer."""
    both, alone = LayerTrace(), [LayerTrace() for _ in RAGGED]
    for layer in range(2):
        batch = scorer.score(_of_layer(scorer, *RAGGED, layer=layer, trace=both))
        for i, prompt in enumerate(RAGGED):
            one = scorer.score(_of_layer(scorer, prompt, layer=layer, trace=alone[i]))
            end = num_meaningful(scorer, prompt.length)
            for got, want in zip(batch, one, strict=True):
                _require(not want[..., :end].isnan().any(), "a score is NaN")
                torch.testing.assert_close(got[i, :, :end], want[0, :, :end], rtol=1e-5, atol=1e-7)


def scores_layers_alone(scorer: Scorer) -> None:
    """Layers together equal layers alone, whatever the groups and whether they rotate alike."""
    prompts = [
        random_prompt(10, 70, ((1, 20), (25, 35)), layers=4),
        random_prompt(11, 41, layers=4),
    ]
    trace = LayerTrace()
    alone = [
        scorer.score(_of_layer(scorer, *prompts, layer=layer, trace=trace)) for layer in range(4)
    ]
    for groups in ([4], [1, 3]):
        whole = together([_of_layer(scorer, *prompts, layer=layer) for layer in range(4)])
        vars(whole.projector)["shared"] = len(groups) == 1
        edges = [0, *itertools.accumulate(groups)]
        parts = [scorer.score(whole.of_layers(*edge)) for edge in itertools.pairwise(edges)]
        for part in Scores._fields:
            found = torch.cat([getattr(scores, part) for scores in parts])
            wanted = torch.cat([getattr(scores, part) for scores in alone])
            for i, prompt in enumerate(prompts):
                end = num_meaningful(scorer, prompt.length)
                _require(
                    found[i::2, :, :end].equal(wanted[i::2, :, :end]),
                    f"{part} depends on which layers are scored together ({groups})",
                )


def ignores_what_follows_a_prompt(scorer: Scorer) -> None:
    """Memory after a prompt holds anything, NaN included."""
    first, *others = (
        scorer.score(_of_layer(scorer, *RAGGED, garbage=garbage))
        for garbage in (0.0, float("nan"), float("inf"), -3e38)
    )
    for i, prompt in enumerate(RAGGED):
        end = num_meaningful(scorer, prompt.length)
        for other in others:
            for part in Scores._fields:
                _require(
                    getattr(other, part)[i, :, :end].equal(getattr(first, part)[i, :, :end]),
                    f"{part} depends on what stands after the prompt",
                )


def survives_plain_prompts(scorer: Scorer) -> None:
    """Nothing divides by zero where all keys and values are equal, or 0."""
    for value in (0.5, 0.0):
        prompt = random_prompt(5, 40, ((2, 9), (9, 18)))
        parts = (prompt.k, prompt.v, prompt.hidden)
        for part in (*parts, prompt.q, prompt.raw) if not value else parts:
            part[:] = value
        trace = LayerTrace()
        for layer in range(2):
            scores = scorer.score(_of_layer(scorer, prompt, layer=layer, trace=trace))
            _require(not scores.final[..., :32].isnan().any(), f"NaN where all is {value}")
            if value:
                _require(scores.base[..., :32].isfinite().all(), f"infinite where all is {value}")


def keeps_its_promises(scorer: Scorer) -> None:
    """``countable``, ``never_negative``, ``shared_sets``."""
    scores = scorer.score(_of_layer(scorer, RAGGED[1]))
    base, final = scores.base[..., :62], scores.final[0, :, :62]
    if scorer.countable:
        _require(base.isfinite().all() and base.ge(0).all(), "countable, but not finite and >= 0")
    if scorer.never_negative:
        _require(final.ge(0).all(), "never_negative, but a score is")
    if scorer.shared_sets:
        _require(final[0].equal(final[1]), "shared_sets, but heads have scores of their own")


def computes_in_float32(scorer: Scorer) -> None:
    """Inputs of 16 bits are not computed with in 16 bits."""

    def rounded(dtype: torch.dtype) -> torch.Tensor:
        ctx = _of_layer(scorer, RAGGED[0])
        pages = ctx.prompts.pages.bfloat16().to(dtype)
        queries = ctx.queries.bfloat16().to(dtype)
        prompts = ctx.prompts._replace(pages=pages)
        return scorer.score(dataclasses.replace(ctx, queries=queries, prompts=prompts)).final

    low, high = rounded(torch.bfloat16), rounded(torch.float32)
    end = num_meaningful(scorer, RAGGED[0].length)
    _require(low[..., :end].equal(high[..., :end]), "bfloat16 inputs give other scores")


def reads_only_what_it_needs(scorer: Scorer) -> None:
    """A context without what ``needs`` does not name is enough."""
    ctx = _of_layer(scorer, *RAGGED)
    optional = {
        Need.SEGMENTS: "segment",
        Need.INSTRUCTION_QUERIES: "instruction_len",
        Need.KEY_ATTENTION_SUMS: "key_attention_sum",
        Need.HIDDEN_MOMENTS: "hidden",
        Need.QUERY_MOMENTS: "moments",
    }
    absent: dict[str, Any] = {
        name: None for need, name in optional.items() if not scorer.needs & need
    }
    lean = dataclasses.replace(ctx, **absent, trace=LayerTrace())
    if not scorer.needs & (Need.HIDDEN_MOMENTS | Need.QUERY_MOMENTS):
        lean.projector = None
    if not scorer.needs & Need.INSTRUCTION_QUERIES:
        lean.queries = lean.queries[:, -WINDOW:]
    if not scorer.needs & (Need.INSTRUCTION_QUERIES | Need.WINDOW_QUERIES):
        lean.queries = lean.queries[:, -1 if scorer.needs & Need.LAST_QUERY else WINDOW :]
    for need, part in ((Need.KEYS, "keys"), (Need.VALUES, "values")):
        if not scorer.needs & need:
            vars(lean)[part] = None  # shadows the property
    try:
        scorer.score(lean)
    except (AssertionError, AttributeError, IndexError, TypeError) as error:
        raise AssertionError(f"it reads something that needs does not name: {error}") from error


def keeps_heads_apart(scorer: Scorer) -> None:
    """A NaN in one head's keys leaves the other heads alone."""
    if scorer.shared_sets:  # one ranking for all heads
        return
    prompt = random_prompt(7, 40, ((2, 9), (9, 18)))
    spoiled = dataclasses.replace(prompt, k=prompt.k.copy())
    spoiled.k[0, 1, 3] = float("nan")
    whole, other = (scorer.score(_of_layer(scorer, p)).final[0, 0, :32] for p in (prompt, spoiled))
    _require(whole.equal(other), "a NaN in one head changes another head")


def never_waits_for_the_device(scorer: Scorer) -> None:
    """No value travels to the host."""
    ctx = _of_layer(scorer, *RAGGED)
    with _NoWaiting():
        scorer.score(ctx)


class _NoWaiting(TorchDispatchMode):
    """Refuses operations that a GPU would have to finish first."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(
            isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
            for index in args[1]
        )
        _require(
            name not in ("_local_scalar_dense", "nonzero", "masked_select") and not by_mask,
            f"{name} makes the host wait for the device",
        )
        return func(*args, **(kwargs or {}))


CHECKS: tuple[Callable[[Scorer], None], ...] = (
    describes_itself,
    travels_to_workers,
    returns_float32_for_every_group_size,
    scores_rows_alone,
    scores_layers_alone,
    ignores_what_follows_a_prompt,
    survives_plain_prompts,
    keeps_its_promises,
    computes_in_float32,
    reads_only_what_it_needs,
    keeps_heads_apart,
    never_waits_for_the_device,
)
"""In the order in which a fault is easiest to find."""
