# SPDX-License-Identifier: Apache-2.0
"""Without a GPU, Triton kernels run in its interpreter; property tests repeat their cases."""

import os
import sys

import pytest
import torch
from hypothesis import settings

settings.load_profile("ci")

if not torch.cuda.is_available():
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError(
            "Triton was loaded for compilation already: run tests/kernels in a process of its own"
        )
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that nobody has written is NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def cpp() -> None:
    """The C++ operations. They are for CPUs: where there is a GPU they need not be built."""
    from vllm_kvcompress.kernels import native

    if torch.cuda.is_available():
        pytest.skip("C++ is for CPUs")
    assert native.available(), "csrc/ was not built: install with --no-build-isolation"


@pytest.fixture(params=["one program", "tiles"])
def programs(request, monkeypatch):
    """Rows by one program each, and by one per tile."""
    from vllm_kvcompress.kernels import tiled_radix  # imports Triton, as above

    if request.param == "tiles":
        monkeypatch.setattr(tiled_radix, "LONG", 0)
        monkeypatch.setattr(tiled_radix, "TILE", 512)
