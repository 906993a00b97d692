# SPDX-License-Identifier: Apache-2.0
"""Which head pages each request holds, and the page tables made of that."""

import torch

from vllm_kvcompress import kernels
from vllm_kvcompress.kernels import HeldPages

MOST_IDS = 1 << 26
"""Of the tables of all layers together: 256 MiB. One layer's tables may be larger."""


class HeadPageState:
    """Head pages of all requests, on the device, indexed by request slot.

    Slot ``num_slots`` belongs to nobody: padding rows point there. A slot without compression has
    num_full_blocks 0, num_kept_blocks 1 and page_count 0, which makes its table the natural one.

    Attributes:
        num_full_blocks, num_kept_blocks: [S + 1] int32, m and n of the request's prompt.
        page_count, page_start: [L, S + 1, Hkv] int32; L is 1 when all layers are alike.
    """

    def __init__(
        self, num_slots: int, num_layers: int, num_kv_heads: int, device: torch.device
    ) -> None:
        self.num_slots = num_slots
        self.num_full_blocks = torch.zeros(num_slots + 1, dtype=torch.int32, device=device)
        self.num_kept_blocks = torch.ones(num_slots + 1, dtype=torch.int32, device=device)
        shape = (num_layers, num_slots + 1, num_kv_heads)
        self.page_count = torch.zeros(shape, dtype=torch.int32, device=device)
        self.page_start = torch.zeros(shape, dtype=torch.int32, device=device)

    def begin(
        self, slots: torch.Tensor, num_full: torch.Tensor, num_kept: torch.Tensor, even: bool
    ) -> None:
        """Set what the plan knows of N requests; uncompressed: ``num_full`` 0, ``num_kept`` 1.

        With an even budget that includes the pages, so that tables for the step in which a prompt
        ends can be made before its layers run. Otherwise pages follow layer by layer.
        """
        self.num_full_blocks[slots] = num_full.int()
        self.num_kept_blocks[slots] = num_kept.int()
        pages = num_kept * (num_full > 0) if even else torch.zeros_like(num_kept)
        count = pages[:, None].expand(-1, self.page_count.shape[2])
        self.page_count[:, slots] = count.int()
        self.page_start[:, slots] = page_starts(count).int()

    def set_pages(
        self, layer: int, slots: torch.Tensor, count: torch.Tensor, start: torch.Tensor
    ) -> None:
        """Store the pages per head [N, Hkv] of one layer."""
        self.page_count[layer, slots] = count.int()
        self.page_start[layer, slots] = start.int()

    def set_all_pages(self, slots: torch.Tensor, count: torch.Tensor, start: torch.Tensor) -> None:
        """Store the pages per head [N, L, Hkv] of all layers."""
        self.page_count[:, slots] = count.transpose(0, 1).int()
        self.page_start[:, slots] = start.transpose(0, 1).int()


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
        one, every = num_seqs * width, self.num_layers * num_seqs * width
        # zeros: ids past a table's length have to be ids of some page
        self._ids = torch.zeros(max(one, min(every, MOST_IDS)), dtype=torch.int32, device=device)
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
        """Make tables [L, R * Hkv, width] and kv_len [L, R * Hkv] of the virtual sequences.

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


def page_starts(count: torch.Tensor) -> torch.Tensor:
    """Number of each entry's first page among those of its group. ``count`` [N, X]."""
    return count.cumsum(1) - count
