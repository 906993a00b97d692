# SPDX-License-Identifier: Apache-2.0
"""Model Runner V2, the default on GPUs, run on the CPU through Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    "cases", ["runner_v2_cases.py", "runner_v2_methods.py", "triton_attention_cases.py"]
)
def test_runner_v2(cases):
    result = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "-x", "--durations=0",
         str(HERE / cases)],
        env=os.environ | {
            "PYTHONPATH": str(HERE / "triton_on_cpu"),
            "TRITON_INTERPRET": "1",
            "VLLM_USE_V2_MODEL_RUNNER": "1",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-3000:]
    print(result.stdout[-3000:])
