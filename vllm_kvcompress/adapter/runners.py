# SPDX-License-Identifier: Apache-2.0
"""Where vLLM's two model runners differ for us."""

from collections.abc import Sequence
from types import MethodType
from typing import Any

from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as RunnerV2
from vllm.v1.worker.gpu_model_runner import GPUModelRunner as RunnerV1

from vllm_kvcompress.adapter.kv_cache import CompressedSpec
from vllm_kvcompress.adapter.layers import CompressedLayers
from vllm_kvcompress.config import KVCompressionError

Runner = RunnerV1 | RunnerV2


def request_order(runner: Runner, cam: CommonAttentionMetadata) -> Sequence[str]:
    """The requests of a batch, without padding."""
    if isinstance(runner, RunnerV1):
        return runner.input_batch.req_ids[: runner.input_batch.num_reqs]
    assert cam.req_idx is not None, "runner V2 names the request of every row"
    return [runner.req_states.index_to_req_id[i] for i in cam.req_idx.tolist()]


def veto_full_graphs(runner: Runner, layers: CompressedLayers) -> None:
    """Keep steps whose queries are looked at out of full graphs, where our Python does not run.

    A prompt's chunk of one token would be dispatched as a decode. Changes this runner object only.
    """
    if isinstance(runner, RunnerV1):
        determine = runner._determine_batch_execution_and_padding

        def determine_v1(
            self: RunnerV1, num_tokens: int, num_reqs: int, *args: Any, **kwargs: Any
        ) -> Any:
            if layers.in_step and layers.step_brings_rows:
                kwargs["force_uniform_decode"] = False
            return determine(num_tokens, num_reqs, *args, **kwargs)

        vars(runner)["_determine_batch_execution_and_padding"] = MethodType(determine_v1, runner)
        return
    gather = runner.gather_batch_req_state

    def gather_v2(self: RunnerV2, scheduler_output: Any, dummy_run: bool) -> Any:
        batch, uniform = gather(scheduler_output, dummy_run)
        if batch is None or not (layers.in_step and layers.step_brings_rows):
            return batch, uniform
        # data-parallel ranks agree on the mode after this, so they cannot diverge
        return batch._replace(decode_graph_eligible=False), None

    vars(runner)["gather_batch_req_state"] = MethodType(gather_v2, runner)


def check_kernel_blocks(runner: Runner, block_size: int) -> None:
    """Attention kernels must see blocks of the size that plans count in.

    Raises:
        KVCompressionError: the backend of the compressed layers takes another size.
    """
    for groups in runner.attn_groups:
        for group in groups:
            seen = group.get_metadata_builder().kv_cache_spec
            if isinstance(seen, CompressedSpec) and seen.block_size != block_size:
                raise KVCompressionError(
                    f"KV compression needs attention kernels on blocks of {block_size} tokens, but "
                    f"they get blocks of {seen.block_size} for this model: set --block-size "
                    f"{seen.block_size}, or serve it without --kv-compression."
                )
