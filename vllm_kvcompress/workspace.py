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
    """Bytes that are alive at the peak of a call.

    Attributes:
        per_row: of every row that is worked on at the same time.
        per_prompt: of every prompt, however many of its layers are worked on at the same time.
    """

    per_row: int
    per_prompt: int

    def bytes(self, num_layers: int, num_prompts: int) -> int:
        """What so many layers of so many prompts take together."""
        return num_prompts * (self.per_prompt + num_layers * self.per_row)

    def split(self, limit: int, num_layers: int, num_prompts: int) -> tuple[int, int]:
        """How many layers and prompts go together; at least one, whatever the limit."""
        prompts = limit // self.bytes(num_layers, 1)
        if prompts:
            return num_layers, min(prompts, num_prompts)
        layers = (limit - self.per_prompt) // self.per_row
        return min(max(layers, 1), num_layers), 1
