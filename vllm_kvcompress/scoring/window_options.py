# SPDX-License-Identifier: Apache-2.0
"""What window scores may look at besides queries and keys: grids of images, and output."""

import torch

from vllm_kvcompress import kernels
from vllm_kvcompress.scoring.base import Need, ScoringContext


def needs_of(grid: bool, weight: str) -> Need:
    """What options of ``SnapKV`` need."""
    grids = Need.SEGMENTS | Need.GRIDS if grid else Need(0)
    return grids | (Need.VALUES | Need.OUTPUT_GRAMS if weight == "output" else Need(0))


def columns_of(ctx: ScoringContext, mean: torch.Tensor) -> kernels.Grids:
    """Images that a layer looks down, so that it pools them along their columns.

    All heads of a layer pool alike: ranks ask each other what theirs see.

    Args:
        mean: [R, Hkv, T] window mean before pooling.
    """
    assert ctx.segment is not None, "asked for by needs"
    assert ctx.grids is not None, "asked for by needs"
    grids = kernels.Grids(ctx.segment, ctx.grids)
    along = ctx.mean_over_heads(kernels.grid_balance(mean, ctx.num_candidates, grids))  # [R, M]
    return grids._replace(lines=ctx.grids.masked_fill((along >= 0)[..., None], 0))


def output_weight(ctx: ScoringContext) -> torch.Tensor:
    """Norm of what a token's value adds to the layer's output, [R, Hkv, T] float32."""
    assert ctx.output_grams is not None, "asked for by needs"
    return kernels.output_norms(ctx.prompts, ctx.output_grams)
