# SPDX-License-Identifier: Apache-2.0
"""The step of the GPU check that builds the CUDA operations: with a fake compiler, or none."""

import os
import subprocess
import sys
import time
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import gpu_check
from conftest import ROOT
from gpucheck.lists import CUDA_BUILD, LISTS, Machine
from gpucheck.steps import Run, Step

NVCC = """#!{python}
import pathlib, sys
if "--version" in sys.argv:
    print("release {version}, V{version}.0")
elif "-o" in sys.argv:
    pathlib.Path({record!r}).write_text(" ".join(sys.argv))
    {act}
    pathlib.Path(sys.argv[sys.argv.index("-o") + 1]).touch()
"""


def listed(tmp_path) -> dict[str, Step]:
    """The second list as a GPU gets it."""
    machine = Machine(ROOT, tmp_path, tmp_path, "cuda", False, None, None)
    return {step.name: step for stage in LISTS["second"](machine) for step in stage}


def build(tmp_path, **home):
    """Run the step as the check does, with a torch that thinks it was built for CUDA."""
    site = tmp_path / "site"
    site.mkdir()
    torch_with_cuda = ["import torch", "torch.cuda._is_compiled = lambda: True",
                       "torch.cuda.is_available = lambda: False",
                       "torch.version.cuda = '13.0'"]  # fmt: skip
    (site / "sitecustomize.py").write_text("\n".join(torch_with_cuda))
    paths = os.pathsep.join([str(site), str(ROOT / "benchmarks")])
    env = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH")}
    now = time.monotonic()
    run = Run(tmp_path, env | {"PYTHONPATH": paths} | home, now, now + 300)
    step = listed(tmp_path)[CUDA_BUILD]
    run.together([step, Step("uses it", [sys.executable, "-c", ""], 30, needs=step.name)])
    return run.outcomes


def toolkit(tmp_path, act, version="13.0"):
    home = tmp_path / "toolkit"
    (home / "bin").mkdir(parents=True)
    (home / "lib64").mkdir()
    nvcc = home / "bin" / "nvcc"
    record = str(tmp_path / "record")
    nvcc.write_text(NVCC.format(python=sys.executable, record=record, act=act, version=version))
    nvcc.chmod(0o755)
    return str(home)


def test_no_compiler(tmp_path):
    built, user = build(tmp_path, CUDA_HOME=str(tmp_path))
    assert (built.outcome, built.note) == ("not run", f"no nvcc in {tmp_path}/bin")
    assert (user.outcome, user.note) == (
        "not run",
        f"{built.step} {built.outcome}: {built.note}",
    )


def test_torch_without_cuda(tmp_path):
    """As it is here, and in a rehearsal."""
    now, env = time.monotonic(), os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")}
    run = Run(tmp_path, env, now, now + 300)
    run.together([listed(tmp_path)[CUDA_BUILD]])
    assert run.outcomes[0].outcome == "not run"
    assert run.outcomes[0].note == "this torch was built without CUDA"


def test_compiles_the_experiments(tmp_path):
    """The compiler gets the sources of the experiments, and no others."""
    home = toolkit(tmp_path, "sys.exit('x.cu(7): error: identifier is undefined')")
    built, user = build(tmp_path, CUDA_HOME=home)
    called = (tmp_path / "record").read_text()
    assert str(ROOT / "benchmarks/experiments/cuda/select_tokens.cu") in called
    assert "compute_90" in called
    assert "-std=c++20" in called
    assert "csrc/cpu" not in called
    assert built.outcome == "failed"
    assert "identifier is undefined" in built.note
    assert (user.outcome, user.note) == (
        "not run",
        f"{built.step} {built.outcome}: {built.note}",
    )


def test_other_toolkit_than_torch(tmp_path):
    built, _ = build(tmp_path, CUDA_HOME=toolkit(tmp_path, "pass", "11.8"))
    assert built.outcome == "failed"
    assert not (tmp_path / "record").exists()


def test_only_what_needs_the_build_waits_for_it(tmp_path):
    waiting = {name for name, step in listed(tmp_path).items() if step.needs == CUDA_BUILD}
    assert "test-cuda_selection" in waiting
    assert all(name.endswith(("-cuda", "cuda_selection")) for name in waiting)


def test_children_of_steps_find_the_copy_too(tmp_path, monkeypatch):
    """vLLM starts interpreters without -P, in the folder of the checkout."""
    monkeypatch.setattr(gpu_check, "CACHE", tmp_path)
    env = gpu_check.environment(rehearse=False)
    command = [sys.executable, "-c", "import vllm_kvcompress.kernels as k; print(k.__file__)"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "plugin")


def test_a_copy_of_the_checkout_goes_first(tmp_path, monkeypatch):
    """On a GPU what is built lies in the copy; a rehearsal wants the installed C++ operations."""
    monkeypatch.setattr(gpu_check, "CACHE", tmp_path)
    first, *_ = gpu_check.environment(rehearse=False)["PYTHONPATH"].split(os.pathsep)
    assert first == str(tmp_path / "plugin")
    library = tmp_path / "plugin" / "vllm_kvcompress" / f"_cuda{EXTENSION_SUFFIXES[0]}"
    library.touch()
    code = "import importlib.util as u; print(u.find_spec('vllm_kvcompress._cuda').origin)"
    env = os.environ | {"PYTHONPATH": first}
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(library)
    paths = gpu_check.environment(rehearse=True)["PYTHONPATH"].split(os.pathsep)
    assert first not in paths
