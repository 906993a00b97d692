# SPDX-License-Identifier: Apache-2.0
"""Query rows that attention kernels gather, and log-sum-exps of rows whose keys were split."""

import torch
import triton
import triton.language as tl


@triton.jit
def load_rows(
    q_ptr, i_row, o_row, o_head, m_row, num_rows, num_q_heads, HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Queries [rows, BLOCK_D] at any rows and query heads of one request; 0 where masked."""
    o_d = tl.arange(0, BLOCK_D)
    p_q = ((i_row * num_rows + o_row) * num_q_heads + o_head) * HEAD_SIZE
    mask = m_row[:, None] & (o_d < HEAD_SIZE)[None, :]
    return tl.load(q_ptr + p_q[:, None] + o_d[None, :], mask=mask, other=0.0)


def combine(peaks: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """Log-sum-exps of rows from maxima and sums of exponentials of their splits, dimension 2."""
    peak = peaks.amax(2, keepdim=True)
    return peak[:, :, 0] + ((peaks - peak).exp() * sums).sum(2).log()
