# SPDX-License-Identifier: Apache-2.0
"""One engine of ``serving.py``, in a process of its own."""

import itertools
import logging
import math
import multiprocessing
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MAX_SEQS = 32


@dataclass(frozen=True)
class Settings:
    """What both engines of a pair have in common, and the compression of one of them."""

    model: str
    method: str
    budget: str
    block_size: int
    pool_blocks: int
    threads: int
    load_format: str
    max_model_len: int
    device: str

    def engine_args(self) -> dict[str, Any]:
        """What differs between devices."""
        if self.device == "cpu":
            return {
                "kv_cache_memory_bytes": 64 << 20,
                "max_num_batched_tokens": 4096,
                "enforce_eager": True,
            }
        return {
            # memory is not profiled: two engines that start at once would see each other's
            # (pool_blocks says how much it really is)
            "kv_cache_memory_bytes": 32 << 30,
            "gpu_memory_utilization": 0.3,
            "max_num_batched_tokens": 8192,
            "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 24, MAX_SEQS]},
        }


@dataclass(frozen=True)
class Burst:
    """Requests that arrive at once."""

    requests: int
    prompt_tokens: int
    output_tokens: int
    seed: int


def random_prompts(burst: Burst) -> list[list[int]]:
    """Token ids of printable characters; no two prompts share a prefix."""
    rng = random.Random(burst.seed)
    return [[rng.randrange(94) for _ in range(burst.prompt_tokens)] for _ in range(burst.requests)]


class Engine:
    """An engine inside this process, where scheduler, block pool and worker are within reach."""

    max_images = 0

    def __init__(self, settings: Settings, arm: str, **options: Any) -> None:
        from vllm import LLM

        self.compresses = arm == "compressed"
        compression = {"method": settings.method, "budget": settings.budget} | options
        llm = LLM(
            settings.model,
            additional_config={"kv_compression": compression} if self.compresses else {},
            block_size=settings.block_size,
            max_model_len=settings.max_model_len,
            num_gpu_blocks_override=settings.pool_blocks,
            max_num_seqs=MAX_SEQS,
            enable_prefix_caching=False,
            load_format=settings.load_format,
            limit_mm_per_prompt={"image": self.max_images, "video": 0},
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **settings.engine_args(),
        )
        self.engine = llm.llm_engine
        self.core = self.engine.engine_core.engine_core
        self.names = (str(number) for number in itertools.count())

    def prompts(self, burst: Burst) -> list[dict[str, Any]]:
        """Prompts of a burst, as vLLM takes them."""
        return [{"prompt_token_ids": tokens} for tokens in random_prompts(burst)]

    def add(self, prompt: dict[str, Any], output_tokens: int) -> str:
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=output_tokens, temperature=0, ignore_eos=True)
        return self.engine.add_request(next(self.names), prompt, params)

    def burst(self, burst: Burst) -> dict[str, float]:
        """Serve a burst to its end."""
        for prompt in self.prompts(burst):
            self.add(prompt, burst.output_tokens)
        peak = steps = 0
        start = time.perf_counter()
        while self.engine.has_unfinished_requests():
            self.engine.step()
            peak = max(peak, len(self.core.scheduler.running))
            steps += 1
        seconds = time.perf_counter() - start
        return {
            "tokens_per_s": burst.requests * burst.output_tokens / seconds,
            "peak_running": peak,
            "steps": steps,
        }

    def single(self, burst: Burst) -> dict[str, float]:
        """Serve one prompt: time to its first token, and its pages once it decodes."""
        (prompt,) = self.prompts(burst)
        before = self.compression_seconds()
        request = self.add(prompt, burst.output_tokens)
        start = time.perf_counter()
        while not self.engine.step():
            pass
        result = {"prefill_ms": 1000 * (time.perf_counter() - start)}
        for _ in range(2):  # in the first or the second decode step the scheduler frees blocks
            self.engine.step()
        result["blocks_held"] = self.blocks(request)
        if self.compresses:
            result |= self.pages(request)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        if self.compresses:
            result["compression_ms"] = 1000 * (self.compression_seconds() - before)
        return result

    def compression_seconds(self) -> float:
        """The sum of the histogram vllm:kv_compression_seconds."""
        from vllm_kvcompress.config import metrics_dir
        from vllm_kvcompress.metrics import totals

        directory = metrics_dir()
        return totals(directory)["seconds_sum"] if directory else 0.0

    def blocks(self, request: str) -> int:
        """Blocks of the pool that a request holds."""
        (manager,) = self.core.scheduler.kv_cache_manager.coordinator.single_type_managers
        return sum(not block.is_null for block in manager.req_to_blocks[request])

    def pages(self, request: str) -> dict[str, float]:
        """Head pages of a running request, and its kept tokens, mean over layers and heads.

        Held: its blocks in the pool, times the head pages of a block. Needed: as many as its tokens
        fill, by the kept tokens of every layer and head, and by the budget that was asked for.
        """
        from vllm_kvcompress.adapter.runner import _states
        from vllm_kvcompress.config import Budget

        worker = self.core.model_executor.driver_worker.worker
        (group,) = worker.model_runner.attn_groups[0]
        builder = group.metadata_builders[0]
        state, size = builder.state, builder.block_size
        layers, heads = len(builder.layer_rows), builder.num_kv_heads

        computed = self.core.scheduler.requests[request].num_computed_tokens
        prompt = self.core.scheduler.requests[request].num_prompt_tokens
        after_pages = computed - prompt // size * size  # tail and answer, in natural layout

        (slot,), _ = _states[worker.model_runner].slots.assign([request])
        kept = state.page_count[:, slot].expand(layers, heads) * size + after_pages
        budget = Budget.parse(builder.settings.budget)
        asked = budget.tokens if budget.ratio is None else math.ceil(budget.ratio * prompt)
        return {
            "kept_tokens": float(kept.double().mean()) - (computed - prompt),
            "pages_held": self.blocks(request) * layers * heads,
            "pages_for_kept": int((-(-kept // size)).sum()),
            "pages_for_budget": -(-(asked + computed - prompt) // size) * layers * heads,
        }


def serve(pipe: Any, make: Callable[[], Engine], threads: int) -> None:
    """Process of one engine: answer bursts until the pipe closes."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_LOGGING_LEVEL="ERROR",
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
        OMP_NUM_THREADS=str(threads),
        VLLM_CPU_OMP_THREADS_BIND="nobind",
    )
    logging.disable(logging.WARNING)
    engine = make()
    pipe.send("ready")
    while (order := pipe.recv()) is not None:
        kind, burst = order
        pipe.send(getattr(engine, kind)(burst))


class EngineProcess:
    """An engine in a process of its own; inside ``with`` it is ready."""

    def __init__(self, make: Callable[[], Engine], threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, end = context.Pipe()
        self.process = context.Process(target=serve, args=(end, make, threads), daemon=True)
        self.process.start()
        end.close()  # ours: recv() then fails when the process ends

    def __enter__(self) -> "EngineProcess":
        assert self.pipe.recv() == "ready"
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.is_alive():
            self.pipe.send(None)
        self.process.join(30)
        self.process.kill()

    def run(self, kind: str, burst: Burst) -> dict[str, float]:
        self.pipe.send((kind, burst))
        return self.pipe.recv()
