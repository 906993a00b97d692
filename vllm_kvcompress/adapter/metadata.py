# SPDX-License-Identifier: Apache-2.0
"""What a compressing builder hands to the attention layers of one step: data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from vllm_kvcompress.prefill_stats import StatsRows


class QueryCopy(NamedTuple):
    """Queries that go to the store of those that wait for compression.

    Either slices, where all of them belong to one prompt, or [K] int64 device tensors.

    Attributes:
        source: batch tokens.
        target: places in the store of a layer.
    """

    source: slice | torch.Tensor
    target: slice | torch.Tensor


@dataclass
class PerHeadBatch:
    """Requests as sequences of one KV head each: R * Hkv of them.

    Attributes:
        order: [T * Hkv] int64 device, queries of the batch in the order of the sequences; None when
            each request has one token and all requests take part, whose memory is in that order.
        metadata_of: the platform's metadata for a layer, by its index among the compressed ones.
    """

    order: torch.Tensor | None
    metadata_of: Callable[[int], Any]


@dataclass
class CompressedMetadata:
    """One step's attention metadata of a compressed group.

    Attributes:
        num_actual_tokens: of the batch, padding excluded.
        prefill: the platform's metadata of requests that attend to their uncompressed cache; None
            when there are none.
        prefill_tokens: [T] int64 device, their tokens; None when they are the whole batch.
        per_head: requests that attend to head pages; None when there are none.
        queries: queries to keep; None when there are none.
        stats: groups of prompt tokens that statistics take in.
    """

    num_actual_tokens: int
    prefill: Any = None
    prefill_tokens: torch.Tensor | None = None
    per_head: PerHeadBatch | None = None
    queries: QueryCopy | None = None
    stats: Sequence[StatsRows] = ()
