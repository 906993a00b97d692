# SPDX-License-Identifier: Apache-2.0
"""Packages whose folder and import name differ; everything else stands in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    # the folder keeps the name users know; the import name stays out of the way of OpenAI's
    # triton_kernels package, which vLLM looks for
    packages=[*find_packages(include=["vllm_kvcompress*"]), "vllm_kvcompress.kernels"],
    package_dir={"vllm_kvcompress.kernels": "triton_kernels"},
)
