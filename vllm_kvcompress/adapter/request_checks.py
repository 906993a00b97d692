# SPDX-License-Identifier: Apache-2.0
"""Refuses requests that cannot be served as they ask, before the engine sees them.

A request passes three places. ``AsyncLLM.generate`` is called before a server begins its answer:
what is refused there is an HTTP error of a streamed answer, too. ``InputProcessor`` serves all
others who use vLLM's own front ends. What another front end sends, or whoever hands a finished
request to the engine, meets the check in the engine's process only: there, an exception ends the
request and nothing else.
"""

from collections.abc import Callable
from typing import Any

from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.input_processor import InputProcessor

from vllm_kvcompress.adapter.compression_config import compression_choices, compression_config
from vllm_kvcompress.adapter.patching import wrap
from vllm_kvcompress.adapter.telemetry import record_refusal
from vllm_kvcompress.choices import METHOD, WITHOUT_COMPRESSION, RequestError, wishes
from vllm_kvcompress.config import OFF, KVCompressionError


def install() -> None:
    wrap(AsyncLLM, "generate", _before_the_answer)
    wrap(InputProcessor, "process_inputs", _before_the_engine)
    wrap(EngineCore, "preprocess_add_request", _in_the_engine)


def check_wishes(vllm_config: VllmConfig, params: Any) -> None:
    """Whether a request may have what it asks for.

    Args:
        params: sampling parameters; those of other requests ask for nothing.

    Raises:
        VLLMValidationError: it may not; servers answer with HTTP 400.
    """
    if not isinstance(params, SamplingParams) or not params.extra_args:
        return
    choices = compression_choices(vllm_config)
    try:
        if choices is not None:
            choices.settings(params.extra_args)
            return
        for key, value in wishes(params.extra_args).items():
            if (key, value) != (METHOD, OFF):
                raise RequestError(key, f"{key}: {WITHOUT_COMPRESSION}.")
    except RequestError as error:
        if choices is not None:
            record_refusal(vllm_config)
        raise VLLMValidationError(str(error), parameter=error.key) from error


def _before_the_answer(original: Callable) -> Callable:
    def generate(self: AsyncLLM, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any):
        check_wishes(self.vllm_config, sampling_params)
        return original(self, prompt, sampling_params, *args, **kwargs)

    return generate


def _before_the_engine(original: Callable) -> Callable:
    def process_inputs(
        self: InputProcessor, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ):
        if kwargs.get("resumable") and compression_config(self.vllm_config) is not None:
            raise KVCompressionError(
                "KV compression happens when a prompt ends, so a streaming-input session cannot "
                "append to it: send the whole prompt in one request, or serve without "
                "--kv-compression."
            )
        check_wishes(self.vllm_config, params)
        return original(self, request_id, prompt, params, *args, **kwargs)

    return process_inputs


def _in_the_engine(original: Callable) -> Callable:
    def preprocess_add_request(self: EngineCore, request: EngineCoreRequest):
        check_wishes(self.vllm_config, request.sampling_params)
        return original(self, request)

    return preprocess_add_request
