# SPDX-License-Identifier: Apache-2.0
"""The CPU worker with compression, in a module of its own: GPU machines cannot import its base."""

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_kvcompress.adapter.worker import CompressedWorker


class CompressedCPUWorker(CompressedWorker, CPUWorker):
    """vLLM's CPU worker, compressing before the forward pass of a step."""
