# SPDX-License-Identifier: Apache-2.0
"""One configuration of vLLM in this process, checked from the budget to the answers.

python -m gpucheck.engines --runner V2 --mode full --dtype float16 --models DIR --out CASE.json

budget    bacon and bacon+adakv
          1. The pages of every layer and head hold what the float64 reference keeps, given the
             queries and keys that the device had; prompts end with chunks of many tokens and of
             one.
          2. The answers fit the float32 model on the CPU that sees exactly the kept tokens, as
             well as stock vLLM fits the one that sees all, and do not fit the latter.
          3. The same once more, all requests preempted in the middle.
          4. FlashAttention ran; full graphs were replayed in decode steps, in no other mode.
covers    A budget that covers the prompts: token-identical to stock vLLM.
pressure  In a pool that is never short, token-identical to stock vLLM; in one that is, pages
          hold what the reference keeps, and nobody is preempted.
methods   The answers of further methods fit the float32 model that sees what the float32
          reference keeps. Near ties may keep other tokens in 16 bits.
"""

import argparse
import json
import os
import runpy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[2] / "tests"
TRITON_ON_CPU = TESTS / "integration" / "triton_on_cpu" / "sitecustomize.py"

CHUNK = 64  # tokens of a step
GRAPH_SIZES = [1, 2, 4, 8]
OUTPUT_TOKENS = 12
LENGTHS = (400, 70, 257, 321, 129)
"""Whole blocks and not; 70 fits the larger budget; 257, 321 and 129 alone end with one token."""
LAYERS = 4
SHORT_POOL = 60
"""Blocks; the prompts need 75, the longest with its answer 26."""
FURTHER = ("snapkv", "h2o", "shiftkv", "snapkv+pyramid")
FIT = 10
"""Answers of further methods are so many times nearer to the right model than to the wrong one."""
CHECKS = ("budget", "covers", "pressure", "methods")
MODES: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "compiled": {"enforce_eager": False},  # the CPU's counterpart of graphs
    "piecewise": {"cudagraph_mode": "PIECEWISE"},
    "full": {"cudagraph_mode": "FULL_AND_PIECEWISE"},
    "full-decode": {"cudagraph_mode": "FULL_DECODE_ONLY", "mode": 0},
}


@dataclass(frozen=True)
class Case:
    """One process.

    Attributes:
        runner: "V1" (which also runs without asynchronous scheduling) or "V2".
        cache: type of the KV cache.
        on_gpu: False in a rehearsal.
    """

    runner: str
    mode: str
    dtype: str
    cache: str
    on_gpu: bool
    model: str

    @property
    def block_size(self) -> int:
        return 16 if self.on_gpu else 32

    def settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "dtype": self.dtype,
            "kv_cache_dtype": self.cache,
            "block_size": self.block_size,
            "max_model_len": 512,
            "max_num_seqs": 8,
            "max_num_batched_tokens": CHUNK,
            "enable_prefix_caching": False,
            "enforce_eager": False,
        }
        if self.on_gpu:
            settings |= {"attention_config": {"backend": "FLASH_ATTN"}}
            settings |= {"async_scheduling": self.runner == "V2"}
            settings |= {"gpu_memory_utilization": 0.1}  # other cases run beside this one
        mode = MODES[self.mode]
        if "cudagraph_mode" in mode:
            mode = {"compilation_config": mode | {"cudagraph_capture_sizes": GRAPH_SIZES}}
        return settings | mode


def is_compressed(layers: Any, req_id: str) -> bool:
    """Whether a worker has compressed the prompt of a request that it knows."""
    return req_id in layers.slots and bool(layers.is_compressed[layers.slots.of([req_id])][0])


