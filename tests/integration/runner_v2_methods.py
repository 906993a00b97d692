# SPDX-License-Identifier: Apache-2.0
"""Run by test_runner_v2.py: every method, with images, on Model Runner V2.

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
from every_method import (
    METHODS,
    OUTPUT_TOKENS,
    WINDOW,
    checkpoint,
    mixed_requests,
    reconfigure,
    settings,
    write_head_scores,
)
from expectations import Reference, logprob_tolerance
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as RunnerV2

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


@pytest.fixture(scope="module")
def head_scores(tmp_path_factory) -> str:
    return write_head_scores(tmp_path_factory.mktemp("scores"))


@pytest.fixture
def wanted(llm, reference, head_scores, method: str) -> list[Answer]:
    """The oracle's answers; the engine uses the method from now on."""
    raw = settings(method)
    if "sparsemm" in method:
        raw["head_scores"] = head_scores
    reconfigure(llm, raw)
    return [one.answer for one in reference.expected(raw, mixed_requests())]


@by_method
def test_equals_oracle(llm, wanted):
    prompts = [request.prompt for request in mixed_requests()]
    free = free_blocks(llm)
    for _ in range(2):  # with prefix-cache hits the second time
        assert_same(generate(llm, prompts, greedy(OUTPUT_TOKENS)), wanted, logprob_tolerance())
    Stepper(llm).flush()
    assert free_blocks(llm) == free


@by_method
def test_preempted(llm, wanted):
    """All at once, in prompts and in answers; requests with images come back as new ones."""
    for steps in (2, 5, 9, 10):
        stepper = Stepper(llm)
        for index, request in enumerate(mixed_requests()):
            stepper.add(str(index), request.prompt, greedy(OUTPUT_TOKENS))
        for _ in range(steps):
            stepper.step()
        assert llm.llm_engine.reset_prefix_cache(reset_running_requests=True)
        stepper.run()
        answers = [stepper.done[str(index)] for index in range(len(wanted))]
        assert_same(answers, wanted, logprob_tolerance())
