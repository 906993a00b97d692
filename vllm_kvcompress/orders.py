# SPDX-License-Identifier: Apache-2.0
"""What the scheduler tells the workers about compression, along with vLLM's own output."""

from dataclasses import dataclass, field
from typing import NamedTuple

from vllm_kvcompress.plan import PromptPlan

ATTRIBUTE = "kv_compression_orders"
"""Of vLLM's scheduler output, which is pickled whole."""


class CompressionOrder(NamedTuple):
    """Compress this prompt before the next forward pass.

    Attributes:
        req_id: vLLM's id of the request.
        plan: what is kept of its prompt.
        block_ids: of all the prompt's blocks, the partial last one included, as attention kernels
            number them.
    """

    req_id: str
    plan: PromptPlan
    block_ids: list[int]


@dataclass
class StepOrders:
    """The compression part of one step.

    Attributes:
        plans: of requests that are computed from their start, or from a cached prefix, in this
            step and whose prompts may be compressed later.
        compress: prompts to compress before the step's forward pass. Their blocks, but for the
            kept ones, are free from this step on: whoever gets them writes in this step or later.
    """

    plans: dict[str, PromptPlan] = field(default_factory=dict)
    compress: list[CompressionOrder] = field(default_factory=list)
