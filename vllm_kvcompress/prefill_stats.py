# SPDX-License-Identifier: Apache-2.0
"""Sums over all rows of a prompt, gathered chunk by chunk. Knows tensors, not vLLM."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_kvcompress import kernels
from vllm_kvcompress.request_store import RequestStore
from vllm_kvcompress.scoring import HiddenMoments, Need, QueryMoments


@dataclass
class SumRows:
    """Prompt rows of this step, of M requests; device tensors, int64.

    Attributes:
        store: [M] rows of the requests in the stores.
        tokens: [M, C] batch tokens, right-aligned; 0 where a request has fewer than C.
        lengths: [M] tokens of each.
        positions: [M] position of the first.
        counted: [M] how many of the last ones count in moments.
        block_table: [M, B] over all keys that the rows see.
        ending: [N] which of the M end their prompt.
    """

    store: torch.Tensor
    tokens: torch.Tensor
    lengths: torch.Tensor
    positions: torch.Tensor
    counted: torch.Tensor
    block_table: torch.Tensor
    ending: torch.Tensor


class PromptSums:
    """Running sums of the requests that are inside their prompt.

    A layer adds its rows of a step with the ``add`` methods and reads the totals of the prompts
    that end in it.

    Args:
        num_layers: compressed layers.
        needs: what is summed.
    """

    def __init__(self, num_layers: int, needs: Need) -> None:
        self.num_layers = num_layers
        self.needs = needs
        self._stores = {need: RequestStore() for need in Need if need.all_rows and need in needs}

    def __bool__(self) -> bool:
        return bool(self._stores)

    def rows(self, req_ids: Sequence[str]) -> np.ndarray:
        """Store rows of the requests; every store hands out the same ones."""
        rows = [store.rows(req_ids) for store in self._stores.values()]
        return rows[0]

    def discard(self, req_ids: Iterable[str]) -> None:
        ids = list(req_ids)
        for store in self._stores.values():
            store.discard(ids)

    def add_columns(
        self,
        sums: SumRows,
        layer_row: int,
        queries: torch.Tensor,
        prompts: kernels.PromptPages,
        scale: float,
        softcap: float,
    ) -> torch.Tensor:
        """Attention that the rows give to every key; returns the N totals [N, Hkv, T].

        Args:
            queries: [tokens, Hq, D] of the batch, after norm and RoPE.
            prompts: pages of the M requests.
        """
        added = kernels.key_attention_sum(
            queries[sums.tokens], sums.lengths, sums.positions, prompts, scale, softcap
        )
        length = added.shape[2]
        store = self._stores[Need.KEY_ATTENTION_SUMS].reserve(
            (self.num_layers, *added.shape[1:]), torch.float32, added.device
        )
        store[sums.store, layer_row, :, :length] += added
        return store[sums.store[sums.ending], layer_row]

    def add_hidden(self, sums: SumRows, layer_row: int, hidden: torch.Tensor) -> HiddenMoments:
        """Sums of x and x^2; ``hidden`` [tokens, d] is the layer's attention input."""
        chunk = hidden[sums.tokens].float()  # [M, C, d]
        counted = self._counted(sums)[:, :, None]
        x = chunk * counted
        added = torch.stack([x.sum(1), x.square().sum(1), counted.sum(1).expand_as(x[:, 0])], 1)
        store = self._stores[Need.HIDDEN_MOMENTS].reserve(
            (self.num_layers, *added.shape[1:]), torch.float32, added.device
        )
        store[sums.store, layer_row] += added
        total = store[sums.store[sums.ending], layer_row]
        return HiddenMoments(total[:, 2, 0], total[:, 0], total[:, 1], chunk[sums.ending, -1])

    def add_queries(self, sums: SumRows, layer_row: int, queries: torch.Tensor) -> QueryMoments:
        """Sums of q and q q^T; ``queries`` [tokens, Hq, D] before RoPE, after their norm."""
        counted = self._counted(sums)
        chunk = queries[sums.tokens].float() * counted[:, :, None, None]  # [M, C, Hq, D]
        outer = torch.einsum("mchd,mche->mhde", chunk, chunk)
        count = counted.sum(1)[:, None, None, None].expand(-1, outer.shape[1], 1, outer.shape[3])
        added = torch.cat([outer, chunk.sum(1)[:, :, None], count], 2)  # [M, Hq, D + 2, D]
        store = self._stores[Need.QUERY_MOMENTS].reserve(
            (self.num_layers, *added.shape[1:]), torch.float32, added.device
        )
        store[sums.store, layer_row] += added
        total = store[sums.store[sums.ending], layer_row]
        return QueryMoments(total[:, 0, -1, 0], total[:, :, -2], total[:, :, :-2])

    def _counted(self, sums: SumRows) -> torch.Tensor:
        """[M, C] float32, 1 for tokens that count in moments."""
        back = torch.arange(sums.tokens.shape[1], 0, -1, device=sums.tokens.device)
        return (back <= sums.counted[:, None]).float()
