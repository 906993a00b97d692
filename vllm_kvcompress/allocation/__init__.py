# SPDX-License-Identifier: Apache-2.0
"""Budget allocators: one file each, one row in the table."""

from vllm_kvcompress.allocation.adakv import AdaKV
from vllm_kvcompress.allocation.base import Allocator, apportion, pages_from_tokens
from vllm_kvcompress.allocation.uniform import Uniform

ALLOCATORS: dict[str, type[Allocator]] = {a.name: a for a in (Uniform, AdaKV)}

__all__ = ["ALLOCATORS", "Allocator", "apportion", "pages_from_tokens"]
