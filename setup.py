# SPDX-License-Identifier: Apache-2.0
"""Packages whose folder and import name differ, and the native operations.

The operations are built where torch can be imported, that is with ``pip install
--no-build-isolation``; without them the plain definitions run, and the start-up line says so.
"""

import importlib.util
import sys
from pathlib import Path

from setuptools import find_packages, setup

# what makes at::parallel_for parallel; the linker is not told, because the OpenMP runtime is to be
# the one that torch has loaded
THREADS = ["-fopenmp"] if sys.platform == "linux" else []


def native() -> dict:
    """Arguments of ``setup`` that build csrc/; none where torch is not at hand."""
    if importlib.util.find_spec("torch") is None:
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    cpu = CppExtension(
        "vllm_kvcompress._cpu",
        sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp")),
        extra_compile_args=["-O3", "-std=c++20", *THREADS],
        optional=True,  # a machine without a compiler gets the plain definitions
    )
    return {"ext_modules": [cpu], "cmdclass": {"build_ext": BuildExtension}}


setup(
    # the folder keeps the name users know; the import name stays out of the way of OpenAI's
    # triton_kernels package, which vLLM looks for
    packages=[*find_packages(include=["vllm_kvcompress*"]), "vllm_kvcompress.kernels"],
    package_dir={"vllm_kvcompress.kernels": "triton_kernels"},
    **native(),
)