class Checks:
    """Runs the checks of a case; ``log`` has a line for each."""

    def __init__(self, case: Case) -> None:

        from gpucheck.forced import ForcedModel
        from gpucheck.watch import EngineWatch, ScoreLog

        self.case = case
        self.log: list[dict[str, Any]] = []
        self.watch = EngineWatch(case.on_gpu)
        self.scored = ScoreLog(LAYERS)
        self.scored.install()
        self.reference = ForcedModel(case.model)
        self.prompts = self._prompts()
        self.stock_distance = 0.0
        self.stock: list[Any] = []

    def _prompts(self) -> list[list[int]]:
        from engine import random_prompt

        return [random_prompt(length, seed=7) for length in LENGTHS]

    def note(self, check: str, detail: str, seconds: float) -> None:
        self.log.append({"check": check, "detail": detail, "seconds": round(seconds, 1)})
        print(f"== {check}: {detail} ({seconds:.1f} s)", flush=True)

    def run(self, checks: list[str]) -> None:
        self.started = time.monotonic()
        for check, detail in self._all(checks):
            self.note(check, detail, time.monotonic() - self.started)
            self.started = time.monotonic()

    def _all(self, checks: list[str]) -> Iterator[tuple[str, str]]:
        from engine import Method

        yield "stock", self.check_stock()
        adaptive = Method("bacon+adakv", 96, options=(("alpha", 0.0),))
        if "budget" in checks:
            yield "real budget, bacon", self.check_budget(Method("bacon", 96))
            yield "real budget, bacon+adakv", self.check_budget(adaptive)
        if "covers" in checks:
            covers = Method("bacon+adakv", 4096)
            yield "budget covers the prompts", self.check_equal(covers)
        if "pressure" in checks:
            method = Method("bacon", 96, options=(("when", "pressure"),))
            yield "pressure, roomy", self.check_equal(method)
            yield "pressure, short", self.check_pressure(method)
        if "methods" in checks:
            for name in FURTHER:
                yield f"real budget, {name}", self.check_method(Method(name, 96))

    # the checks

    def check_stock(self) -> str:
        from engine import engine

        with engine(self.case.model, **self.case.settings()) as llm:
            self.stock = self.serve(llm)
        fits = [
            self.distance(answer, prompt, None)
            for answer, prompt in zip(self.stock, self.prompts, strict=True)
        ]
        self.stock_distance = sum(fits) / len(fits)
        return f"mean distance to the float32 model {self.stock_distance:.2g}"

    def check_equal(self, method) -> str:
        from engine import engine

        from gpucheck.compare import assert_same_tokens

        with engine(self.case.model, method, **self.case.settings()) as llm:
            self.scored.prompts.clear()  # made up, to compile kernels
            answers = self.serve(llm)
        assert not self.scored.prompts, "a prompt was compressed"
        parted = assert_same_tokens(answers, self.stock, self.case.dtype)
        return f"{len(answers)} answers equal, {parted} of them up to a near tie"

    def check_pressure(self, method) -> str:
        from engine import Stepper, engine, free_blocks, greedy

        from gpucheck.compare import assert_same_kept

        settings = self.case.settings() | {"num_gpu_blocks_override": SHORT_POOL}
        if not self.case.on_gpu:
            settings["num_gpu_blocks_override"] = SHORT_POOL // 2  # of twice the size
        sets = ties = 0
        with engine(self.case.model, method, **settings) as llm:
            free, stepper = free_blocks(llm), Stepper(llm)
            for number, prompt in enumerate(self.prompts):
                stepper.add(str(number), prompt, greedy(OUTPUT_TOKENS))
            held = self.read_pages(stepper)
            stepper.run()
            assert free_blocks(llm) == free, "blocks are missing when all requests are gone"
        assert held, "the pool was never short"
        assert not stepper.preemptions, f"{stepper.preemptions} preemptions"
        config = self.oracle_config(method)
        for length, found in held.items():
            some, few = assert_same_kept(found, self.scored.prompts[length], config)
            sets, ties = sets + some, ties + few
        self.scored.prompts.clear()
        return f"{len(held)} prompts, {sets} kept sets equal ({ties} up to near ties)"

    def check_method(self, method) -> str:
        from engine import engine
        from oracle import Oracle

        config, reference = self.oracle_config(method), Oracle(self.case.model)
        with engine(self.case.model, method, **self.case.settings()) as llm:
            answers = self.serve(llm)
        self.scored.prompts.clear()
        right, wrong = [], []
        for prompt, answer in zip(self.prompts, answers, strict=True):
            if len(prompt) < 2 * config.budget:
                continue  # hardly compressed
            kept = reference.select(reference.prompt(prompt), config).kept
            right.append(self.distance(answer, prompt, kept))
            wrong.append(self.distance(answer, prompt, None))
        near, far = sum(right) / len(right), sum(wrong) / len(wrong)
        assert far > FIT * near, f"{near:.3g} from what the reference keeps, {far:.3g} from stock"
        return f"distance {near:.2g} (not {far:.2g})"

    def check_budget(self, method) -> str:
        from engine import engine, free_blocks

        with engine(self.case.model, method, **self.case.settings()) as llm:
            free = free_blocks(llm)
            together = self.check_answers(llm, method, self.prompts)
            self.check_graphs(llm)
            alone = self.check_answers(llm, method, [self.prompts[3]])
            preempted = self.check_answers(llm, method, self.prompts, preempt_after=9)
            assert free_blocks(llm) == free, "blocks are missing when all requests are gone"
        return f"{together}; last chunk of one token: {alone}; preempted: {preempted}"

    def check_answers(self, llm, method, prompts, preempt_after: int = 0) -> str:
        from engine import Stepper, greedy

        from gpucheck.compare import assert_same_kept, expected_kept

        stepper = Stepper(llm)
        for number, prompt in enumerate(prompts):
            stepper.add(str(number), prompt, greedy(OUTPUT_TOKENS))
        if preempt_after:
            for _ in range(preempt_after):
                stepper.step()
            assert llm.llm_engine.reset_prefix_cache(reset_running_requests=True)
        held = self.read_pages(stepper)
        stepper.run()
        if len(prompts) == 1:
            assert stepper.chunks["0"][-1] == 1, f"the last chunk has {stepper.chunks['0'][-1]}"

        sets = ties = 0
        right, wrong = [], []
        for number, prompt in enumerate(prompts):
            config = self.oracle_config(method)
            scored = self.scored.prompts.get(len(prompt))
            assert (scored is None) == (len(prompt) not in held)
            kept = None
            if scored is not None:
                some, few = assert_same_kept(held[len(prompt)], scored, config)
                sets, ties, kept = sets + some, ties + few, expected_kept(scored, config)
            answer = stepper.done[str(number)]
            right.append(self.distance(answer, prompt, kept))
            if kept is not None:
                wrong.append(self.distance(answer, prompt, None))
        near, far = sum(right) / len(right), sum(wrong) / len(wrong)
        assert near <= 2 * self.stock_distance + 1e-3, (
            f"mean distance to the reference {near:.3g}; stock vLLM has {self.stock_distance:.3g}"
        )
        assert far > 3 * near, f"{near:.3g} from ours, only {far:.3g} from the uncompressed model"
        self.scored.prompts.clear()
        return (
            f"{sets} kept sets equal ({ties} up to near ties), distance {near:.2g} (not {far:.2g})"
        )

    def read_pages(self, stepper) -> dict[int, list]:
        """Positions [L][Hkv] that each compressed prompt holds, by length, once it decodes."""
        from engine import compressed_layers
        from head_pages import held_pages, positions_of

        layers = compressed_layers(stepper.llm)
        found: dict[int, list] = {}
        while stepper.engine.has_unfinished_requests():
            stepper.step()
            for name, prompt in stepper.prompts.items():
                request, length = stepper.request(name), len(prompt)
                if request is None or length in found or length not in self.scored.prompts:
                    continue
                if not is_compressed(layers, stepper.internal[name]):
                    continue  # not again yet, after a preemption
                held = held_pages(stepper, name)
                found[length] = positions_of(held, self.scored.prompts[length].keys)
                for heads in held.page_ids:
                    pages = [page for ids in heads for page in ids]
                    assert len(pages) == len(set(pages)), "a page has two owners"
        return found

    def check_graphs(self, llm) -> None:
        """Which runner it is, and which way steps ran when nothing but decode steps was left."""
        from engine import Stepper, greedy, model_runner
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner as RunnerV2

        assert isinstance(model_runner(llm), RunnerV2) == (self.case.runner == "V2")
        stepper = Stepper(llm)
        for number, prompt in enumerate(self.prompts[:3]):
            stepper.add(str(number), prompt, greedy(30))
        stepper.run_until(lambda: len(stepper.partial) == 3)
        stepper.step()  # with asynchronous scheduling a step is under way
        attention, replays = self.watch.attention(), self.watch.replays()
        for _ in range(10):
            stepper.step()
        attention, replays = self.watch.attention() - attention, self.watch.replays() - replays
        stepper.run()
        self.scored.prompts.clear()
        print(f"10 decode steps: {attention} attention calls, {replays} graph replays", flush=True)
        if self.case.mode.startswith("full"):
            assert attention == 0, f"{attention} attention calls outside of full graphs"
            assert 8 <= replays <= 12, f"{replays} graphs replayed in 10 decode steps"
        else:
            assert attention >= 10 * LAYERS, f"{attention} attention calls in 10 steps"
            assert (replays > 0) == (self.case.mode == "piecewise"), f"{replays} graph replays"

    # helpers

    def distance(self, answer, prompt: list[int], kept) -> float:
        """Mean difference of log-probabilities from the float32 model that sees ``kept``."""
        expected = self.reference.logprobs(prompt, answer.token_ids, kept).tolist()
        pairs = zip(answer.logprobs, expected, strict=True)
        return sum(abs(a - b) for a, b in pairs) / len(expected)

    def serve(self, llm) -> list[Any]:
        from engine import generate, greedy

        return generate(llm, self.prompts, greedy(OUTPUT_TOKENS))

    def oracle_config(self, method):
        from oracle import OracleConfig

        from vllm_kvcompress.config import KVCompressionConfig

        config = KVCompressionConfig.parse(method.additional_config["kv_compression"])
        return OracleConfig(
            budget=method.budget,
            scorer=config.scorer,
            allocator=config.allocator,
            merge=config.merge,
            window=config.window,
            block_size=self.case.block_size,
            **config.options,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runner", choices=("V1", "V2"), required=True)
    parser.add_argument("--mode", choices=MODES, required=True)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), required=True)
    parser.add_argument("--cache", choices=("auto", "fp8"), default="auto")
    parser.add_argument("--checks", nargs="+", choices=CHECKS, default=CHECKS)
    parser.add_argument("--cpu", action="store_true", help="rehearse on vLLM's CPU backend")
    parser.add_argument("--models", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    args = parser.parse_args()
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1" if args.runner == "V2" else "0"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine lives here, to be looked at
    if args.cpu and args.runner == "V2":
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
        runpy.run_path(str(TRITON_ON_CPU))
    import tiny_models

    head_dim = 32 if args.cpu else 64
    model = tiny_models.make(
        "llama", args.models, layers=LAYERS, head_dim=head_dim, dtype=args.dtype
    )
    checks = Checks(Case(args.runner, args.mode, args.dtype, args.cache, not args.cpu, str(model)))
    try:
        checks.run(args.checks)
    finally:
        args.out.write_text(json.dumps(checks.log, indent=2) + "\n")


if __name__ == "__main__":
    main()
