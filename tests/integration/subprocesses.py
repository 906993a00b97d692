# SPDX-License-Identifier: Apache-2.0
"""Python in a fresh process, for tests that need another environment."""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def run_python(code: str, *, timeout: float = 300, **env: str) -> subprocess.CompletedProcess:
    """Run ``code`` with the helpers of this folder importable; output is captured as text.

    A ``sitecustomize`` for it can be named by folder: ``PYTHONPATH=...``.
    """
    head = f"import sys; sys.path[:0] = [{str(HERE)!r}, {str(HERE.parent)!r}]\n"
    return subprocess.run(
        [sys.executable, "-P", "-c", head + code],
        env=os.environ | env,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )


def result_of(done: subprocess.CompletedProcess):
    """What the code printed as JSON on its last line."""
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(done.stdout.strip().splitlines()[-1])
