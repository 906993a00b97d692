# SPDX-License-Identifier: Apache-2.0
"""Budget allocators: one file each, one row in the table."""

from vllm_kvcompress.allocation.adakv import AdaKV
from vllm_kvcompress.allocation.aircache import AirCacheLayers
from vllm_kvcompress.allocation.base import (
    Allocator,
    BudgetRequest,
    Scope,
    StaticAllocator,
)
from vllm_kvcompress.allocation.prefixkv import PrefixKV
from vllm_kvcompress.allocation.pyramid import Pyramid
from vllm_kvcompress.allocation.rounding import apportion, apportion_host, pages_from_kept
from vllm_kvcompress.allocation.sparsemm import SparseMM
from vllm_kvcompress.allocation.uniform import Uniform
from vllm_kvcompress.allocation.vlcache import VLCache

ALLOCATORS: dict[str, type[Allocator]] = {
    allocator.name: allocator
    for allocator in (Uniform, Pyramid, AdaKV, SparseMM, AirCacheLayers, PrefixKV, VLCache)
}

__all__ = [
    "ALLOCATORS",
    "Allocator",
    "BudgetRequest",
    "Scope",
    "StaticAllocator",
    "apportion",
    "apportion_host",
    "pages_from_kept",
]
