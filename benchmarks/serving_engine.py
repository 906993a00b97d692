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
from dataclasses import dataclass, replace
from typing import Any

MAX_SEQS = 32
GRAPH_SIZES = [1, 2, 4, 8, 16, 24, MAX_SEQS]


@dataclass(frozen=True)
class Settings:
    """What engines that are compared have in common, and the compression of some of them.

    Attributes:
        start: on a GPU, "default", "fast" (graphs of decode steps, but nothing is compiled, which
            takes a minute) or "eager".
    """

    model: str
    method: str
    budget: str
    block_size: int
    pool_blocks: int
    threads: int
    load_format: str
    max_model_len: int
    device: str
    start: str = "default"
    prefix_caching: bool = False

    def engine_args(self) -> dict[str, Any]:
        """What differs between devices."""
        if self.device == "cpu":
            return {
                "kv_cache_memory_bytes": 64 << 20,
                "max_num_batched_tokens": 4096,
                "enforce_eager": True,
            }
        started: dict[str, Any] = {
            "default": {"cudagraph_capture_sizes": GRAPH_SIZES},
            "fast": {
                "cudagraph_capture_sizes": GRAPH_SIZES,
                "cudagraph_mode": "FULL_DECODE_ONLY",
                "mode": 0,
            },
            "eager": None,
        }[self.start]
        how = {"enforce_eager": True} if started is None else {"compilation_config": started}
        return how | {
            # memory is not profiled: two engines that start at once would see each other's
            # (pool_blocks says how much it really is)
            "kv_cache_memory_bytes": 32 << 30,
            "gpu_memory_utilization": 0.3,
            "max_num_batched_tokens": 8192,
        }


@dataclass(frozen=True)
class Burst:
    """Requests that arrive at once; ``shared_tokens`` at the beginning of all prompts are equal."""

    requests: int
    prompt_tokens: int
    output_tokens: int
    seed: int
    shared_tokens: int = 0


def random_prompts(burst: Burst) -> list[list[int]]:
    """Token ids of printable characters; no two prompts share more than they are meant to."""
    rng = random.Random(burst.seed)

    def draw(count: int) -> list[int]:
        return [rng.randrange(94) for _ in range(count)]

    prefix = draw(burst.shared_tokens)
    own = burst.prompt_tokens - burst.shared_tokens
    return [prefix + draw(own) for _ in range(burst.requests)]


def time_calls(owner: type, name: str) -> Callable[[], float]:
    """Time a method from now on; the returned function tells the seconds spent in it so far."""
    original, seconds = getattr(owner, name), 0.0

    def timed(*args: Any, **kwargs: Any) -> Any:
        nonlocal seconds
        start = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            seconds += time.perf_counter() - start

    setattr(owner, name, timed)
    return lambda: seconds


