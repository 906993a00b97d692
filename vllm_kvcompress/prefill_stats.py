# SPDX-License-Identifier: Apache-2.0
"""Statistics of all tokens of a prompt, gathered chunk by chunk. Knows tensors, not vLLM."""

from dataclasses import dataclass
from typing import Any

import torch

from vllm_kvcompress import kernels
from vllm_kvcompress.scoring import HiddenMoments, Need, QueryMoments


@dataclass
class StatsRows:
    """Prompt tokens of this step, of M requests; device tensors, int64.

    Attributes:
        entries: [M] where the requests' statistics are kept.
        tokens: [M, C] batch tokens, right-aligned; 0 where a request has fewer than C.
        lengths: [M] tokens of each.
        positions: [M] position of the first.
        counted: [M] how many of the last ones count in moments.
        block_table: [M, B] over all keys that the tokens see.
    """

    entries: torch.Tensor
    tokens: torch.Tensor
    lengths: torch.Tensor
    positions: torch.Tensor
    counted: torch.Tensor
    block_table: torch.Tensor


def bytes_per_token(
    needs: Need, *, num_heads: int, head_size: int, hidden_size: int, element_size: int
) -> int:
    """What one layer takes for a moment for each token that its statistics take in, in bytes."""
    queries, taken = num_heads * head_size, [0]
    if Need.KEY_ATTENTION_SUMS in needs:  # queries, and the log-sum-exp of each
        taken.append(queries * element_size + num_heads * 4)
    if Need.HIDDEN_MOMENTS in needs:  # as stored, and as float32
        taken.append(hidden_size * (element_size + 4) + 8)
    if Need.QUERY_MOMENTS in needs:  # what counts of them, and both factors of the product
        taken.append(queries * 3 * 4 + 8)
    return max(taken)


