# SPDX-License-Identifier: Apache-2.0
"""Run by test_runner_v2.py: one method for each kind of capture, with images, on Model Runner V2.

Scheduling is asynchronous, as on GPUs. One engine for all methods (see ``every_method``).
"""

import pytest
from engine import (
    Answer,
    Method,
    Stepper,
    assert_same,
    engine,
    free_blocks,
    generate,
    greedy,
    model_runner,
    scheduling,
)
from every_method import OUTPUT_TOKENS, WINDOW, checkpoint, mixed_requests, reconfigure
from expectations import LOGPROB_TOLERANCE, Reference
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as RunnerV2

METHODS = {
    "bacon": 80,
    "aircache+aircache": 40,
    "postvision+vlcache": 80,
    "h2o": 80,
    "prefixkv+prefixkv": 80,
    "shiftkv": 80,
    "expected": 80,
}
by_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def llm():
    with (
        scheduling("async"),
        engine(
            checkpoint(),
            # hooks on attention inputs and splits at the ends of prompts are set at the start
            Method("shiftkv+pyramid", 80, WINDOW),
            max_model_len=512,
            max_num_batched_tokens=77,
            max_num_seqs=4,
            limit_mm_per_prompt={"image": 2, "video": 0},
        ) as llm,
    ):
        assert isinstance(model_runner(llm), RunnerV2)
        yield llm


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


def expected(llm, reference: Reference, method: str) -> list[Answer]:
    """The oracle's answers; the engine uses the method from now on."""
    raw = {"method": method, "budget": METHODS[method], "window": WINDOW}
    reconfigure(llm, raw)
    return [one.answer for one in reference.expected(raw, mixed_requests())]


@by_method
def test_equals_oracle(llm, reference, method):
    wanted = expected(llm, reference, method)
    prompts = [request.prompt for request in mixed_requests()]
    free = free_blocks(llm)
    for _ in range(2):  # with prefix-cache hits the second time
        assert_same(generate(llm, prompts, greedy(OUTPUT_TOKENS)), wanted, LOGPROB_TOLERANCE)
    Stepper(llm).flush()
    assert free_blocks(llm) == free


@by_method
def test_preempted(llm, reference, method):
    """All at once, in prompts and in answers; requests with images come back as new ones."""
    wanted = expected(llm, reference, method)
    for steps in (2, 5, 9, 10):
        stepper = Stepper(llm)
        for index, request in enumerate(mixed_requests()):
            stepper.add(str(index), request.prompt, greedy(OUTPUT_TOKENS))
        for _ in range(steps):
            stepper.step()
        assert llm.llm_engine.reset_prefix_cache(reset_running_requests=True)
        stepper.run()
        answers = [stepper.done[str(index)] for index in range(len(wanted))]
        assert_same(answers, wanted, LOGPROB_TOLERANCE)
