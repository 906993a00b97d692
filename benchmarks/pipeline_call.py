# SPDX-License-Identifier: Apache-2.0
"""One call of the compression pipeline, as a worker makes it, on tensors of any device."""

import math
from typing import NamedTuple

import torch

from vllm_kvcompress.budget import Candidates
from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.kernels import PageLayout
from vllm_kvcompress.page_state import HeadPageState
from vllm_kvcompress.pipeline import (
    CompressionPipeline,
    FinishedPrefills,
    LayerStack,
    PromptBatch,
)
from vllm_kvcompress.plan import BlockPlanner, PromptPlan
from vllm_kvcompress.prompt import PromptFacts
from vllm_kvcompress.scoring import Need

BLOCK_SIZE = 16
PREFIX_LEN, INSTRUCTION_LEN = 16, 64
"""Text tokens before and after the image that the rest of every prompt is."""


class Sizes(NamedTuple):
    """``num`` prompts of ``length`` tokens in all layers of a model."""

    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_size: int
    length: int
    num: int
    budget: int


def _width(count: int) -> int:
    """Of the widest image of so many tokens that is not wider than it is high."""
    return max(width for width in range(1, math.isqrt(count) + 1) if count % width == 0)


class PipelineCall:
    """Compresses the same made-up prompts again and again; their pages are random.

    Args:
        method: as users name it.
        sizes: of model and prompts.
        device: "meta" allocates nothing.
        pages: [L * N * B * Hkv, block_size * 2 * D] of all layers; None: made here, bfloat16.
        workspace_bytes: bound of the pipeline; None: as an engine has it.
    """

    def __init__(
        self,
        method: str,
        sizes: Sizes,
        device: torch.device,
        pages: torch.Tensor | None = None,
        workspace_bytes: int | None = None,
    ) -> None:
        settings: dict[str, object] = {"method": method}
        if "%" not in str(KVCompressionConfig.parse(settings).budget):
            settings["budget"] = sizes.budget
        self.config = KVCompressionConfig.parse(settings)
        self.sizes, self.device = sizes, device
        image = (PREFIX_LEN, sizes.length - INSTRUCTION_LEN)
        facts = PromptFacts(sizes.length, (image,), widths=(_width(image[1] - image[0]),))
        planner = BlockPlanner(self.config, BLOCK_SIZE, sizes.num_layers, sizes.num_kv_heads)
        self.plan = planner.plan(facts)
        even = not self.config.allocation.scope.needs_scores
        self.state = HeadPageState(
            sizes.num, 1 if even else sizes.num_layers, sizes.num_kv_heads, device
        )
        self.pipeline = CompressionPipeline(
            self.config.scoring,
            self.config.allocation,
            self.config.merging,
            self.config.window,
            sizes.num_kv_heads,
            PageLayout(BLOCK_SIZE, sizes.head_size),
            self.state,
            workspace_bytes=workspace_bytes or self.config.workspace_mib << 20,
        )
        generator = None
        if device.type != "meta":
            generator = torch.Generator(device).manual_seed(sizes.length)
        self.prompts = self._prompts(self.plan, generator)
        self.stack = self._stack(self.plan, generator, pages)

    def __call__(self) -> torch.Tensor:
        """Pages [N, L, Hkv] of each head."""
        return self.pipeline.compress(self.prompts, self.stack)

    def _prompts(self, plan: PromptPlan, generator: torch.Generator | None) -> FinishedPrefills:
        sizes, num_blocks = self.sizes, -(-self.sizes.length // BLOCK_SIZE)

        def every(value: int) -> torch.Tensor:
            return torch.full((sizes.num,), value, device=self.device)

        numbers = {name: every(getattr(plan, name)) for name in PromptBatch._fields[2:]}
        slots = torch.arange(sizes.num, device=self.device)
        blocks = torch.randperm(sizes.num * num_blocks, device=self.device, generator=generator)
        segment = visual = None
        if Need.SEGMENTS in self.config.needs or self.config.candidates is not Candidates.ALL:
            segments = torch.from_numpy(plan.facts.segments(num_blocks * BLOCK_SIZE))
            segment = segments.to(self.device).long().expand(sizes.num, -1).contiguous()
        grids = None
        if Need.GRIDS in self.config.needs:
            grids = torch.from_numpy(plan.facts.grids(1)).to(self.device)
            grids = grids.expand(sizes.num, -1, -1).contiguous()
        if self.config.candidates is not Candidates.ALL:
            visual = segment >= 0
        scope, owners = self.config.allocation.scope, 1
        if scope.needs_scores:
            owners = sizes.num_kv_heads * (sizes.num_layers if scope.spans_layers else 1)
        return FinishedPrefills(
            batch=PromptBatch(slots=slots, prompt_lens=every(sizes.length), **numbers),
            block_table=blocks.view(sizes.num, num_blocks),
            max_pages=min(plan.num_kept_blocks * owners, plan.num_full_blocks),
            pages_per_layer=plan.num_kept_blocks * sizes.num_kv_heads,
            visual=visual,
            segment=segment,
            num_segments=1,
            grids=grids,
        )

    def _stack(
        self, plan: PromptPlan, generator: torch.Generator | None, pages: torch.Tensor | None
    ) -> LayerStack:
        sizes, device = self.sizes, self.device
        layer_pages = sizes.num * -(-sizes.length // BLOCK_SIZE) * sizes.num_kv_heads

        def draw(*shape: int) -> torch.Tensor:
            numbers = torch.empty(shape, dtype=torch.bfloat16, device=device)
            return numbers.normal_(generator=generator)

        if pages is None:
            pages = draw(sizes.num_layers * layer_pages, BLOCK_SIZE * 2 * sizes.head_size)
        grams = None
        if Need.OUTPUT_GRAMS in self.config.needs:
            shape = (sizes.num_layers, sizes.num_q_heads, sizes.head_size, sizes.head_size)
            weights = torch.empty(shape, device=device).normal_(generator=generator)
            grams = weights @ weights.mT
        rows = (sizes.num_layers, sizes.num, plan.num_rows, sizes.num_q_heads, sizes.head_size)
        return LayerStack(
            layers=tuple(range(sizes.num_layers)),
            queries=draw(*rows),
            pages=pages,
            layer_pages=layer_pages,
            scale=torch.full((sizes.num_layers,), sizes.head_size**-0.5, device=device),
            output_grams=grams,
        )
