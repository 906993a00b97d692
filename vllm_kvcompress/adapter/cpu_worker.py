# SPDX-License-Identifier: Apache-2.0
"""The CPU worker with compression, in a module of its own: GPU machines cannot import its base."""

from types import MethodType

from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_kvcompress.adapter import model_checks
from vllm_kvcompress.adapter.worker import CompressedWorker


class CompressedCPUWorker(CompressedWorker, CPUWorker):
    """vLLM's CPU worker, compressing before the forward pass of a step."""

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        super().initialize_from_config(kv_cache_config)
        if isinstance(self.model_runner, CPUModelRunner):
            parts = model_checks.compressed_spec(kv_cache_config).planner.pool_block
            _zero_whole_blocks(self.model_runner, parts)


def _zero_whole_blocks(runner: CPUModelRunner, parts: int) -> None:
    """Make the runner zero all ``parts`` kernel blocks of a block.

    It takes the ids of blocks for those of kernel blocks, and would zero what others use.
    """
    zero = runner._zero_block_ids

    def zero_block_ids(self: CPUModelRunner, block_ids: list[int]) -> None:
        zero([block_id * parts + part for block_id in block_ids for part in range(parts)])

    vars(runner)["_zero_block_ids"] = MethodType(zero_block_ids, runner)
