# SPDX-License-Identifier: Apache-2.0
"""What a request may choose for itself, and the config that follows from its choice.

A request names its wishes by the keys of ``KEYS``, in ``vllm_xargs`` of an HTTP request or in
``SamplingParams.extra_args``.
"""

import difflib
import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from vllm_kvcompress.budget import Budget, Candidates
from vllm_kvcompress.config import (
    ALLOWED_WORDS,
    OFF,
    KVCompressionConfig,
    KVCompressionError,
    is_method,
    method_names,
)
from vllm_kvcompress.policy import When
from vllm_kvcompress.presets import PRESETS
from vllm_kvcompress.registry import suggest
from vllm_kvcompress.scoring import Need

METHOD, BUDGET, WINDOW, WHEN = KEYS = (
    "kv_compression",
    "kv_budget",
    "kv_window",
    "kv_compression_when",
)
"""Keys of a request's wishes."""

FOREIGN_KEYS = ("kv_transfer_params", "kv_cache_report_mode")
"""vLLM's own among the keys that begin like ours."""

WITHOUT_COMPRESSION = (
    "this server was started without --kv-compression, so requests cannot choose it: leave the "
    "key out, or start the server with that flag"
)


class RequestError(ValueError):
    """A request asks for what it cannot have; the text goes to whoever sent it.

    Attributes:
        key: of the wish.
    """

    def __init__(self, key: str, text: str) -> None:
        super().__init__(text)
        self.key = key


class RequestSettings(NamedTuple):
    """How one request is served.

    Attributes:
        config: of its prompt. A request without compression has a budget of 100 %, which no
            prompt exceeds: its blocks and its prefix-cache hits are those of stock vLLM.
        off: it asked for no compression.
        asked: it asked for anything at all.
    """

    config: KVCompressionConfig
    off: bool = False
    asked: bool = False

    @property
    def label(self) -> str:
        """Its method, or "off"."""
        return OFF if self.off else self.config.method


def wishes(extra_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """The wishes among a request's extra arguments.

    Raises:
        RequestError: a key that looks like one of ours is none.
    """
    if not extra_args:
        return {}
    for key in extra_args:
        if key in KEYS or key in FOREIGN_KEYS:
            continue
        near = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.85)
        if near or key.startswith("kv_"):
            raise RequestError(key, f"unknown key {key!r}.{suggest(key, [*KEYS])}")
    return {key: extra_args[key] for key in KEYS if extra_args.get(key) is not None}