class PrefillStats:
    """Statistics of prompts that are being computed, or wait for their compression.

    Each layer adds its tokens of a step with the ``add`` methods. The totals of finished prompts
    are read for all layers at once.

    Args:
        num_layers: compressed layers.
        num_entries: most prompts at a time.
        max_length: of a prompt, in tokens.
        needs: what is gathered, of some prompts at least.
    """

    def __init__(self, num_layers: int, num_entries: int, max_length: int, needs: Need) -> None:
        self.num_layers, self.num_entries, self.max_length = num_layers, num_entries, max_length
        self.needs = needs
        self._stores: dict[Need, torch.Tensor] = {}
        self._last_position: torch.Tensor | None = None

    def __bool__(self) -> bool:
        return self.needs.all_rows

    def clear(self, entries: torch.Tensor) -> None:
        """Entries [M] of new prompts start at zero."""
        for store in self._stores.values():
            store[entries] = 0

    def set_positions(self, rows: StatsRows, positions: torch.Tensor) -> None:
        """Remember where the prompts end so far; ``positions`` [tokens, 1 or 3] of the batch."""
        if self._last_position is None:
            self._last_position = positions.new_zeros(self.num_entries)
        self._last_position[rows.entries] = positions[rows.tokens[:, -1]].amax(1)

    def last_positions(self, entries: torch.Tensor) -> torch.Tensor:
        """[N] int64, largest component of the last token's position."""
        assert self._last_position is not None, "positions were set while the prompts were computed"
        return self._last_position[entries]

    def add_keys(
        self,
        rows: StatsRows,
        layer: int,
        queries: torch.Tensor,
        prompts: kernels.PromptPages,
        scale: torch.Tensor,
        softcap: float,
    ) -> None:
        """Add the attention that the tokens give to every key.

        Args:
            layer: position among the compressed layers, here and below.
            queries: [tokens, Hq, D] of the batch, after norm and RoPE.
            prompts: pages of the M requests.
            scale: [M] float32.
        """
        added = kernels.key_attention_sum(
            _take(queries, rows.tokens), rows.lengths, rows.positions, prompts, scale, softcap
        )
        store = self._reserve(Need.KEY_ATTENTION_SUMS, added, added.shape[1], self.max_length)
        store[rows.entries, layer, :, : added.shape[2]] += added

    def add_hidden(self, rows: StatsRows, layer: int, hidden: torch.Tensor) -> None:
        """Add x and x^2, and keep the last x; ``hidden`` [tokens, d] is the attention input."""
        x = _take(hidden, rows.tokens).float()  # [M, C, d], ours: changed in place
        counted = self._counted(rows)[:, :, None]
        last = x[:, -1].clone()
        total = x.mul_(counted).sum(1)
        count = counted.sum(1).expand_as(total)
        added = torch.stack([total, x.square_().sum(1), count, last], 1)
        store = self._reserve(Need.HIDDEN_MOMENTS, added, *added.shape[1:])
        store[rows.entries, layer, :3] += added[:, :3]
        store[rows.entries, layer, 3] = added[:, 3]

    def add_queries(self, rows: StatsRows, layer: int, queries: torch.Tensor) -> None:
        """Add q and q q^T; ``queries`` [tokens, Hq, D] before RoPE, after their norm."""
        counted = self._counted(rows)
        chunk = _take(queries, rows.tokens).float() * counted[:, :, None, None]  # [M, C, Hq, D]
        outer = torch.einsum("mchd,mche->mhde", chunk, chunk)
        count = counted.sum(1)[:, None, None, None].expand(-1, outer.shape[1], 1, outer.shape[3])
        added = torch.cat([outer, chunk.sum(1)[:, :, None], count], 2)  # [M, Hq, D + 2, D]
        store = self._reserve(Need.QUERY_MOMENTS, added, *added.shape[1:])
        store[rows.entries, layer] += added

    def totals(self, entries: torch.Tensor, needs: Need) -> dict[str, Any]:
        """Of N finished prompts, as fields of ``LayerStack``: L * N rows, layer by layer.

        Args:
            needs: what was gathered for all of them.
        """
        found: dict[str, Any] = {}
        if Need.KEY_ATTENTION_SUMS in needs:
            found["key_attention_sum"] = self._totals(Need.KEY_ATTENTION_SUMS, entries)
        if Need.HIDDEN_MOMENTS in needs:
            total, square, count, last = (
                self._totals(Need.HIDDEN_MOMENTS, entries).flatten(0, 1).unbind(1)
            )
            found["hidden"] = HiddenMoments(count[:, 0], total, square, last)
        if Need.QUERY_MOMENTS in needs:
            total = self._totals(Need.QUERY_MOMENTS, entries).flatten(0, 1)
            found["moments"] = QueryMoments(total[:, 0, -1, 0], total[:, :, -2], total[:, :, :-2])
        return found

    def _reserve(self, need: Need, like: torch.Tensor, *shape: int) -> torch.Tensor:
        """The storage [entries, L, *shape]."""
        if need not in self._stores:
            size = (self.num_entries, self.num_layers, *shape)
            self._stores[need] = torch.zeros(size, dtype=torch.float32, device=like.device)
        return self._stores[need]

    def _totals(self, need: Need, entries: torch.Tensor) -> torch.Tensor:
        """[L, N, ...]."""
        layers = torch.arange(self.num_layers, device=entries.device)[:, None]
        return self._stores[need][entries, layers]

    def _counted(self, rows: StatsRows) -> torch.Tensor:
        """[M, C] float32, 1 for tokens that count in moments."""
        back = torch.arange(rows.tokens.shape[1], 0, -1, device=rows.tokens.device)
        return (back <= rows.counted[:, None]).float()


def _take(rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """A copy of the rows of tokens [M, C], [M, C, ...]. Whole rows are copied: indexing with a
    tensor copies element by element on the CPU."""
    return rows.index_select(0, tokens.flatten()).unflatten(0, tokens.shape)
