# SPDX-License-Identifier: Apache-2.0
"""Compiled models hand out what goes into attention layers, in the layer it belongs to."""

import pytest
from engine import Method, engine
from every_method import WINDOW, checkpoint, mixed_requests, reconfigure, serve
from expectations import Reference
from vllm.config import CompilationMode


@pytest.fixture(scope="module")
def llm():
    # the default in tests stops after tracing; here Inductor orders and fuses what was traced
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_CI_ENV", "0")
        with engine(
            checkpoint(),
            Method("shiftkv", 80, WINDOW),
            enforce_eager=False,
            max_num_batched_tokens=77,
            max_num_seqs=4,
            limit_mm_per_prompt={"image": 2, "video": 0},
        ) as llm:
            compilation = llm.llm_engine.vllm_config.compilation_config
            assert compilation.mode == CompilationMode.DYNAMO_TRACE_ONCE
            assert compilation.backend == "inductor"
            yield llm


@pytest.fixture(scope="module")
def reference():
    return Reference()


@pytest.mark.parametrize("method", ["shiftkv", "expected", "h2o", "prefixkv+prefixkv"])
def test_compiled_equals_oracle(llm, reference, method):
    raw = {"method": method, "budget": 80, "window": WINDOW}
    reconfigure(llm, raw)
    reference.check(raw, mixed_requests(), serve(llm, mixed_requests()))
