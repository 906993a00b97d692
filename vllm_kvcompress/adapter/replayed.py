# SPDX-License-Identifier: Apache-2.0
"""What metadata builders on GPUs have in common: full graphs read what these make."""

import torch

from vllm_kvcompress.adapter.builder import CompressedBuilder
from vllm_kvcompress.kernels import PageLayout


class ReplayedBuilder(CompressedBuilder):
    """Mixin of a GPU's metadata builder.

    Full graphs are captured as per-head batches. They read per-step tensors at fixed addresses: the
    buffers made here, page tables, and vLLM's own block tables and sequence lengths.
    """

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # drafting would go on with tables and lengths of the step before
        self.supports_draft_decode_metadata_update = False
        num_reqs, num_seqs = self.max_num_seqs, self.max_num_seqs * self.num_kv_heads
        empty = torch.zeros
        self._static = {
            "slots": empty(num_reqs, dtype=torch.int64, device=device),
            "starts": empty(num_seqs + 1, dtype=torch.int32, device=device),
        }

    def static_buffer(self, name: str, value: torch.Tensor) -> torch.Tensor:
        buffer = self._static[name][: value.shape[0]]
        buffer.copy_(value)
        return buffer

    def page_layout(self, head_size: int) -> PageLayout:
        return PageLayout(self.block_size, head_size)
