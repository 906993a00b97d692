# SPDX-License-Identifier: Apache-2.0
"""What a compressing builder hands to the attention layers of one step."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_kvcompress.pipeline import EndingPrompts
from vllm_kvcompress.prefill_stats import SumRows

if TYPE_CHECKING:
    from vllm_kvcompress.adapter.builder import CompressedBuilder


@dataclass
class RowTransfer:
    """Index tensors that move query rows in this step (see ``batch.RowPlan``)."""

    tokens: torch.Tensor | None  # [N, Q]
    load: tuple[torch.Tensor, ...] | None  # row of N, row of Q, request row, store row
    save: tuple[torch.Tensor, ...] | None  # request row, store row, token


@dataclass
class VirtualBatch:
    """Decode rows as R * Hkv sequences.

    Attributes:
        slots: [R] int64 device, state slots.
        seq_lens, block_table: of the rows, device.
        order: [T * Hkv] int64 device, query rows of the batch in virtual order; None when the batch
            is all decode rows of one token, whose memory already is in that order.
        cam: ready-made common metadata, complete but for tables and lengths.
        layers_at_once: layers that get their tables together.
        prepared: the platform's metadata of such layers, the latest.
    """

    slots: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    order: torch.Tensor | None
    cam: CommonAttentionMetadata
    layers_at_once: int
    prepared: list[Any] = field(default_factory=list)


@dataclass
class CompressedMetadata:
    """One step's attention metadata of a compressing group.

    Attributes:
        builder: made this; owns state and pipeline.
        natural: the platform's metadata of prompt rows; None when there are none.
        natural_tokens: [T] int64 device, their tokens; None when they are the whole batch.
        virtual: decode rows; None when there are none.
        ending: prompts to compress; None when there are none.
        queries: query rows to move; None when there are none.
        sums: prompt rows that sums over the prompt take in; None when nothing is summed.
    """

    builder: "CompressedBuilder"
    num_actual_tokens: int
    natural: Any = None
    natural_tokens: torch.Tensor | None = None
    virtual: VirtualBatch | None = None
    ending: EndingPrompts | None = None
    tail_tokens: int = 0
    queries: RowTransfer | None = None
    sums: SumRows | None = None
