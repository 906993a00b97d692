# SPDX-License-Identifier: Apache-2.0
"""Selection in CUDA, where ``gpucheck/cuda_build.py`` has built it."""

import torch

from vllm_kvcompress.kernels import native


def available(device: torch.device) -> bool:
    """Whether the operations were built and run on this device; loads them.

    Raises:
        RuntimeError: they were built for another torch.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return False
    return native.load("vllm_kvcompress._cuda")


def select_tokens(
    scores: torch.Tensor,
    count: torch.Tensor,
    candidate_end: torch.Tensor,
    protected_end: torch.Tensor,
    max_count: int,
) -> torch.Tensor:
    """See ``reference.select_tokens``. One launch, scores are read once; T up to about 400,000."""
    stream = torch.cuda.current_stream(scores.device).cuda_stream
    return torch.ops.vllm_kvcompress.select_tokens_cuda(
        scores, count, candidate_end, protected_end, max_count, stream
    )
