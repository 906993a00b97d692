# SPDX-License-Identifier: Apache-2.0
"""More tokens for heads that look far and wide, fewer for heads that look at one spot."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_kvcompress.allocation.base import Allocator, apportion


@dataclass(frozen=True)
class AdaKV(Allocator):
    """Head budgets from one top-k over the concatenated scores of a layer's heads.

    A head gets as many tokens as it has among the Hkv * b best of the layer, blended with the floor
    alpha * b. Source: Ada-KV, arXiv 2407.11550, with the defaults of the multimodal forks.

    Adaptation notes: the layer's total is conserved to the token (``rounding="exact"``); the
    released rounding is kept as ``"official"``. Under tensor parallelism a layer's total is shared
    out among the KV heads of each rank, because a rank cannot lend its memory to another.

    Options:
        alpha: share of the nominal budget that every head gets for sure.
        normalize: first scale each head by the share of its mass that its own top b holds.
        rounding: "exact" or "official".
    """

    name: ClassVar[str] = "adakv"
    source: ClassVar[str] = "Ada-KV, arXiv 2407.11550"
    even: ClassVar[bool] = False

    alpha: float = 0.2
    normalize: bool = True
    rounding: str = "exact"

    def __post_init__(self) -> None:
        is_number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        if not is_number or not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be a number in [0, 1], got {self.alpha!r}")
        if not isinstance(self.normalize, bool):
            raise ValueError(f"normalize must be true or false, got {self.normalize!r}")
        if self.rounding not in ("exact", "official"):
            raise ValueError(f"rounding must be one of exact, official, got {self.rounding!r}")

    def allocate(
        self, base: torch.Tensor, num_scored: torch.Tensor, capacity: torch.Tensor
    ) -> torch.Tensor:
        shares = self.counts(base, capacity).double() * (1 - self.alpha)
        if self.rounding == "official":
            floor = (capacity * self.alpha).long()
            return torch.minimum((shares + floor[:, None]).round().long(), num_scored[:, None])
        shares = shares + capacity[:, None] * self.alpha
        return apportion(shares, capacity * base.shape[1], torch.zeros_like(num_scored), num_scored)

    def counts(self, base: torch.Tensor, capacity: torch.Tensor) -> torch.Tensor:
        """Entries of each head among the layer's Hkv * b best, [N, Hkv] int64.

        Ties go to the lower head, then to the earlier rank inside the head; NaN ranks last.
        """
        num_rows, num_heads, length = base.shape
        ranked = base.masked_fill(base.isnan(), float("-inf")).sort(dim=2, descending=True).values
        if self.normalize:
            mass = ranked.clamp_min(0).cumsum(2)  # -inf padding adds nothing
            top = mass.gather(2, (capacity - 1)[:, None, None].expand(-1, num_heads, 1))
            # a head without mass has nothing to scale
            ranked = ranked * (top / mass[:, :, -1:]).nan_to_num(1.0)
        flat = ranked.reshape(num_rows, num_heads * length)
        order = flat.argsort(dim=1, descending=True, stable=True)
        chosen = torch.arange(flat.shape[1], device=base.device) < (num_heads * capacity)[:, None]
        heads = order // length
        counts = torch.zeros(num_rows, num_heads, dtype=torch.int64, device=base.device)
        return counts.scatter_add(1, heads, chosen.long())