@dataclass(frozen=True)
class Choices:
    """What the requests of an engine may choose.

    Attributes:
        own: the engine's config, for requests that ask for nothing.
        others: further methods that requests may choose, by the names they were allowed by.
        block_size: tokens of a block as attention kernels see it, the least budget.
    """

    own: KVCompressionConfig
    others: tuple[tuple[str, KVCompressionConfig], ...]
    block_size: int

    @classmethod
    @functools.lru_cache(maxsize=1 << 8)
    def of(cls, config: KVCompressionConfig, block_size: int) -> "Choices":
        """
        Raises:
            KVCompressionError: a method that requests may choose cannot run with its defaults.
        """
        reasons: list[str] = []
        others: dict[str, KVCompressionConfig] = {}
        for name in config.allow:
            if name in ALLOWED_WORDS or method_names(name) == _parts(config):
                continue
            settings = {
                "method": name,
                "window": config.window,
                "when": config.when,
                "workspace_mib": config.workspace_mib,
                "allow": config.allow,
            }
            if name not in PRESETS or "budget" not in PRESETS[name].settings:
                settings["budget"] = config.budget
            try:
                others[name] = KVCompressionConfig.parse(settings)
            except KVCompressionError as error:
                reason = " ".join(str(error).split("\n  - ")[1:])
                reasons.append(f"--kv-compression-allow {name}: {reason}")
        if reasons:
            raise KVCompressionError.from_reasons(reasons)
        return cls(config, tuple(others.items()), block_size)

    @property
    def configs(self) -> tuple[KVCompressionConfig, ...]:
        """Of every method that a request can have."""
        return (self.own, *(config for _, config in self.others))

    @functools.cached_property
    def needs(self) -> Need:
        """Of all methods together."""
        return functools.reduce(lambda needs, config: needs | config.needs, self.configs, Need(0))

    @functools.cached_property
    def max_rows(self) -> int:
        """Most last rows of a prompt whose queries any method looks at."""
        return max(config.max_rows for config in self.configs)

    @functools.cached_property
    def labels(self) -> tuple[str, ...]:
        """All that ``RequestSettings.label`` can be."""
        return tuple(dict.fromkeys([*(config.method for config in self.configs), OFF]))

    def settings(self, extra_args: Mapping[str, Any] | None) -> RequestSettings:
        """What a request gets.

        Raises:
            RequestError: names the wish that cannot be had, and the nearest value that can.
        """
        asked = wishes(extra_args)
        if not asked:
            return RequestSettings(self.own)
        for key, value in asked.items():
            if not isinstance(value, str | int | float):
                raise RequestError(key, f"{key}: expected a text or a number, got {value!r}.")
        return _settings(self, **asked)

    # parts of it

    def _config(self, value: Any) -> KVCompressionConfig | None:
        """Of the method that a request names; None for no compression."""
        name = str(value).strip()
        if name == OFF and OFF in self.own.allow:
            return None
        if name == OFF:
            raise self._closed(METHOD, OFF, self.own.method)
        parts, others = method_names(name), dict(self.others)
        if parts == _parts(self.own):
            return self.own
        if name in others:
            return others[name]
        for config in others.values():
            if parts == _parts(config):
                return config
        valid = [*self.labels[:-1], *others, *(preset for preset in PRESETS if self._has(preset))]
        if OFF in self.own.allow:
            valid.append(OFF)
        valid = [*dict.fromkeys(valid)]
        nearest = [*difflib.get_close_matches(name, valid, n=1, cutoff=0.5), self.own.method][0]
        text = f"{METHOD}: {name!r} is not among what requests may choose here. Nearest valid "
        text += f"value: {nearest}. Valid: {', '.join(valid)}."
        if is_method(name):
            text += f" {self._advice(name)}"
        raise RequestError(METHOD, text)

    def _has(self, preset: str) -> bool:
        return any(method_names(preset) == _parts(config) for config in self.configs)

    def _budget(self, value: Any, config: KVCompressionConfig) -> Budget:
        least = 1
        if config.candidates is not Candidates.VISUAL:
            least = max(self.block_size, config.window + 1)
        try:
            budget = Budget.parse(value)
        except ValueError as error:
            nearest = nearest_budget(value, least, config.budget)
            raise RequestError(
                BUDGET, f"{BUDGET}: {error}. Nearest valid value: {nearest}."
            ) from error
        if budget not in (self.own.budget, config.budget) and "budget" not in self.own.allow:
            raise self._closed(BUDGET, "budget", self.own.budget)
        if budget.tokens is not None and budget.tokens < least:
            raise RequestError(
                BUDGET,
                f"{BUDGET}: {budget} tokens are less than one block ({self.block_size}) or not "
                f"more than the window ({config.window}). Nearest valid value: {least}.",
            )
        return budget

    def _window(self, value: Any) -> int:
        most, text = self.own.window, str(value).strip()
        window = int(text) if text.isdecimal() and len(text) < 20 else None
        if window is None or not 1 <= window <= most:
            nearest = nearest_window(value, most)
            raise RequestError(
                WINDOW,
                f"{WINDOW}: expected a whole number of tokens from 1 to {most}, the window that "
                f"the server was started with, got {value!r}. Nearest valid value: {nearest}.",
            )
        if window != most and "window" not in self.own.allow:
            raise self._closed(WINDOW, "window", most)
        return window

    def _when(self, value: Any) -> When:
        try:
            when = When.parse(value)
        except ValueError as error:
            nearest = nearest_policy(value)
            raise RequestError(WHEN, f"{WHEN}: {error}. Nearest valid value: {nearest}.") from error
        if when != self.own.when and "when" not in self.own.allow:
            raise self._closed(WHEN, "when", self.own.when)
        return when

    def _closed(self, key: str, word: str, value: object) -> RequestError:
        """Requests may not choose this at all."""
        text = f"{key}: requests may not choose this here. Nearest valid value: {value}."
        return RequestError(key, f"{text} {self._advice(word)}")

    def _advice(self, word: str) -> str:
        allow = ",".join([*self.own.allow, word])
        return f"The server would have to be started with --kv-compression-allow {allow}."


@functools.lru_cache(maxsize=1 << 10, typed=True)  # 64 tokens are no share of 64.0
def _settings(choices: Choices, **asked: str | int | float) -> RequestSettings:
    config = choices.own
    if METHOD in asked:
        chosen = choices._config(asked[METHOD])
        if chosen is None:
            for key in KEYS[1:]:
                if key in asked:
                    raise RequestError(key, f"{key} means nothing with {METHOD} off: leave it out.")
            return RequestSettings(replace(config, budget=Budget(ratio=1.0)), off=True, asked=True)
        config = chosen
    if WINDOW in asked:
        config = replace(config, window=choices._window(asked[WINDOW]))
    if BUDGET in asked:
        config = replace(config, budget=choices._budget(asked[BUDGET], config))
    if WHEN in asked:
        config = replace(config, when=choices._when(asked[WHEN]))
    return RequestSettings(config, asked=True)


def _parts(config: KVCompressionConfig) -> list[str]:
    return [config.scorer, config.allocator, config.merge]


def nearest_budget(value: Any, least: int, default: Budget) -> Budget:
    """The valid budget next to one that is none; ``least`` tokens are valid."""
    text = str(value).strip()
    number = _number(text.removesuffix("%"))
    if number is None:
        return default
    if text.endswith("%") or (isinstance(value, float) and number < 1):
        share = number / 100 if text.endswith("%") else number
        return Budget(ratio=min(max(share, 0.01), 1.0))
    return Budget(tokens=max(least, min(round(number), 1 << 31)))


def nearest_window(value: Any, most: int) -> int:
    """The valid window next to what is none."""
    number = _number(str(value))
    return most if number is None else min(max(round(number), 1), most)


def nearest_policy(value: Any) -> When:
    """The valid policy next to what is none."""
    name, _, mark = str(value).strip().partition(":")
    if not difflib.get_close_matches(name, ["pressure"]):
        return When()
    number = _number(mark)
    return When.parse("pressure") if number is None else When(min(max(number, 0.01), 0.99))


def _number(text: str) -> float | None:
    """None unless the text is a finite number."""
    try:
        number = float(text)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) < float("inf") else None
