# SPDX-License-Identifier: Apache-2.0
"""``vllm-kvcompress estimate`` against what engines hold."""

import re

import pytest
from engine import (
    Method,
    Stepper,
    block_pool,
    compressed_manager,
    engine,
    greedy,
    random_prompt,
    scheduler_of,
)

from vllm_kvcompress.tools import estimate

BLOCK_SIZE = 32
CACHE_BYTES = 6 << 20
TRAFFIC = [(300, 70, "96"), (520, 40, "25%")]
"""Prompt and output tokens, and the budget."""


def estimated(capsys, model: str, prompt: int, output: int, budget: str, method: str = "bacon"):
    """The numbers of the two columns, by the beginning of their title."""
    status = estimate.main(
        [model, "--prompt", str(prompt), "--output", str(output), "--method", method,
         "--budget", budget, "--kv-cache-memory-bytes", str(CACHE_BYTES),
         "--block-size", str(BLOCK_SIZE)]
    )  # fmt: skip
    text = capsys.readouterr().out
    assert status == 0
    rows = re.findall(r"^([a-zA-Z].*?) {2,}([\d.,]+) +([\d.,]+)$", text, re.MULTILINE)
    return {
        title: tuple(float(number.replace(",", "")) for number in numbers)
        for title, *numbers in rows
    }


def held(stepper: Stepper, name: str) -> int:
    """Blocks of a request, stock or compressed."""
    (manager,) = stepper.scheduler.kv_cache_manager.coordinator.single_type_managers
    blocks = manager.req_to_blocks.get(stepper.internal[name], [])
    return sum(not block.is_null for block in blocks)


def serve(stepper: Stepper, count: int, prompt: int, output: int) -> tuple[int, int, int]:
    """Run requests that arrive together: most blocks before and after compression, peak running."""
    stepper.peak_running, stepper.preemptions = 0, 0
    names = [f"{count}-{index}" for index in range(count)]
    for seed, name in enumerate(names):
        stepper.add(name, random_prompt(prompt, seed), greedy(output))
    filled = last = 0
    while stepper.engine.has_unfinished_requests():
        stepper.step()
        for name in names:
            if stepper.num_computed(name) == prompt:
                filled = max(filled, held(stepper, name))
            elif stepper.num_computed(name) > prompt:
                last = max(last, held(stepper, name))
    stepper.flush()
    return filled, last, stepper.peak_running


@pytest.mark.parametrize("compresses", [0, 1], ids=["without", "with"])
def test_blocks_and_concurrency_are_those_of_an_engine(capsys, docvqa, compresses):
    """In its block pool: the estimate for a kind of traffic holds, and it is not too careful."""
    cases = [(*case, estimated(capsys, docvqa, *case)) for case in TRAFFIC]
    settings = {
        "dtype": "bfloat16",
        "block_size": BLOCK_SIZE,
        "kv_cache_memory_bytes": CACHE_BYTES,
        "max_num_seqs": 256,
        "max_num_batched_tokens": max(prompt for prompt, *_ in TRAFFIC) + 256,
        "max_model_len": 1024,
        "enable_prefix_caching": False,
    }
    method = Method("bacon", TRAFFIC[0][2]) if compresses else None
    with engine(docvqa, method, **settings) as llm:
        pool = block_pool(llm).num_gpu_blocks
        for prompt, output, budget, numbers in cases:
            if compresses:
                reconfigure(llm, budget)
            stepper = Stepper(llm)
            assert numbers[f"blocks of {BLOCK_SIZE} tokens"][compresses] == pool
            at_once = int(numbers["requests at once"][compresses])
            filled, last, peak = serve(stepper, at_once, prompt, output)
            assert filled == numbers["blocks of a request after prefill"][compresses]
            assert peak == at_once
            assert stepper.preemptions == 0
            if not compresses:
                assert last == numbers["blocks of a request at its end"][0]
                # at the first output token they hold less, so some more may begin, and not end
                too_many = (pool - 1) // filled + 1
                assert serve(stepper, too_many, prompt, output)[2] < too_many
            else:
                # an asynchronous scheduler sees the compressed table a step later
                assert (
                    stepper_end(stepper, prompt, output)
                    == (numbers["blocks of a request at its end"][1])
                )
    assert cases[0][3]["requests at once"][1] > 2 * cases[0][3]["requests at once"][0]


def stepper_end(stepper: Stepper, prompt: int, output: int) -> int:
    """Blocks of one request alone, at its last step."""
    stepper.add("alone", random_prompt(prompt, 99), greedy(output))
    blocks = 0
    while stepper.engine.has_unfinished_requests():
        blocks = held(stepper, "alone") or blocks
        stepper.step()
    stepper.flush()
    return blocks


def reconfigure(llm, budget: str) -> None:
    """Another budget for an idle engine."""
    import every_method

    every_method.reconfigure(llm, {"method": "bacon", "budget": budget, "window": 32})
    assert str(compressed_manager(llm).planner.config.budget) == budget
    assert not scheduler_of(llm).has_requests()


def test_memory_of_a_gpu(capsys, docvqa):
    """GiB less weights, workspace and what only a start can tell, over the bytes of a block."""
    status = estimate.main([docvqa, "--prompt", "1000", "--output", "64", "--gpu-memory", "10",
                            "--gpu-memory-utilization", "0.5", "--other", "1"])  # fmt: skip
    text = capsys.readouterr().out
    assert status == 0
    assert "4 layers x 2 KV heads x 32, 1,024 bytes of cache per token, weights 0.00497 GiB" in text
    assert re.search(r"GiB for the KV cache +4.00 +2.87\n", text)


def test_parameters_are_counted(docvqa):
    """Those of the checkpoint, though nothing is loaded."""
    from pathlib import Path

    from vllm_kvcompress.adapter.model_shape import shape_of

    stored = Path(docvqa, "model.safetensors").stat().st_size
    assert stored * 0.99 < shape_of(docvqa, "auto", None).weight_bytes <= stored


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu-memory", "1"], "leave no room for a cache on 1 x 1 GiB"),
        (["--gpu-memory", "80", "--budget", "8"], "--kv-budget 8 includes the window"),
        (["--gpu-memory", "80", "--method", "bacno"], "unknown scorer 'bacno'"),
    ],
)
def test_refused(capsys, docvqa, arguments, words):
    base = [docvqa, "--prompt", "1000", "--output", "64"]
    assert estimate.main([*base, *arguments]) == 1
    assert words in capsys.readouterr().err


def test_models_of_several_kinds_of_layers_are_refused(capsys, checkpoint):
    model = checkpoint("cohere2", layers=2)
    assert estimate.main([model, "--prompt", "9", "--output", "9", "--gpu-memory", "80"]) == 1
    words = "knows models all of whose layers have full attention"
    assert words in capsys.readouterr().err
