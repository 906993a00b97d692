# SPDX-License-Identifier: Apache-2.0
"""What the user asked for: parsing and every check that needs no engine."""

import dataclasses
import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_kvcompress.allocation import ALLOCATORS, Allocator
from vllm_kvcompress.scoring import SCORERS, Scorer

CONFIG_KEY = "kv_compression"
"""Key of the compression settings inside vLLM's ``additional_config``."""


METRICS_DIR_VARIABLE = "KVCOMPRESS_METRICS_DIR"
"""Environment variable that tells the processes of a server where they count; set by the first."""


def metrics_dir() -> str | None:
    return os.environ.get(METRICS_DIR_VARIABLE)


def set_metrics_dir(path: str) -> None:
    """Make ``path`` known to this process and to those it starts."""
    os.environ[METRICS_DIR_VARIABLE] = path


class KVCompressionError(ValueError):
    """The compression settings, or what they are combined with, cannot be served."""

    @classmethod
    def from_reasons(cls, reasons: list[str]) -> "KVCompressionError":
        """One message that lists every reason, so that one restart is enough."""
        lines = "\n".join(f"  - {reason}" for reason in reasons)
        return cls(f"KV compression cannot start:\n{lines}")


def _suggest(word: str, valid: list[str]) -> str:
    """``; did you mean 'x'?`` for the nearest valid word, and the list of all of them."""
    near = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{hint} Valid: {', '.join(valid)}."


@dataclass(frozen=True)
class Budget:
    """How many prompt tokens a KV head keeps on average, observation window included.

    Exactly one of the two is set: a number of tokens, or a ratio of the prompt length in (0, 1].
    """

    tokens: int | None = None
    ratio: float | None = None

    @classmethod
    def parse(cls, value: "int | float | str | Budget") -> "Budget":
        """Read ``128``, ``"128"``, ``"10%"`` or ``0.1``.

        Raises:
            ValueError: neither a positive whole number of tokens nor a ratio in (0, 100%].
        """
        expected = f"a budget is a positive number of tokens or a ratio such as 10%, got {value!r}"
        if isinstance(value, Budget):
            return value
        if isinstance(value, bool):
            raise ValueError(expected)
        text = str(value).strip()
        try:
            if isinstance(value, float):
                ratio = value
            elif text.endswith("%"):
                ratio = float(text[:-1]) / 100
            elif "." in text:
                ratio = float(text)
            else:
                tokens = int(text)
                if tokens <= 0:
                    raise ValueError(expected)
                return cls(tokens=tokens)
        except ValueError as error:
            raise ValueError(expected) from error
        if not 0 < ratio <= 1:
            raise ValueError(expected)
        return cls(ratio=ratio)

    def __str__(self) -> str:
        return str(self.tokens) if self.ratio is None else f"{100 * self.ratio:g}%"


@dataclass(frozen=True)
class KVCompressionConfig:
    """The validated settings; serialises to plain JSON and back without loss.

    Attributes:
        scorer: name in :data:`vllm_kvcompress.scoring.SCORERS`.
        allocator: name in :data:`vllm_kvcompress.allocation.ALLOCATORS`.
        budget: prompt tokens per KV head, window included.
        window: length W of the observation window; its tokens are always kept.
        scorer_options, allocator_options: overrides of the method's own defaults.
    """

    scorer: str
    allocator: str = "uniform"
    budget: Budget = Budget(tokens=128)
    window: int = 32
    scorer_options: Mapping[str, Any] = field(default_factory=dict)
    allocator_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def method(self) -> str:
        return f"{self.scorer}+{self.allocator}"

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> "KVCompressionConfig":
        """Build from the user's mapping.

        Keys: ``method`` ("scorer" or "scorer+allocator"), ``budget``, ``window``, and any option
        of the chosen scorer or allocator by its own name (see ``vllm-kvcompress methods``).

        Raises:
            KVCompressionError: lists every unknown name and bad value at once.
        """
        reasons: list[str] = []
        raw = dict(raw)
        method = raw.pop("method", None)
        if not isinstance(method, str) or not method:
            raise KVCompressionError.from_reasons(
                ['\'method\' is missing: give a scorer, for example {"method": "bacon"}.']
            )
        scorer, _, allocator = method.partition("+")
        allocator = allocator or "uniform"
        if scorer not in SCORERS:
            reasons.append(f"unknown scorer {scorer!r}.{_suggest(scorer, sorted(SCORERS))}")
        if allocator not in ALLOCATORS:
            reasons.append(
                f"unknown allocator {allocator!r}.{_suggest(allocator, sorted(ALLOCATORS))}"
            )
        budget = cls.budget
        if "budget" in raw:
            try:
                budget = Budget.parse(raw.pop("budget"))
            except ValueError as error:
                reasons.append(f"--kv-budget: {error}.")
        window = raw.pop("window", cls.window)
        if isinstance(window, str) and window.isdecimal():
            window = int(window)
        if not isinstance(window, int) or isinstance(window, bool) or window < 1:
            reasons.append(f"--kv-window: expected a whole number of tokens >= 1, got {window!r}.")
        elif budget.tokens is not None and budget.tokens <= window:
            reasons.append(
                f"--kv-budget {budget} includes the window, so it must be larger than "
                f"--kv-window {window}: raise the budget to at least {window + 1} or lower the "
                "window."
            )
        if reasons:  # options can only be checked against methods that exist
            raise KVCompressionError.from_reasons(reasons)

        scorer_options = _take_options(raw, SCORERS[scorer], reasons)
        allocator_options = _take_options(raw, ALLOCATORS[allocator], reasons)
        valid = ["method", "budget", "window"]
        valid += _option_names(SCORERS[scorer]) + _option_names(ALLOCATORS[allocator])
        reasons += [f"unknown key {key!r} for {method}.{_suggest(key, valid)}" for key in raw]
        if reasons:
            raise KVCompressionError.from_reasons(reasons)
        return cls(scorer, allocator, budget, window, scorer_options, allocator_options)

    def to_json(self) -> dict[str, Any]:
        """The mapping that :meth:`parse` reads back to an equal object."""
        return {
            "method": self.method,
            "budget": self.budget.tokens if self.budget.ratio is None else self.budget.ratio,
            "window": self.window,
            **self.scorer_options,
            **self.allocator_options,
        }

    def make_scorer(self) -> Scorer:
        return SCORERS[self.scorer](**self.scorer_options)

    def make_allocator(self) -> Allocator:
        return ALLOCATORS[self.allocator](**self.allocator_options)


def _option_names(method: type[Scorer] | type[Allocator]) -> list[str]:
    return [f.name for f in dataclasses.fields(method)]


def _take_options(
    raw: dict[str, Any], method: type[Scorer] | type[Allocator], reasons: list[str]
) -> dict[str, Any]:
    """Move the options of ``method`` out of ``raw`` and let the method check them."""
    options = {name: raw.pop(name) for name in _option_names(method) if name in raw}
    try:
        method(**options)
    except (TypeError, ValueError) as error:
        reasons.append(f"{method.name}: {error}.")
    return options


def parse_cli_json(text: str) -> dict[str, Any]:
    """Read ``--kv-compression-config``.

    Raises:
        KVCompressionError: not a JSON object.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise KVCompressionError(f"--kv-compression-config is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise KVCompressionError(
            f'--kv-compression-config must be a JSON object such as {{"mode": "rel"}}, got {text}.'
        )
    return value
