# SPDX-License-Identifier: Apache-2.0
"""Somebody else's package brings a scorer: installed as users do, listed, tested and served."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from engine import random_prompt
from servers import Server, ends_with_error

from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError

PACKAGE = Path(__file__).parents[2] / "examples" / "method-package"
LENGTH, BUDGET = 300, 96


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> dict[str, str]:
    """Environment of processes that find the package."""
    source, target = tmp_path_factory.mktemp("source") / "package", tmp_path_factory.mktemp("site")
    shutil.copytree(PACKAGE, source)
    pip = [sys.executable, "-P", "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--target", target, source], check=True)
    return {"PYTHONPATH": str(target)}


def output_of(environment: dict[str, str], *command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-m", *command],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_without_the_package_its_name_is_unknown():
    with pytest.raises(KVCompressionError, match="unknown scorer 'keynorm'"):
        KVCompressionConfig.parse({"method": "keynorm"})


def test_tools_know_it(installed):
    listed = output_of(installed, "vllm_kvcompress.tools.main", "methods")
    assert "\n  keynorm: How small the norm of a token's key is.\n    options: power=1.0" in listed
    assert "\n  keynorm-visual: --kv-compression keynorm+adakv --kv-budget 10% " in listed


def test_its_own_tests_pass(installed):
    test = str(PACKAGE / "test_keynorm.py")
    assert "2 passed" in output_of(installed, "pytest", "-q", "-c", os.devnull, test)


def test_it_is_served(installed, checkpoint):
    server = Server(
        checkpoint("llama", layers=2),
        "--kv-compression", "keynorm+adakv", "--kv-budget", str(BUDGET),
        "--kv-compression-config", '{"power": 2}',
        **installed,
    )  # fmt: skip
    try:
        server.wait_until_ready()
        assert "scorer keynorm, allocator adakv" in server.wait_for("KV compression is on")
        body = {"prompt": random_prompt(LENGTH, 1), "max_tokens": 4, "ignore_eos": True}
        connection, response = server.request("POST", "/v1/completions", body)
        answer = json.loads(response.read())
        connection.close()
        assert answer["usage"]["completion_tokens"] == 4
        metrics = server.metrics()
        of_methods = [name for name in metrics if "kv_compression_requests_total{" in name]
        assert sum(metrics[name] for name in of_methods if '="compressed"' in name) == 1
        assert BUDGET <= metrics["vllm:kv_compression_kept_tokens_total"] < BUDGET + 32
    finally:
        server.stop()


def test_a_bad_option_is_refused_in_its_words(installed, checkpoint):
    model = checkpoint("llama", layers=2)
    flags = ("--kv-compression", "keynorm", "--kv-compression-config", '{"power": -1}')
    output = ends_with_error(model, *flags, **installed)
    assert "keynorm: power must be a number in [0, 16], got -1." in output
