# SPDX-License-Identifier: Apache-2.0
"""One chat question to an engine of this process that lives for nothing else."""

import gc
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vllm.entrypoints.llm import LLM

from vllm_kvcompress.adapter.recorder import EXTENSION
from vllm_kvcompress.config import CONFIG_KEY


class Reply(NamedTuple):
    """What came back.

    Attributes:
        text: the answer.
        reports: what each worker says of the compression, see ``RecordingExtension``.
    """

    text: str
    reports: list[dict[str, Any] | None]


def ask(
    model: str,
    messages: Sequence[Mapping[str, Any]],
    compression: Mapping[str, Any] | None,
    max_tokens: int,
    engine_args: Mapping[str, Any],
) -> Reply:
    """Start an engine, ask greedily, and end it.

    Args:
        messages: of an OpenAI chat.
        compression: settings as in ``additional_config``; None: without compression, no reports.
        engine_args: further arguments of vLLM's ``LLM``.
    """
    ours: dict[str, Any] = {"max_num_seqs": 1, "enforce_eager": True}
    if compression is not None:
        ours["additional_config"] = {CONFIG_KEY: dict(compression)}
        ours["worker_extension_cls"] = EXTENSION
    llm = LLM(model, **(ours | dict(engine_args)))
    try:
        if compression is not None:
            llm.collective_rpc("kv_compression_record", args=("",))
        params = llm.get_default_sampling_params()  # of the checkpoint, as servers take them
        params.temperature, params.max_tokens = 0.0, max_tokens
        chat: Any = [dict(message) for message in messages]
        (output,) = llm.chat(chat, params, use_tqdm=False)
        reports: list[dict[str, Any] | None] = []
        if compression is not None:
            reports = llm.collective_rpc("kv_compression_recorded")
        return Reply(output.outputs[0].text, reports)
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
