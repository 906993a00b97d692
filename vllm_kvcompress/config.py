# SPDX-License-Identifier: Apache-2.0
"""What the user asked for: parsing and every check that needs no engine."""

import dataclasses
import difflib
import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_kvcompress.allocation import ALLOCATORS, Allocator, Scope
from vllm_kvcompress.budget import Budget, Candidates
from vllm_kvcompress.merging import MERGES, Merge
from vllm_kvcompress.policy import ALWAYS, When
from vllm_kvcompress.presets import PRESETS
from vllm_kvcompress.prompt import MAX_INSTRUCTION_LEN
from vllm_kvcompress.registry import (
    Method,
    classes_of,
    option_names,
    suggest,
    unknown,
)
from vllm_kvcompress.registry import load as load_outside_methods
from vllm_kvcompress.scoring import SCORERS, Need, Scorer

CONFIG_KEY = "kv_compression"
"""Key of the compression config inside vLLM's ``additional_config``."""

SERVER_DIR_VARIABLE = "KVCOMPRESS_SERVER_DIR"
"""Environment variable that tells the processes of a server what folder they share; set by the
first."""


def server_dir() -> str | None:
    return os.environ.get(SERVER_DIR_VARIABLE)


def set_server_dir(path: str) -> None:
    """Make ``path`` known to this process and to those it starts."""
    os.environ[SERVER_DIR_VARIABLE] = path


def metrics_dir() -> str | None:
    """Where processes count: among vLLM's own counters if several processes share those."""
    return os.environ.get("PROMETHEUS_MULTIPROC_DIR") or server_dir()


DEFAULT_BUDGET = Budget(tokens=128)

OFF = "off"
"""What a request asks for that does not want its prompt compressed."""

ALLOWED_WORDS = (OFF, "budget", "window", "when")
"""What requests may be allowed to choose, beside methods."""

NOTHING = "nothing"
"""Stands alone for no choice at all."""


class KVCompressionError(ValueError):
    """The compression config, or what they are combined with, cannot be served."""

    @classmethod
    def from_reasons(cls, reasons: list[str]) -> "KVCompressionError":
        """One message that lists every reason, so that one restart is enough."""
        lines = "\n".join(f"  - {reason}" for reason in reasons)
        return cls(f"KV compression cannot start:\n{lines}")


