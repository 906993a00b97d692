# SPDX-License-Identifier: Apache-2.0
"""How much of a prompt stays, and which of its tokens compete for that."""

import enum
from dataclasses import dataclass
from fractions import Fraction


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
                ratio = float(f"{text[:-1].strip()}e-2")
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

    @property
    def exact_ratio(self) -> Fraction:
        """The ratio as it was written: 7 % of 1100 tokens are 77, not a little more."""
        assert self.ratio is not None, "a budget has tokens or a ratio"
        return Fraction(str(self.ratio))

    def __str__(self) -> str:
        return str(self.tokens) if self.ratio is None else f"{100 * self.ratio:g}%"


class Candidates(enum.Enum):
    """Which prompt tokens compete for the budget; all others are kept."""

    ALL = "all"
    VISUAL = "visual"
    AFTER_TEXT = "after text"
    """Visual tokens, for what the text leaves of the budget (LOOK-M's text prior)."""
