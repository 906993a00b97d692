# SPDX-License-Identifier: Apache-2.0
"""Settings of the test process, made before anything imports torch or vLLM."""

import logging
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# vLLM looks for OpenAI's package of this name: ours must not be found under it
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # engines live in this process, where tests can look
    VLLM_CPU_CI_ENV="1",  # compiles less
    VLLM_CPU_OMP_THREADS_BIND="nobind",  # two ranks must share the cores of a small machine
    TOKENIZERS_PARALLELISM="false",
)
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: threads only get in each other's way
logging.getLogger("torch.__trace").propagate = False  # structured traces are no log lines
os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)


@pytest.fixture(scope="session")
def checkpoint():
    """``checkpoint(family, **settings)``: folder of a tiny random model, made once and kept."""
    import tiny_families  # noqa: F401, makes its families known to tiny_models
    import tiny_models

    def make(family: str, **settings) -> str:
        return str(tiny_models.make(family, ROOT / ".cache" / "models", **settings))

    return make


@pytest.fixture(scope="session")
def docvqa() -> str:
    """Folder of the small trained model that reads codes off pages."""
    return str(ROOT / "examples" / "tiny-docvqa" / "model")


@pytest.fixture(scope="session")
def make_page():
    """``make_page(seed)``: a page, a question about it and the answer."""
    folder = str(ROOT / "examples" / "tiny-docvqa")
    sys.path.append(folder)
    try:
        from pages import make_page
    finally:
        sys.path.remove(folder)
    return make_page
