# SPDX-License-Identifier: Apache-2.0
"""What the pipeline gets to know of the prompts in a step, moved to the device."""

from typing import TYPE_CHECKING

import numpy as np
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_kvcompress.allocation import StaticAllocator
from vllm_kvcompress.batch import StepRows, plan_sums
from vllm_kvcompress.config import Candidates
from vllm_kvcompress.pipeline import Demands, EndingPrompts
from vllm_kvcompress.plan import PromptPlan
from vllm_kvcompress.prefill_stats import SumRows
from vllm_kvcompress.scoring import Need

if TYPE_CHECKING:
    from vllm_kvcompress.adapter.builder import CompressedBuilder


def sum_rows(
    builder: "CompressedBuilder", cam: CommonAttentionMetadata, rows: StepRows, ending: np.ndarray
) -> SumRows | None:
    """Prompt rows that sums over the prompt take in; ``ending`` [N] rows end their prompt."""
    plan = plan_sums(rows)
    if not plan.rows.size:
        return None
    store = builder.sums.rows([rows.req_ids[i] for i in plan.rows])
    width = int(plan.lengths.max())
    index = np.arange(width) - width + plan.lengths[:, None]  # [M, C], < 0: not a row
    tokens = np.where(index >= 0, plan.starts[:, None] + index, 0)
    counted = plan.lengths - plan.skip
    packed = np.stack([store, plan.lengths, plan.positions, counted, plan.rows])
    store, lengths, positions, counted, chosen = builder.upload(packed)
    num_blocks = -(-int((plan.positions + plan.lengths).max()) // builder.block_size)
    return SumRows(
        store=store,
        tokens=builder.upload(tokens),
        lengths=lengths,
        positions=positions,
        counted=counted,
        block_table=cam.block_table_tensor[chosen, :num_blocks].long(),
        ending=builder.upload(np.flatnonzero(np.isin(plan.rows, ending))),
    )


def gather(
    builder: "CompressedBuilder", cam: CommonAttentionMetadata, rows: StepRows, ending: np.ndarray
) -> EndingPrompts:
    """The prompts that end in this step: ``ending`` [N] rows."""
    plans = [rows.plans[i] for i in ending]
    facts = np.array(
        [
            rows.slots[ending],
            rows.prompt_lens[ending],
            *([getattr(plan, name) for plan in plans] for name in Demands._fields[2:]),
            ending,
        ],
        dtype=np.int64,
    )
    *demands, index = builder.upload(facts)
    num_blocks = -(-int(rows.prompt_lens[ending].max()) // builder.block_size)
    batch = EndingPrompts(
        demands=Demands(*demands),
        block_table=cam.block_table_tensor[index, :num_blocks].long(),
        max_pages=max(_max_pages(builder, plan) for plan in plans),
        total_pages=max(plan.num_kept_blocks for plan in plans)
        * builder.num_kv_heads
        * len(builder.layer_rows),
    )
    if Need.SEGMENTS in builder.settings.needs or builder.settings.candidates is not Candidates.ALL:
        segment = np.stack([plan.facts.segments(num_blocks * builder.block_size) for plan in plans])
        batch.segment = builder.upload(segment)
        batch.num_segments = int(segment.max(initial=-1)) + 1
        if builder.settings.candidates is not Candidates.ALL:
            batch.visual = batch.segment >= 0
    if isinstance(builder.pipeline.allocator, StaticAllocator):
        tokens = np.array([builder.planner.head_budgets(plan) for plan in plans])
        batch.static_tokens = builder.upload(tokens[:, :, builder.heads])
    return batch


def _max_pages(builder: "CompressedBuilder", plan: PromptPlan) -> int:
    """Bound on the pages of one head."""
    if builder.even:
        return plan.num_kept_blocks
    owners = builder.num_kv_heads
    if builder.pipeline.spans_layers:
        owners *= len(builder.layer_rows)
    return min(plan.num_kept_blocks * owners, plan.num_full_blocks)
