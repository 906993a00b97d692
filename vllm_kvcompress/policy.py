# SPDX-License-Identifier: Apache-2.0
"""When finished prompts are compressed."""

import enum
from dataclasses import dataclass


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

    def __str__(self) -> str:
        return "always" if self.mark is None else f"pressure:{self.mark}"


ALWAYS = When()
