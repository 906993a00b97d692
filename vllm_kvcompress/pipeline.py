# SPDX-License-Identifier: Apache-2.0
"""Score, allocate, select and compact, for all prompts that end in a step.

Knows tensors, not vLLM.
"""

from dataclasses import dataclass, field

import torch

from vllm_kvcompress import kernels
from vllm_kvcompress.allocation import Allocator, pages_from_tokens
from vllm_kvcompress.scoring import LayerContext, LayerTrace, Scorer


class HeadPageState:
    """Which head pages each request holds, on the device, indexed by request slot.

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

    def set_pages(self, layer: int, slots: torch.Tensor, count: torch.Tensor) -> None:
        """Store the pages per head [N, Hkv] of one layer."""
        self.page_count[layer, slots] = count.int()
        self.page_start[layer, slots] = page_starts(count).int()

    def tables(
        self,
        layer: int,
        slots: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        block_size: int,
        width: int,
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
        )


def page_starts(count: torch.Tensor) -> torch.Tensor:
    """Number of each head's first page among its layer's pages. ``count`` [N, Hkv]."""
    return count.cumsum(1) - count


@dataclass
class EndingPrompts:
    """The N compressing requests whose prompt ends in this step. Device tensors, int64.

    Attributes:
        slots, prompt_lens, capacity, num_full_blocks, num_kept_blocks, tail: [N].
        block_table: [N, B] with B = ceil(longest prompt / block_size).
        max_pages: bound on any head's pages, known to the host.
        trace: what layers of this step leave for later layers.
    """

    slots: torch.Tensor
    prompt_lens: torch.Tensor
    capacity: torch.Tensor
    num_full_blocks: torch.Tensor
    num_kept_blocks: torch.Tensor
    tail: torch.Tensor
    block_table: torch.Tensor
    max_pages: int
    trace: LayerTrace = field(default_factory=LayerTrace)


class CompressionPipeline:
    """Compresses one layer of all ending prompts at a time.

    Args:
        scorer, allocator: the methods.
        window: W.
        layout: where a head page keeps its elements.
        state: receives the pages of every head.
    """

    def __init__(
        self,
        scorer: Scorer,
        allocator: Allocator,
        window: int,
        layout: kernels.PageLayout,
        state: HeadPageState,
    ) -> None:
        self.scorer = scorer
        self.allocator = allocator
        self.window = window
        self.layout = layout
        self.state = state

    def compress(
        self,
        batch: EndingPrompts,
        row: int,
        layer: int,
        queries: torch.Tensor,
        pages: torch.Tensor,
        num_kv_heads: int,
        scale: float,
        softcap: float,
    ) -> torch.Tensor:
        """Compress one layer in place.

        Args:
            row: row of the layer in the state, 0 when all layers are alike.
            layer: index of the layer in the model.
            queries: [N, W, Hq, D] of positions P-W .. P-1.
            pages: [num_pages, block_size * 2 * D] head pages of the layer.

        Returns:
            [N, Hkv] int64, pages per head.
        """
        block_size = self.layout.block_size
        prompts = kernels.PromptPages(pages, batch.block_table, num_kv_heads, self.layout)
        scores = self.scorer.score(
            LayerContext(
                layer=layer,
                prompt_lens=batch.prompt_lens,
                capacity=batch.capacity,
                window=self.window,
                window_queries=queries,
                prompts=prompts,
                scale=scale,
                softcap=softcap,
                trace=batch.trace,
            )
        )
        if self.allocator.even:
            count = batch.num_kept_blocks[:, None].expand(-1, num_kv_heads)
        else:
            tokens = self.allocator.allocate(
                scores.base, batch.prompt_lens - self.window, batch.capacity
            )
            count = pages_from_tokens(
                tokens,
                self.window,
                batch.tail,
                batch.num_kept_blocks,
                batch.num_full_blocks,
                block_size,
            )
            self.state.set_pages(row, batch.slots, count)
        in_pages = batch.num_full_blocks * block_size
        kept = kernels.select_tokens(
            scores.final,
            count * block_size,
            num_candidates=torch.minimum(in_pages, batch.prompt_lens - self.window),
            pinned_end=in_pages,
            max_count=batch.max_pages * block_size,
        )
        kernels.compact_pages(
            prompts,
            kept,
            count,
            page_starts(count),
            batch.num_full_blocks,
            batch.num_kept_blocks,
        )
        return count
