# SPDX-License-Identifier: Apache-2.0
"""Sums over all tokens of a prompt, gathered chunk by chunk. Knows tensors, not vLLM."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_kvcompress import kernels
from vllm_kvcompress.request_store import RequestStore
from vllm_kvcompress.scoring import HiddenMoments, Need, QueryMoments


@dataclass
class SumRows:
    """Prompt tokens of this step, of M requests; device tensors, int64.

    Attributes:
        store: [M] where the requests' sums are kept, see ``PromptSums.rows``.
        tokens: [M, C] batch tokens, right-aligned; 0 where a request has fewer than C.
        lengths: [M] tokens of each.
        positions: [M] position of the first.
        counted: [M] how many of the last ones count in moments.
        block_table: [M, B] over all keys that the tokens see.
    """

    store: torch.Tensor
    tokens: torch.Tensor
    lengths: torch.Tensor
    positions: torch.Tensor
    counted: torch.Tensor
    block_table: torch.Tensor


class PromptSums:
    """Running sums of the requests that are inside their prompt.

    Each layer adds its tokens of a step with the ``add`` methods. The totals of finished prompts
    are read for all layers at once.

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
        layer: int,
        queries: torch.Tensor,
        prompts: kernels.PromptPages,
        scale: torch.Tensor,
        softcap: float,
    ) -> None:
        """Add the attention that the tokens give to every key.

        Args:
            layer: position among the compressed layers, here and below.
            queries: [tokens, Hq, D] of the batch, after norm and RoPE.
            prompts: pages of the M requests.
            scale: [M] float32.
        """
        added = kernels.key_attention_sum(
            queries[sums.tokens], sums.lengths, sums.positions, prompts, scale, softcap
        )
        store = self._reserve(Need.KEY_ATTENTION_SUMS, added)
        store[sums.store, layer, :, : added.shape[2]] += added

    def add_hidden(self, sums: SumRows, layer: int, hidden: torch.Tensor) -> None:
        """Add x and x^2, and keep the last x; ``hidden`` [tokens, d] is the attention input."""
        chunk = hidden[sums.tokens].float()  # [M, C, d]
        counted = self._counted(sums)[:, :, None]
        x = chunk * counted
        count = counted.sum(1).expand_as(x[:, 0])
        added = torch.stack([x.sum(1), x.square().sum(1), count, chunk[:, -1]], 1)
        store = self._reserve(Need.HIDDEN_MOMENTS, added)
        store[sums.store, layer, :3] += added[:, :3]
        store[sums.store, layer, 3] = added[:, 3]

    def add_queries(self, sums: SumRows, layer: int, queries: torch.Tensor) -> None:
        """Add q and q q^T; ``queries`` [tokens, Hq, D] before RoPE, after their norm."""
        counted = self._counted(sums)
        chunk = queries[sums.tokens].float() * counted[:, :, None, None]  # [M, C, Hq, D]
        outer = torch.einsum("mchd,mche->mhde", chunk, chunk)
        count = counted.sum(1)[:, None, None, None].expand(-1, outer.shape[1], 1, outer.shape[3])
        added = torch.cat([outer, chunk.sum(1)[:, :, None], count], 2)  # [M, Hq, D + 2, D]
        store = self._reserve(Need.QUERY_MOMENTS, added)
        store[sums.store, layer] += added

    def key_attention_sum(self, store: torch.Tensor) -> torch.Tensor:
        """Totals [L, N, Hkv, T'] of the N finished prompts in the rows ``store`` [N]."""
        return self._totals(Need.KEY_ATTENTION_SUMS, store)

    def hidden(self, store: torch.Tensor) -> HiddenMoments:
        """Totals of L * N rows, layer by layer."""
        rows = self._totals(Need.HIDDEN_MOMENTS, store).flatten(0, 1)
        total, square, count, last = rows.unbind(1)
        return HiddenMoments(count[:, 0], total, square, last)

    def moments(self, store: torch.Tensor) -> QueryMoments:
        """Totals of L * N rows, layer by layer."""
        total = self._totals(Need.QUERY_MOMENTS, store).flatten(0, 1)
        return QueryMoments(total[:, 0, -1, 0], total[:, :, -2], total[:, :, :-2])

    def _reserve(self, need: Need, added: torch.Tensor) -> torch.Tensor:
        """The storage [rows, L, ...] for what [M, ...] is added to."""
        shape = (self.num_layers, *added.shape[1:])
        return self._stores[need].reserve(shape, torch.float32, added.device)

    def _totals(self, need: Need, store: torch.Tensor) -> torch.Tensor:
        """[L, N, ...]."""
        layers = torch.arange(self.num_layers, device=store.device)[:, None]
        return self._stores[need].tensor[store, layers]

    def _counted(self, sums: SumRows) -> torch.Tensor:
        """[M, C] float32, 1 for tokens that count in moments."""
        back = torch.arange(sums.tokens.shape[1], 0, -1, device=sums.tokens.device)
        return (back <= sums.counted[:, None]).float()
