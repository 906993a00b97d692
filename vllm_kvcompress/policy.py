# SPDX-License-Identifier: Apache-2.0
"""When finished prompts are compressed."""

import collections
import enum
from dataclasses import dataclass
from typing import Generic, TypeVar


class Outcome(enum.Enum):
    """Why a prompt was compressed when it was."""

    AT_ONCE = "at_once"
    PRESSURE = "pressure"
    INSTEAD_OF_PREEMPTION = "instead_of_preemption"


DEFAULT_MARK = 0.8


@dataclass(frozen=True)
class When:
    """The policy of ``--kv-compression-when``.

    Attributes:
        mark: share of the block pool above which prompts are compressed, in (0, 1); None compresses
            every prompt at the first step boundary after its last token.
    """

    mark: float | None = None

    @classmethod
    def parse(cls, value: "str | When") -> "When":
        """Read ``always``, ``pressure`` or ``pressure:0.8``.

        Raises:
            ValueError: neither of them, or a mark outside (0, 1).
        """
        if isinstance(value, When):
            return value
        expected = f"expected always, pressure or pressure:MARK with 0 < MARK < 1, got {value!r}"
        if not isinstance(value, str):
            raise ValueError(expected)
        name, _, mark = value.strip().partition(":")
        if name == "always" and ":" not in value:
            return cls()
        if name != "pressure":
            raise ValueError(expected)
        if ":" not in value:
            return cls(DEFAULT_MARK)
        try:
            number = float(mark)
        except ValueError as error:
            raise ValueError(expected) from error
        if not 0 < number < 1:
            raise ValueError(expected)
        return cls(number)

    @property
    def always(self) -> bool:
        return self.mark is None

    def wants(self, usage: float) -> bool:
        """Whether prompts are compressed because the pool is used so far."""
        return self.mark is not None and usage > self.mark

    def __str__(self) -> str:
        return "always" if self.mark is None else f"pressure:{self.mark}"


ALWAYS = When()

Prompt = TypeVar("Prompt")


class WaitingQueue(Generic[Prompt]):
    """Prompts that wait for their compression, each with the policy of its request."""

    def __init__(self) -> None:
        self._prompts: dict[str, tuple[Prompt, When]] = {}
        self._expected: dict[str, Prompt] = {}
        self._returning: set[str] = set()
        self._marks: collections.Counter[float] = collections.Counter()

    def add(self, req_id: str, prompt: Prompt, when: When, returns: bool) -> None:
        """``returns``: the request comes back from a preemption, after it was compressed."""
        self.discard(req_id)
        self._prompts[req_id] = prompt, when
        if when.mark is None or returns:
            self._expected[req_id] = prompt
        if when.mark is not None:
            self._marks[when.mark] += 1
        if returns:
            self._returning.add(req_id)

    def discard(self, req_id: str) -> None:
        """The prompt waits no longer, if it did."""
        _, when = self._prompts.pop(req_id, (None, ALWAYS))
        self._expected.pop(req_id, None)
        self._returning.discard(req_id)
        if when.mark is not None:
            self._marks[when.mark] -= 1
            if not self._marks[when.mark]:
                del self._marks[when.mark]

    def prompts(self) -> list[Prompt]:
        return [prompt for prompt, _ in self._prompts.values()]

    def expected(self) -> list[tuple[str, Prompt]]:
        """Those that are compressed as soon as they can be, by id."""
        return list(self._expected.items())

    @property
    def any_returning(self) -> bool:
        return bool(self._returning)

    @property
    def lowest_mark(self) -> float:
        """Usage of the pool up to which no policy wants anything."""
        return min(self._marks, default=1.0)
