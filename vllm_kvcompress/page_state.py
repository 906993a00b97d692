# SPDX-License-Identifier: Apache-2.0
"""Which head pages each request holds."""

import torch

from vllm_kvcompress import kernels


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

    def tables(
        self,
        layer: int,
        slots: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        block_size: int,
        width: int,
        layer_pages: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Page tables and kv_len of the rows' virtual sequences: ``kernels.head_page_tables``."""
        return kernels.head_page_tables(
            block_table,
            seq_lens,
            self.num_full_blocks[slots],
            self.num_kept_blocks[slots],
            self.page_count[layer, slots],
            self.page_start[layer, slots],
            block_size,
            width,
            layer,
            layer_pages,
        )


def page_starts(count: torch.Tensor) -> torch.Tensor:
    """Number of each entry's first page among those of its group. ``count`` [N, X]."""
    return count.cumsum(1) - count
