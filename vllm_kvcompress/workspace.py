# SPDX-License-Identifier: Apache-2.0
"""How much memory one call of the pipeline takes, and how it is split to stay below a bound."""

from typing import NamedTuple

DEFAULT_BYTES = 1 << 28


class RowShape(NamedTuple):
    """Sizes of one row, a (layer, prompt) pair.

    Methods count what they hold at their peak in float32 elements of such sizes. What a kernel
    needs inside itself is not counted.
    """

    length: int
    num_q_heads: int
    num_kv_heads: int
    head_size: int
    num_queries: int
    hidden_size: int = 0

    @property
    def scores(self) -> int:
        """Elements of [Hkv, T]."""
        return self.num_kv_heads * self.length

    @property
    def logits(self) -> int:
        """Elements of [Hq, T]."""
        return self.num_q_heads * self.length

    @property
    def keys(self) -> int:
        """Elements of [Hkv, T, D]."""
        return self.num_kv_heads * self.length * self.head_size


class Workspace(NamedTuple):
    """Bytes that are alive in a call, which scores first and then selects and copies.

    Attributes:
        scoring, selecting: of every row that is worked on at the same time.
        held: of every prompt from its scores to the end.
        staged: of every prompt while it is copied, however many of its layers are.
    """

    scoring: int
    selecting: int
    held: int
    staged: int

    def bytes(self, num_layers: int, num_prompts: int) -> int:
        """What so many layers of so many prompts take at their peak."""
        rows = max(num_layers * self.scoring, self.staged + num_layers * self.selecting)
        return num_prompts * (self.held + rows)

    def split(self, limit: int, num_layers: int, num_prompts: int) -> tuple[int, int]:
        """How many layers and prompts go together; at least one, whatever the limit."""
        prompts = limit // self.bytes(num_layers, 1)
        if prompts:
            return num_layers, min(prompts, num_prompts)
        room = limit - self.held
        layers = min(room // self.scoring, (room - self.staged) // self.selecting)
        return min(max(layers, 1), num_layers), 1
