# SPDX-License-Identifier: Apache-2.0
"""How a worker compressed one prompt, for whoever asks it (``vllm-kvcompress explain``).

An engine has the two calls below with ``--worker-extension-cls``, vLLM's own slot for them.
"""

import base64
import io
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_kvcompress.pipeline import CompressionPipeline, FinishedPrefills, LayerStack
from vllm_kvcompress.plan import PromptPlan
from vllm_kvcompress.recording import PromptRecord, RecordingPipeline

if TYPE_CHECKING:
    from vllm_kvcompress.adapter.layers import CompressedLayers

EXTENSION = f"{__name__}.RecordingExtension"
"""What ``--worker-extension-cls`` names."""


class Recorder:
    """Compresses as before, and remembers the first prompt that is wanted.

    Attributes:
        plan, record: of that prompt, None until it is compressed.

    Args:
        request_id: as the client gave it, with which vLLM's own id begins; "" wants any request.
    """

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.plan: PromptPlan | None = None
        self.record: PromptRecord | None = None

    def wants(self, req_id: str) -> bool:
        return self.record is None and req_id.startswith(self.request_id)

    def compress(
        self,
        pipeline: CompressionPipeline,
        prompts: FinishedPrefills,
        stack: LayerStack,
        plan: PromptPlan,
    ) -> torch.Tensor:
        """What ``pipeline.compress`` does and returns, for a single prompt."""
        self.plan = plan
        self.record, count = RecordingPipeline(**vars(pipeline)).record_one(prompts, stack)
        return count


class RecordingExtension:
    """What a worker of a compressing engine answers to besides vLLM's own calls."""

    compressed_layers: "CompressedLayers"  # of the worker that this extends

    def kv_compression_record(self, request_id: str) -> None:
        """Record how the first prompt is compressed whose request id begins like this.

        Until ``kv_compression_recorded`` is asked, prompts are compressed one after another.
        """
        self.compressed_layers.recorder = Recorder(request_id)

    def kv_compression_recorded(self) -> dict[str, Any] | None:
        """Stop recording, and say how the prompt was compressed in this worker.

        Returns:
            What ``tools.explain_record.PromptMaps`` reads; None if it was not compressed.
        """
        layers = self.compressed_layers
        recorder, layers.recorder = layers.recorder, None
        if recorder is None or recorder.record is None or recorder.plan is None:
            return None
        facts, config = recorder.plan.facts, layers.config
        return {
            "config": config.to_json(),
            "length": facts.length,
            "visual": [list(run) for run in facts.visual],
            "layers": [int(layer) for layer in layers.facts.layer_indices],
            "heads": layers.heads.tolist(),
            "block_size": layers.block_size,
            "arrays": _packed(recorder.record, facts.length),
        }


def _packed(record: PromptRecord, length: int) -> str:
    """The maps of the prompt's own tokens, a base64 text of numpy's archive."""
    maps = {} if record.maps is None else record.maps._asdict()
    tensors = {"kept": record.kept, "final": record.final, **maps}
    arrays: dict[str, Any] = {
        name: _on_host(tensor[..., :length]) for name, tensor in tensors.items()
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return base64.b64encode(buffer.getvalue()).decode()


def _on_host(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().cpu().numpy()