@dataclass(frozen=True)
class KVCompressionConfig:
    """The validated config; hashable, and travels as plain JSON.

    Attributes:
        scorer: name in :data:`vllm_kvcompress.scoring.SCORERS`.
        allocator: name in :data:`vllm_kvcompress.allocation.ALLOCATORS`.
        merge: name in :data:`vllm_kvcompress.merging.MERGES`, or "none".
        budget: prompt tokens per KV head, window included; of the visual tokens, where only these
            compete.
        window: length W of the observation window.
        candidates: which tokens compete.
        when: policy of compression.
        workspace_mib: MiB per worker for what requests keep until they are compressed, and as many
            for temporaries of one compression.
        allow: what requests may choose for themselves: words of ALLOWED_WORDS, and methods as
            ``parse`` takes them.
        options: of the three methods, by name; a name that two of them have goes to both.
    """

    scorer: str
    allocator: str = "uniform"
    merge: str = "none"
    budget: Budget = DEFAULT_BUDGET
    window: int = 32
    candidates: Candidates = Candidates.ALL
    when: When = ALWAYS
    workspace_mib: int = 512
    allow: tuple[str, ...] = (OFF, "budget")
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def method(self) -> str:
        parts = [self.scorer, self.allocator, self.merge]
        return "+".join(parts[:2] if self.merge == "none" else parts)

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> "KVCompressionConfig":
        """Build from the user's mapping.

        Keys: ``method`` (a preset, or "scorer", "scorer+allocator", "scorer+allocator+merge"),
        ``budget``, ``window``, ``candidates``, and any option of the chosen methods by its own name
        (see ``vllm-kvcompress methods``).

        Raises:
            KVCompressionError: lists every unknown name and bad value at once.
        """
        reasons = list(load_outside_methods())
        method = raw.get("method")
        if not isinstance(method, str) or not method:
            missing = "no method: set --kv-compression METHOD, for example bacon, or "
            missing += '{"method": "bacon"} in additional_config.'
            raise KVCompressionError.from_reasons([missing])
        preset = PRESETS[method].settings if method in PRESETS else {"method": method}
        raw = {**preset, **raw, "method": preset["method"]}
        names = _take_names(str(raw.pop("method")), reasons)
        budget, window = _take_sizes(raw, reasons)
        when, workspace_mib = _take_serving(raw, reasons)
        allow = _take_allow(raw, reasons)
        if reasons:  # options can only be checked against methods that exist
            raise KVCompressionError.from_reasons(reasons)

        scorer, allocator, merge = names[:3]
        methods = classes_of(scorer, allocator, merge)
        default = Candidates.VISUAL if SCORERS[scorer].visual_only else Candidates.ALL
        candidates = _take_candidates(raw, default, reasons)
        options = _take_options(raw, methods, reasons)
        valid = ["method", "budget", "window", "candidates", "when", "workspace_mib", "allow"]
        valid += [name for m in methods for name in option_names(m)]
        chosen = "+".join(names[:2] if merge == "none" else names[:3])
        reasons += [f"unknown key {key!r} for {chosen}.{suggest(key, valid)}" for key in raw]
        if not reasons:
            chosen_by_all = (budget, window, candidates, when, workspace_mib, allow)
            config = cls(scorer, allocator, merge, *chosen_by_all, options)
            if config.scoring.text_first:
                config = dataclasses.replace(config, candidates=Candidates.AFTER_TEXT)
            reasons += [*_combination_reasons(config), *_size_reasons(config)]
        if reasons:
            raise KVCompressionError.from_reasons(reasons)
        return config

    def to_json(self) -> dict[str, Any]:
        """The mapping that :meth:`parse` reads back to an equal object."""
        candidates = {"candidates": self.candidates.value}
        return {
            "method": f"{self.scorer}+{self.allocator}+{self.merge}",
            "budget": self.budget.tokens if self.budget.ratio is None else self.budget.ratio,
            "window": self.window,
            "when": str(self.when),
            "workspace_mib": self.workspace_mib,
            "allow": [*self.allow] or NOTHING,
            **({} if self.candidates is Candidates.AFTER_TEXT else candidates),
            **self.options,
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return _read, (json.dumps(self.to_json()),)

    @property
    def tokens_per_head(self) -> int | None:
        """What a KV head keeps; None where that depends on the prompt."""
        return None if self.candidates is Candidates.VISUAL else self.budget.tokens

    @functools.cached_property
    def scoring(self) -> Scorer:
        return SCORERS[self.scorer](**self._options_of(SCORERS[self.scorer]))

    @functools.cached_property
    def allocation(self) -> Allocator:
        return ALLOCATORS[self.allocator](**self._options_of(ALLOCATORS[self.allocator]))

    @functools.cached_property
    def merging(self) -> Merge | None:
        if self.merge == "none":
            return None
        return MERGES[self.merge](**self._options_of(MERGES[self.merge]))

    @functools.cached_property
    def needs(self) -> Need:
        """Of scorer, allocator and merge together."""
        needs = self.scoring.needs | self.allocation.needs
        merge = self.merging
        return needs | Need.SEGMENTS if merge is not None and merge.needs_segments else needs

    @functools.cached_property
    def operation(self) -> "KVCompressionConfig":
        """Without what only plans depend on: prompts of equal operations go into one call."""
        return dataclasses.replace(self, budget=KVCompressionConfig.budget, when=ALWAYS)

    @property
    def copy_bytes(self) -> int:
        """Bound on what is copied at a time of what prompts keep."""
        return (self.workspace_mib << 20) // 4

    @property
    def spans_layers(self) -> bool:
        """Head pages of one layer may serve another."""
        return self.allocation.scope.spans_layers

    @property
    def max_rows(self) -> int:
        """Most last rows of a prompt whose queries are looked at."""
        return max(
            self.window, MAX_INSTRUCTION_LEN if Need.INSTRUCTION_QUERIES in self.needs else 1
        )

    def _options_of(self, method: type[Method]) -> dict[str, Any]:
        return {name: self.options[name] for name in option_names(method) if name in self.options}


@functools.lru_cache(maxsize=1 << 10)  # each request of a tensor-parallel engine brings its own
def _read(text: str) -> KVCompressionConfig:
    return KVCompressionConfig.parse(json.loads(text))


def method_names(method: str) -> list[str]:
    """Scorer, allocator and merge of a preset or a method string, known or not."""
    names = str(PRESETS[method].settings["method"] if method in PRESETS else method).split("+")
    return [*names, *("uniform", "none")[len(names) - 1 :]]


def is_method(method: str) -> bool:
    """Whether it names methods that exist, whether or not they can be combined."""
    reasons: list[str] = []
    _take_names(method, reasons)
    return not reasons


def _take_names(method: str, reasons: list[str]) -> list[str]:
    """``method_names`` of a method that exists."""
    names = method_names(method)
    tables = ([*SCORERS], [*ALLOCATORS], ["none", *MERGES])
    if len(names) > len(tables):
        reasons.append(f"method {method!r} has too many parts: give SCORER+ALLOCATOR+MERGE.")
    for kind, table, name in zip(("scorer", "allocator", "merge"), tables, names, strict=False):
        if name not in table:
            reasons.append(unknown(kind, name, table, stands_alone="+" not in method))
    return names


def _take_allow(raw: dict[str, Any], reasons: list[str]) -> tuple[str, ...]:
    """Move ``allow`` out of ``raw``: a list, or a text with commas; each entry once."""
    value = raw.pop("allow", KVCompressionConfig.allow)
    entries = value.split(",") if isinstance(value, str) else value
    if not isinstance(entries, list | tuple) or not all(isinstance(e, str) for e in entries):
        expected = f"{', '.join(ALLOWED_WORDS)}, methods and presets, or {NOTHING} alone"
        reasons.append(f"--kv-compression-allow: expected some of {expected}, got {value!r}.")
        return ()
    entries = [entry.strip() for entry in entries]
    if entries == [NOTHING]:
        return ()
    for entry in entries:
        found: list[str] = []
        if entry not in ALLOWED_WORDS:
            _take_names(entry, found)
        words = difflib.get_close_matches(entry, ALLOWED_WORDS, n=1) if found else []
        hint = f" Or did you mean {words[0]!r}?" if words else ""
        reasons += [f"--kv-compression-allow: {reason}{hint}" for reason in found]
    return tuple(dict.fromkeys(entries))


def _take_sizes(raw: dict[str, Any], reasons: list[str]) -> tuple[Budget, int]:
    """Move budget and window out of ``raw``."""
    budget, window = KVCompressionConfig.budget, raw.pop("window", KVCompressionConfig.window)
    if "budget" in raw:
        try:
            budget = Budget.parse(raw.pop("budget"))
        except ValueError as error:
            reasons.append(f"--kv-budget: {error}.")
    if isinstance(window, str) and window.isdecimal():
        window = int(window)
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        reasons.append(f"--kv-window: expected a whole number of tokens >= 1, got {window!r}.")
    return budget, window


def _take_serving(raw: dict[str, Any], reasons: list[str]) -> tuple[When, int]:
    """Move policy and workspace out of ``raw``."""
    when = ALWAYS
    try:
        when = When.parse(raw.pop("when", when))
    except ValueError as error:
        reasons.append(f"--kv-compression-when: {error}.")
    size = raw.pop("workspace_mib", KVCompressionConfig.workspace_mib)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        reasons.append(f"workspace_mib: expected a whole number of MiB >= 1, got {size!r}.")
        size = KVCompressionConfig.workspace_mib
    return when, size


def _take_candidates(raw: dict[str, Any], default: Candidates, reasons: list[str]) -> Candidates:
    """Move ``candidates`` out of ``raw``."""
    value = raw.pop("candidates", default.value)
    allowed = [Candidates.ALL.value, Candidates.VISUAL.value]
    if value not in allowed:
        reasons.append(f"candidates must be one of {', '.join(allowed)}, got {value!r}.")
        return default
    return Candidates(value)


def _take_options(
    raw: dict[str, Any], methods: list[type[Method]], reasons: list[str]
) -> dict[str, Any]:
    """Move the options of the methods out of ``raw`` and let each method check its own."""
    taken: dict[str, Any] = {}
    for method in methods:
        options = {name: raw[name] for name in option_names(method) if name in raw}
        try:
            method(**options)
        except (TypeError, ValueError) as error:
            reasons.append(f"{method.name}: {error}.")
        taken.update(options)
    for name in taken:
        del raw[name]
    return taken


def _size_reasons(config: KVCompressionConfig) -> list[str]:
    """Budget and window that do not go together."""
    budget, window = config.budget, config.window
    if config.candidates is Candidates.VISUAL or budget.tokens is None or budget.tokens > window:
        return []
    return [
        f"--kv-budget {budget} includes the window, so it must be larger than --kv-window "
        f"{window}: raise the budget to at least {window + 1} or lower the window."
    ]


def _combination_reasons(config: KVCompressionConfig) -> list[str]:
    """Methods that do not go together."""
    scorer, allocator, merge = config.scoring, config.allocation, config.merging
    shared = " or ".join(name for name, cls in SCORERS.items() if cls.shared_sets)
    lenient = " or ".join(
        name for name, cls in MERGES.items() if not (cls.needs_shared_sets or cls.needs_weights)
    )
    checks = (
        (allocator.scope is Scope.LAYER and not scorer.countable,
         f"{config.scorer} has no scores that {config.allocator} could count across heads: use "
         "another allocator, such as uniform"),
        (not allocator.per_layer and scorer.shared_sets,
         f"{config.scorer} keeps the same tokens for all heads of a layer, so {config.allocator} "
         "cannot give heads different budgets: use another allocator, such as uniform"),
        (merge is not None and merge.needs_shared_sets and not scorer.shared_sets,
         f"merge {config.merge} joins dropped tokens to neighbours that all heads keep: use scorer "
         f"{shared}, or merge {lenient}"),
        (merge is not None and merge.needs_weights and not scorer.weighs,
         f"merge {config.merge} weighs dropped tokens by their scores, and those of "
         f"{config.scorer} are no weights: use another scorer, or merge {lenient}"),
        (config.candidates is Candidates.VISUAL and scorer.ranks_text_first,
         'text_hard_cap lets text compete: set "candidates": "all"'),
        (config.candidates is Candidates.ALL and not scorer.scores_text,
         f'{config.scorer} scores visual tokens only: set "candidates": "visual"'),
    )  # fmt: skip
    return [reason + "." for refused, reason in checks if refused]


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
