# SPDX-License-Identifier: Apache-2.0
"""Every method on two tensor-parallel ranks.

Each rank sees one of the two KV heads, and keeps of it what an engine of one rank keeps, so the
oracle is that of one rank. Only budgets per head are rounded to whole pages on each rank alone,
because ranks cannot lend each other memory.
"""

import itertools
import json
from dataclasses import replace
from typing import Any

import oracle.plan
import pytest
from engine import Answer, Method, assert_same, engine, generate, greedy, replan
from every_method import (
    METHODS,
    OUTPUT_TOKENS,
    WINDOW,
    checkpoint,
    mixed_requests,
    settings,
    write_head_scores,
)
from expectations import Reference, logprob_tolerance
from subprocesses import result_of, run_python

from vllm_kvcompress.adapter import output_weights
from vllm_kvcompress.config import KVCompressionConfig

RANKS = 2
TESTED = [method for method in METHODS if "adakv" not in method]
"""Head budgets of adakv follow from the heads of a rank: test_tensor_parallel.py."""
CODE = """
import json
from test_methods_tensor_parallel import answers_of_two_ranks
if __name__ == "__main__":
    print(json.dumps(answers_of_two_ranks(json.loads({settings!r}))))
"""


def answers_of_two_ranks(settings: dict[str, dict[str, Any]]) -> dict[str, list]:
    """Per method: the requests as one batch, and again with prefix-cache hits."""
    found = {}
    with engine(
        checkpoint(),
        # hooks on attention inputs are set at the start
        Method("shiftkv+pyramid", 80, WINDOW),
        tensor_parallel_size=RANKS,
        max_num_batched_tokens=77,
        max_num_seqs=4,
        limit_mm_per_prompt={"image": 2, "video": 0},
    ) as llm:
        prompts = [request.prompt for request in mixed_requests()]
        for method, raw in settings.items():
            config = KVCompressionConfig.parse(raw)
            llm.collective_rpc(reconfigure_worker, args=(config,))
            replan(llm, config)
            waves = [generate(llm, prompts, greedy(OUTPUT_TOKENS)) for _ in range(2)]
            found[method] = [[[a.token_ids, a.logprobs] for a in wave] for wave in waves]
    return found


def reconfigure_worker(worker, config: KVCompressionConfig) -> None:
    """Runs on every rank; see ``every_method.reconfigure``, which cannot reach other processes."""
    layers = worker.compressed_layers
    model = worker.model_runner.get_model()
    output_weights.install(model, layers.facts.modules, config)
    layers.configure(replace(layers.planner, config=config))


@pytest.fixture(scope="module")
def raws(tmp_path_factory) -> dict[str, dict[str, Any]]:
    found = {method: settings(method) for method in TESTED}
    found["aircache"]["elite_scope"] = "layer"
    found["bacon-plus"]["method"] = "bacon-plus+uniform"  # its preset shares out by adakv
    found["snapkv+sparsemm"]["head_scores"] = write_head_scores(tmp_path_factory.mktemp("scores"))
    return found


@pytest.fixture(scope="module")
def results(raws) -> dict[str, list[list[Answer]]]:
    done = run_python(CODE.format(settings=json.dumps(raws)), timeout=300)
    return {
        method: [[Answer(*answer) for answer in wave] for wave in waves]
        for method, waves in result_of(done).items()
    }


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


def expected(reference: Reference, raw: dict[str, Any]) -> list[Answer]:
    return [one.answer for one in reference.expected(raw, mixed_requests())]


@pytest.mark.parametrize("method", [method for method in TESTED if "sparsemm" not in method])
def test_equals_one_rank(results, raws, reference, method):
    for wave in results[method]:
        assert_same(wave, expected(reference, raws[method]), logprob_tolerance())


def test_pages_per_head_are_rounded_on_each_rank(results, raws, reference, monkeypatch):
    """Head budgets are those of the whole model; a rank shares out n pages per head of its own."""
    raw = raws["snapkv+sparsemm"]
    one_rank = expected(reference, raw)
    original = oracle.plan.head_pages

    def head_pages(tokens, plan, cfg):
        size = len(tokens[0]) // RANKS
        parts = [
            original([heads[rank * size :][:size] for heads in tokens], plan, cfg)
            for rank in range(RANKS)
        ]
        return [list(itertools.chain(*heads)) for heads in zip(*parts, strict=True)]

    monkeypatch.setattr(oracle.plan, "head_pages", head_pages)
    two_ranks = expected(Reference(), raw)
    for wave in results["snapkv+sparsemm"]:
        assert_same(wave, two_ranks, logprob_tolerance())
    with pytest.raises(AssertionError):
        assert_same(two_ranks, one_rank, logprob_tolerance())
