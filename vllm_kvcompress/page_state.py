# SPDX-License-Identifier: Apache-2.0
"""Which head pages each request holds, and the page tables made of that."""

import torch

from vllm_kvcompress import kernels
from vllm_kvcompress.kernels import HeldPages

MOST_IDS = 1 << 26
"""Of the tables of all layers together: 256 MiB. One layer's tables may be larger."""


class HeadPageState:
    """Head pages of all requests, on the device, indexed by request slot.

    Slot ``num_slots`` belongs to nobody: it stands for requests without compression and for padding
    rows. It has num_full_blocks 0, num_kept_blocks 1 and page_count 0, which makes a table that of
    the request's blocks. What other slots hold means nothing until a request is compressed.

    Attributes:
        num_full_blocks, num_kept_blocks: [S + 1] int32, m and n of the request's prompt.
        page_count, page_start: [L, S + 1, Hkv] int32; L is 1 when all layers are alike.
    """

    def __init__(
        self, num_slots: int, num_layers: int, num_kv_heads: int, device: torch.device
    ) -> None:
        self.num_slots = num_slots
        self._blocks = torch.zeros((2, num_slots + 1), dtype=torch.int32, device=device)
        self._blocks[1] = 1
        self.num_full_blocks, self.num_kept_blocks = self._blocks
        shape = (2, num_layers, num_slots + 1, num_kv_heads)
        self._pages = torch.zeros(shape, dtype=torch.int32, device=device)
        self.page_count, self.page_start = self._pages

    def store(
        self,
        slots: torch.Tensor,
        num_full_blocks: torch.Tensor,
        num_kept_blocks: torch.Tensor,
        page_count: torch.Tensor,
        page_start: torch.Tensor,
    ) -> None:
        """Store the pages per head [N, L, Hkv] of N compressed requests.

        Pages are numbered over all layers, see ``kernels.write_pages``; where all layers are alike
        the first one's pages serve them all.
        """
        self._blocks[:, slots] = torch.stack([num_full_blocks, num_kept_blocks]).int()
        pages = torch.stack([page_count, page_start])[:, :, : len(self.page_count)]
        self._pages[:, :, slots] = pages.transpose(1, 2).int()


class PageTables:
    """Page tables of a decode step, at addresses that stay: full graphs read them there.

    A step's tables follow one another without gaps, so that those of a few requests have room for
    more layers than those of many.

    Args:
        state: what the tables are made of; one layer's tables serve all layers that are alike.
        width: blocks of the longest request.
    """

    def __init__(self, state: HeadPageState, width: int, block_size: int) -> None:
        self.state, self.width, self.block_size = state, width, block_size
        self.num_layers, _, self.num_kv_heads = state.page_count.shape
        device = state.page_count.device
        num_seqs = state.num_slots * self.num_kv_heads
        num_ids = table_ids(num_seqs, width, self.num_layers)
        # zeros: ids past a table's length have to be ids of some page
        self._ids = torch.zeros(num_ids, dtype=torch.int32, device=device)
        self._kv_len = torch.zeros(self.num_layers * num_seqs, dtype=torch.int32, device=device)

    def layers_at_once(self, num_rows: int) -> int:
        """Layers whose tables of so many requests have room here together."""
        return min(len(self._ids) // (num_rows * self.num_kv_heads * self.width), self.num_layers)

    def fill(
        self,
        slots: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        layer: int,
        num_layers: int,
        layer_pages: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Make tables [L, R * Hkv, width] and kv_len [L, R * Hkv] of the per-head batch.

        They stand until the next call. See ``kernels.head_page_tables``.

        Args:
            layer, num_layers: the first of the layers, and L.
        """
        num_seqs, layers = len(slots) * self.num_kv_heads, slice(layer, layer + num_layers)
        ids = self._ids[: num_layers * num_seqs * self.width]
        table = ids.view(num_layers, num_seqs, self.width)
        kv_len = self._kv_len[: num_layers * num_seqs].view(num_layers, num_seqs)
        held = HeldPages(
            slots,
            self.state.num_full_blocks,
            self.state.num_kept_blocks,
            self.state.page_count[layers],
            self.state.page_start[layers],
            layer,
            layer_pages,
        )
        kernels.head_page_tables(table, kv_len, block_table, seq_lens, held, self.block_size)
        return table, kv_len


def table_ids(num_seqs: int, width: int, num_layers: int) -> int:
    """Ids that there is room for: one layer's tables at least, those of all layers at most."""
    one = num_seqs * width
    return max(one, min(num_layers * one, MOST_IDS))


def page_starts(count: torch.Tensor) -> torch.Tensor:
    """Number of each entry's first page among those of its group. ``count`` [N, X]."""
    return count.cumsum(1) - count
