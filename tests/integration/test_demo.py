# SPDX-License-Identifier: Apache-2.0
"""What ``make demo`` runs."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_demo_passes(tmp_path):
    """As a user runs it: from the repository's root, with nothing of the tests' settings."""
    ours = ("VLLM_", "OMP_", "KVCOMPRESS_", "TRITON_", "PYTHONPATH")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    done = subprocess.run(
        [sys.executable, "examples/demo.py", "--count", "1", "--out", tmp_path],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("The demo passed.\n")
    assert "prompt tokens kept   81 of 369 per KV head\n" in done.stdout
    assert "12 before compression, 3 after; 9 went back\n" in done.stdout
