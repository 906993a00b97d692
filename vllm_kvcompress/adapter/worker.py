# SPDX-License-Identifier: Apache-2.0
"""vLLM's workers with compression; an engine names them by path in its configuration."""

from functools import partial
from typing import Any

import torch
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from vllm.v1.worker.gpu_worker import Worker

from vllm_kvcompress.adapter import (
    attention_inputs,
    model_checks,
    output_weights,
    runners,
    selection,
)
from vllm_kvcompress.adapter.backend import compressed_modules, layers_of
from vllm_kvcompress.adapter.compression_config import compression_choices
from vllm_kvcompress.adapter.layers import CompressedLayers
from vllm_kvcompress.adapter.lora import RequestAdapters
from vllm_kvcompress.adapter.telemetry import last_words


class CompressedWorker(Worker):
    """A worker that compresses before the forward pass of a step."""

    _reserved: torch.Tensor | None = None
    compressed_layers: CompressedLayers

    @last_words
    def load_model(self, **kwargs: Any) -> None:
        super().load_model(**kwargs)

    @last_words
    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """Called after the weights are loaded and before memory is profiled."""
        runner, has_adapters = self.model_runner, self.vllm_config.lora_config is not None
        lora_manager = runner.lora_manager if has_adapters else None
        selection.describe_layers(runner.get_model(), self.vllm_config)
        attention_inputs.install(runner.get_model(), self.vllm_config, lora_manager)
        choices = compression_choices(self.vllm_config)
        layers = compressed_modules(self.vllm_config)
        for config in choices.configs if choices is not None else ():
            output_weights.install(runner.get_model(), layers, config)
        specs = super().get_kv_cache_spec()
        assert self.device is not None, "the worker has been initialized"
        if self._reserved is None and self.device.type != "cpu":
            # there while vLLM measures what the model takes, so that the cache leaves room for it
            self._reserved = torch.empty(
                model_checks.reserved_bytes(specs, self.vllm_config),
                dtype=torch.uint8,
                device=self.device,
            )
        return specs

    @last_words
    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        self._reserved = None
        spec = model_checks.compressed_spec(kv_cache_config)
        model_checks.check_files(self.vllm_config, spec)
        super().initialize_from_config(kv_cache_config)
        runners.check_kernel_blocks(self.model_runner, spec.kernel_block_size)
        self.compressed_layers = layers_of(self.vllm_config)
        self.compressed_layers.order_of = partial(runners.request_order, self.model_runner)
        lora = self.vllm_config.lora_config
        if lora is not None:
            self.compressed_layers.adapters = RequestAdapters(self.model_runner, lora.max_loras)
        runners.veto_full_graphs(self.model_runner, self.compressed_layers)
        facts = self.compressed_layers.facts
        assert facts.pages, "raises where the layers are not at equal distances"
        if facts.device.type != "cpu":  # nothing is compiled there
            self.compressed_layers.warm_up(self.model_config.max_model_len)

    @torch.inference_mode()
    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        layers = self.compressed_layers
        layers.begin_step(scheduler_output)
        try:
            return super().execute_model(scheduler_output)
        finally:
            layers.end_step()