class Engine:
    """An engine inside this process, where scheduler, block pool and worker are within reach.

    Args:
        settings: shared by the engines that are compared.
        arm: "stock", or the policy by which this one compresses.
        options: further settings of the compression.
    """

    max_images = 0

    def __init__(self, settings: Settings, arm: str, **options: Any) -> None:
        from vllm import LLM

        self.compresses = arm != "stock"
        compression = {"method": settings.method, "budget": settings.budget, "when": arm} | options
        llm = LLM(
            settings.model,
            additional_config={"kv_compression": compression} if self.compresses else {},
            block_size=settings.block_size,
            max_model_len=settings.max_model_len,
            num_gpu_blocks_override=settings.pool_blocks,
            max_num_seqs=MAX_SEQS,
            enable_prefix_caching=settings.prefix_caching,
            load_format=settings.load_format,
            limit_mm_per_prompt={"image": self.max_images, "video": 0},
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **settings.engine_args(),
        )
        self.engine = llm.llm_engine
        self.core = self.engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.names = (f"{number:09}" for number in itertools.count())
        self.withheld: list[Any] = []

    def limit_pool(self, blocks: int) -> None:
        """From now on the pool has so many blocks: the others are taken out of it."""
        pool = self.scheduler.kv_cache_manager.block_pool
        pool.free_blocks(self.withheld)
        pool.num_gpu_blocks += len(self.withheld)
        self.withheld = pool.get_new_blocks(pool.num_gpu_blocks - blocks)
        pool.num_gpu_blocks = blocks

    def configure(self, changes: dict[str, str]) -> None:
        """Compress by another policy, or to another budget, from now on; nothing may be running.

        The scheduler decides both. A change of method would have to reach the worker's graphs.
        """
        from vllm_kvcompress.config import KVCompressionConfig

        if not self.compresses:
            return
        assert changes.keys() <= {"when", "budget"}
        assert not self.engine.has_unfinished_requests()
        manager = self.scheduler.compression.manager.compressed
        config = KVCompressionConfig.parse(manager.planner.config.to_json() | changes)
        worker = self.core.model_executor.driver_worker.worker.compressed_layers
        manager.planner = worker.planner = replace(manager.planner, config=config)
        worker.config = worker.planner.config

    def prompts(self, burst: Burst) -> list[dict[str, Any]]:
        """Prompts of a burst, as vLLM takes them."""
        return [{"prompt_token_ids": tokens} for tokens in random_prompts(burst)]

    def add(self, prompt: dict[str, Any], output_tokens: int) -> str:
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=output_tokens, temperature=0, ignore_eos=True)
        return self.engine.add_request(next(self.names), prompt, params)

    def burst(self, burst: Burst) -> dict[str, Any]:
        """Serve a burst to its end."""
        for prompt in self.prompts(burst):
            self.add(prompt, burst.output_tokens)
        before, requests = self.totals(), list(self.scheduler.requests.values())
        outputs: dict[str, list[int]] = {}
        peak = steps = 0
        start = time.perf_counter()
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                if output.finished:
                    outputs[output.request_id] = list(output.outputs[0].token_ids)
            peak = max(peak, len(self.scheduler.running))
            steps += 1
        seconds = time.perf_counter() - start
        result = {
            "tokens_per_s": burst.requests * burst.output_tokens / seconds,
            "peak_running": peak,
            "steps": steps,
            "preemptions": sum(request.num_preemptions for request in requests),
            "outputs": [outputs[name] for name in sorted(outputs)],
        }
        if self.compresses:
            after = self.totals()
            names = [name for name in after if name.startswith("compressed_")]
            result |= {name: after[name] - before.get(name, 0) for name in names}
        return result

    def single(self, burst: Burst) -> dict[str, Any]:
        """Serve one prompt: time to its first token, and its pages once it decodes."""
        (prompt,) = self.prompts(burst)
        before = self.compression_ms() if self.compresses else {}
        request = self.add(prompt, burst.output_tokens)
        start = time.perf_counter()
        while not self.engine.step():
            pass
        result: dict[str, Any] = {"first_token_ms": 1000 * (time.perf_counter() - start)}
        for _ in range(2):  # the next step compresses; with async scheduling it has begun
            self.engine.step()
        result["blocks_held"] = self.blocks(request)
        if self.compresses:
            result |= self.pages(request)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        if self.compresses:
            after = self.compression_ms()
            result |= {name: value - before[name] for name, value in after.items()}
        return result

    def totals(self) -> dict[str, float]:
        """The counters behind the metrics."""
        from vllm_kvcompress.config import metrics_dir
        from vllm_kvcompress.metrics import totals

        directory = metrics_dir()
        return totals(directory) if directory else {}

    def compression_ms(self) -> dict[str, float]:
        """Time spent so far, by quantity; the sum of the histogram vllm:kv_compression_seconds."""
        return {"compression_ms": 1000 * self.totals().get("seconds_sum", 0.0)}

    def blocks(self, request: str) -> int:
        """Blocks of the pool that a request holds."""
        (manager,) = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        return sum(not block.is_null for block in manager.req_to_blocks[request])

    def pages(self, request: str) -> dict[str, float]:
        """Head pages of a running request, and its kept tokens, mean over layers and heads.

        Held: its blocks in the pool, times the head pages of a block. Needed: as many as its tokens
        fill, by the kept tokens of every layer and head, and by the budget that was asked for.
        """
        worker = self.core.model_executor.driver_worker.worker
        shared = worker.compressed_layers
        size, layers, heads = shared.block_size, shared.num_layers, shared.num_kv_heads

        computed = self.scheduler.requests[request].num_computed_tokens
        prompt = self.scheduler.requests[request].num_prompt_tokens
        after_pages = computed - prompt // size * size  # tail and answer, as vLLM writes them

        (slot,) = shared.state_slots([request])
        kept = shared.state.page_count[:, slot].expand(layers, heads) * size + after_pages
        budget = shared.config.budget
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
        kind, argument = order
        pipe.send(getattr(engine, kind)(argument))


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

    def run(self, kind: str, argument: Any) -> Any:
        """Call a method of the engine."""
        self.pipe.send((kind, argument))
        return self.pipe.recv()
