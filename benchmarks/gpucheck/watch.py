# SPDX-License-Identifier: Apache-2.0
"""What an engine of this process really does: attention calls, graph replays, scored inputs."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from vllm_kvcompress import kernels
from vllm_kvcompress.kernels import reference


def count_calls(owner: type, name: str) -> Callable[[], int]:
    """Count calls of a method from now on; the returned function tells how many there were."""
    original, calls = getattr(owner, name), 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        return original(*args, **kwargs)

    setattr(owner, name, counted)
    return lambda: calls


@dataclass
class ScoredPrompt:
    """What one prompt's scores were made from, as the device had it.

    Attributes:
        queries: [L, Hq, P, D] float32; only the last W positions are known, the rest is 0.
        keys: [L, Hkv, P, D] float32.
        scale: of the softmax.
    """

    queries: np.ndarray
    keys: np.ndarray
    scale: float


@dataclass
class ScoreLog:
    """Records the inputs of ``kernels.window_scores``, prompt by prompt; lengths tell them apart.

    A call has rows of one or more layers, layer by layer.

    Attributes:
        num_layers: rows of one prompt.
        prompts: by prompt length; the latest of equal lengths.
    """

    num_layers: int
    prompts: dict[int, ScoredPrompt] = field(default_factory=dict)
    _rows: dict[int, list[tuple]] = field(default_factory=dict)

    def install(self) -> None:
        original = kernels.window_scores

        def window_scores(queries, prompts, prompt_lens, scale, *args, **kwargs):
            self._record(queries, reference.read_prompt(prompts, "key"), prompt_lens, scale)
            return original(queries, prompts, prompt_lens, scale, *args, **kwargs)

        kernels.window_scores = window_scores

    def _record(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        prompt_lens: torch.Tensor,
        scale: torch.Tensor,
    ) -> None:
        window = queries.shape[1]
        known = queries.permute(0, 2, 1, 3).float().cpu().numpy()  # [R, Hq, W, D]
        every_key = keys.float().cpu().numpy()
        for row, length in enumerate(prompt_lens.tolist()):
            rows = self._rows.setdefault(length, [])
            rows.append((known[row], every_key[row, :, :length]))
            if len(rows) < self.num_layers:
                continue
            last, keys_of_layers = (np.stack(part) for part in zip(*rows, strict=True))
            q = np.zeros((*last.shape[:2], length, last.shape[3]), dtype=np.float32)
            q[:, :, length - window :] = last
            self.prompts[length] = ScoredPrompt(q, keys_of_layers, float(scale[row]))
            del self._rows[length]


class EngineWatch:
    """Counters over the engines of this process; make it before the first engine.

    Attributes:
        attention: calls of the platform's own attention from Python, our per-head batches included.
        replays: of CUDA graphs, whole steps and pieces.
    """

    def __init__(self, on_gpu: bool) -> None:
        if on_gpu:
            from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

            self.attention = count_calls(FlashAttentionImpl, "forward")
            self.replays = count_calls(torch.cuda.CUDAGraph, "replay")
        else:
            from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

            self.attention = count_calls(CPUAttentionBackendImpl, "forward")
            self.replays = lambda: 0
