# SPDX-License-Identifier: Apache-2.0
"""What a compressing builder hands to the attention layers of one step: data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from vllm_kvcompress.prefill_stats import StatsRows
from vllm_kvcompress.scoring import Need

TokenIndex = slice | torch.Tensor
"""Some tokens of a batch, ascending: a slice where they are consecutive, else [T] int64 device."""


class QueryCopy(NamedTuple):
    """Queries that go to the store of those that wait for compression.

    Attributes:
        source: batch tokens.
        target: places in the store of a layer; a slice or a tensor as ``source`` is.
    """

    source: TokenIndex
    target: TokenIndex


@dataclass
class PerHeadBatch:
    """Requests as sequences of one KV head each: R * Hkv of them.

    Attributes:
        tokens: of these requests.
        order: [T * Hkv] int64 device, their queries in the order of the sequences; None when all
            requests have equally many.
        metadata_of: the platform's metadata for a layer, by its index among the compressed ones.
        query_len: tokens of each request, where they have equally many: with one, memory is in the
            order of the sequences.
    """

    tokens: TokenIndex
    order: torch.Tensor | None
    metadata_of: Callable[[int], Any]
    query_len: int = 1


@dataclass
class CompressedMetadata:
    """One step's attention metadata of a compressed group.

    Attributes:
        num_actual_tokens: of the batch, padding excluded.
        prefill: the platform's metadata of requests that attend to their uncompressed cache; None
            when there are none.
        prefill_tokens: their tokens; None when they are the whole batch.
        per_head: requests that attend to head pages; None when there are none.
        queries: queries to keep; None when there are none.
        stats: groups of prompt tokens that statistics take in, with what is summed over them.
    """

    num_actual_tokens: int
    prefill: Any = None
    prefill_tokens: TokenIndex | None = None
    per_head: PerHeadBatch | None = None
    queries: QueryCopy | None = None
    stats: Sequence[tuple[Need, StatsRows]] = ()
