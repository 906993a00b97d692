# SPDX-License-Identifier: Apache-2.0
"""The steps of ``gpu_check.py``: stages in their order, and what runs side by side in each."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from gpucheck.steps import Step

PYTHON = [sys.executable, "-P"]
TESTED_FIRST = (
    "window_scores", "bacon_calibrate", "select_tokens", "compact_pages", "page_tables",
    "head_counts", "float8",
)  # fmt: skip
"""Files of tests/kernels for what every compression launches."""
NOT_ON_A_GPU = ("ahead_of_time", "cuda_selection", "launches", "native*", "reference*")
REHEARSED = ("page_tables", "head_counts")
"""Of these files: the others show the same, for minutes."""
CUDA_BUILD = "cuda-build"
EXPECTED = {"fails-on-purpose": "failed", "hangs-on-purpose": "out of time"}
"""Outcomes of the steps of a rehearsal that must not pass."""

Stage = list[Step]


class Machine(NamedTuple):
    """Where the steps run.

    Attributes:
        root: of the checkout.
        cache: for what is made there and not carried away.
        folder: for results.
        device: "cuda" or "cpu".
        rehearse: small shapes instead of those of real models.
        packages: what the machine lacks.
        model: a checkpoint that answers questions about a text.
    """

    root: Path
    cache: Path
    folder: Path
    device: str
    rehearse: bool
    packages: Path | None
    model: Path | None

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def python(self, name: str, seconds: float, *arguments: object, **fields: object) -> Step:
        """A step that runs a script of benchmarks/ or ``-m`` a module."""
        words = [str(word) for word in arguments]
        if words[0].endswith(".py"):
            words[0] = str(self.root / "benchmarks" / words[0])
        return Step(name, [*PYTHON, *words], seconds, **fields)  # type: ignore[arg-type]


def prepared(m: Machine) -> list[Stage]:
    """What everything else needs."""
    site = m.cache / "site"
    module = ("-m", "gpucheck.packages", m.packages, site)
    facts = ("-m", "gpucheck.machine", m.device, m.folder / "versions.json")
    unpack = [[m.python("unpack", 90, *module)]] if m.packages else []
    return [*unpack, [m.python("machine", 60, *facts)]]


def engine(
    m: Machine, runner: str, mode: str, dtype: str, *checks: str, cache: str = "auto"
) -> Step:
    """One configuration of vLLM against the reference; without a GPU all modes are one."""
    if m.rehearse:
        dtype = "float32"
    if not m.on_gpu:
        mode = "eager"
    name = "-".join(["engine", runner, mode, dtype, *([cache] if cache != "auto" else []), *checks])
    words = ["-m", "gpucheck.engines", "--runner", runner, "--mode", mode, "--dtype", dtype]
    words += ["--cache", cache, "--checks", *checks, "--models", str(m.cache / "models" / name)]
    words += ["--out", str(m.folder / f"{name}.json"), *([] if m.on_gpu else ["--cpu"])]
    return m.python(name, 180, *words)


def unlike(*steps: Step) -> Stage:
    """Steps by name: without a GPU some are the same."""
    return list({step.name: step for step in steps}.values())


def kernel_tests(m: Machine, names: list[str]) -> Stage:
    """A process per file: most of their time goes into compiling variants of kernels."""
    pytest = ("-m", "pytest", "-q", "--tb=short", "--maxfail=5", "-p", "no:cacheprovider")
    folder = m.root / "tests" / "kernels"
    names = [name for name in names if not m.rehearse or name in REHEARSED]
    return [m.python(f"test-{name}", 140, *pytest, folder / f"test_{name}.py") for name in names]


def on_purpose(m: Machine) -> Stage:
    """A rehearsal shows that neither of them keeps anything else from running."""
    if not m.rehearse:
        return []
    fails, hangs = EXPECTED
    return [
        m.python(fails, 30, "-c", "print('== half a result'); raise SystemExit('on purpose')"),
        m.python(hangs, 2, "-c", "import time; print('== half a result'); time.sleep(3600)"),
    ]


def accuracy(m: Machine, name: str, seconds: float, *arguments: object) -> Step:
    words = ("-m", "gpucheck.accuracy", "--device", m.device, "--out", m.folder / f"{name}.csv")
    return m.python(name, seconds, *words, *arguments)


def serving(m: Machine, model: str, *arguments: object) -> Step:
    """Stock and compressing engines in pairs, random weights."""
    name = f"serving-{model}"
    words = ["serving.py", "--device", m.device, "--dummy", model, "--fast-start"]
    words += ["--out", m.folder / name, *(["--quick"] if m.rehearse else arguments)]
    return m.python(name, 120, *words, "--workloads", "tight", "roomy")


def first(m: Machine) -> list[Stage]:
    """From a bare machine to the facts that decide most, in 9 minutes."""
    small = ["--small"] if m.rehearse else []
    per_head = ["-m", "gpucheck.per_head_decode", "--out", m.folder / "per_head_decode.csv"]
    per_head += small if m.on_gpu else ["--cpu"]
    profile = ["-m", "gpucheck.profile_step", "--device", m.device, "--out", m.folder, *small]
    # three and a half prompts fit "tight"; two models of 8B side by side leave room for this much
    load = ("--rounds", 2, "--requests", 12, "--prompt-tokens", 8192, "--output-tokens", 256)
    load += ("--budgets", "25%", "10%", "--single", 8192)
    return [
        *prepared(m),
        [m.python("per-head-decode", 60, *per_head)],
        # nothing is timed here
        [
            *unlike(
                engine(m, "V2", "full", "float16", "budget"),
                engine(m, "V2", "eager", "float16", "budget"),
                engine(m, "V2", "full", "float16", "covers", "pressure"),
            ),
            accuracy(m, "docvqa", 120, "--count", 2 if m.rehearse else 24),
            *kernel_tests(m, list(TESTED_FIRST)),
            *on_purpose(m),
        ],
        [m.python("profile", 100, *profile)],
        [serving(m, "llama-3.1-8b", *load)],
        [kernel_times(m, "kernel-times", 60, "--models", "qwen2-vl-7b")],
        [serving(m, "qwen2-vl-7b", *load)],
    ]


def kernel_times(m: Machine, name: str, seconds: float, *arguments: object) -> Step:
    """Ends by itself, some seconds before its limit."""
    words = ("kernel_bench.py", "--device", m.device, "--out", m.folder / f"{name}.csv")
    scope = ("--quick",) if m.rehearse else ("--seconds", seconds, *arguments)
    return m.python(name, seconds + 20, *words, *scope)


def second(m: Machine) -> list[Stage]:
    """What remains, on the same machine or another one."""
    plugin = m.cache / "plugin"
    build = ("-m", "gpucheck.cuda_build", "--root", m.root, "--into", plugin)
    build += ("--scratch", m.cache / CUDA_BUILD)
    every = sorted(
        path.stem.removeprefix("test_") for path in (m.root / "tests/kernels").glob("test_*.py")
    )
    others = [
        name
        for name in every
        if name not in TESTED_FIRST
        and not any(Path(name).match(pattern) for pattern in NOT_ON_A_GPU)
    ]
    selection = kernel_tests(m._replace(rehearse=False), ["cuda_selection"])
    stress = ["-m", "gpucheck.stress"]
    stress += ["--rounds", 10, "--small"] if m.rehearse else ["--rounds", 10_000]
    stress += [] if m.on_gpu else ["--interpret"]
    sweep = ["sweep.py", "--device", m.device, "--dummy", "llama-3.1-8b"]
    sweep += ["--out", m.folder / "sweep.csv", *(["--quick"] if m.rehearse else [])]
    pages, needles = ("--count", 2 if m.rehearse else 200), ("--task", "needles", "--count", 40)
    return [
        *prepared(m),
        [
            *unlike(
                engine(m, "V1", "full", "float16", "budget", "pressure"),
                engine(m, "V2", "full", "float16", "methods"),
                engine(m, "V2", "full", "bfloat16", "budget", cache="fp8"),
                engine(m, "V2", "full", "bfloat16", "budget"),
                engine(m, "V1", "eager", "float16", "budget"),
                engine(m, "V2", "piecewise", "float16", "budget"),
            ),
            accuracy(m, "docvqa-accuracy", 150, *pages, "--methods", "bacon", "bacon+adakv",
                     "snapkv", "streaming", "--budgets", 64, 96, 128),
            *([accuracy(m, "needles", 150, *needles, "--model", m.model)] if m.model else []),
            m.python(CUDA_BUILD, 90, *build),
            *(step._replace(needs=CUDA_BUILD) for step in selection),
            m.python("compactions", 100, *stress),
            *kernel_tests(m, others),
            *sanitized(m),
            *on_purpose(m),
        ],
        [m.python("sweep", 240, *sweep)],
        [kernel_times(m, "kernel-times-rivals", 90, "--jit", "--models", "qwen2-vl-7b",
                      "llava-next-mistral-7b", "--operations", "paged_decode", "select_tokens")],
    ]  # fmt: skip


def sanitized(m: Machine) -> Stage:
    """compute-sanitizer over small shapes, where there is one."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [str(Path(home) / "bin") for home in homes if home]
    search = os.pathsep.join([os.environ.get("PATH", ""), *folders])
    program = shutil.which("compute-sanitizer", path=search)
    if program is None or not m.on_gpu or m.rehearse:
        return []
    tool = [program, "--target-processes", "all", "--error-exitcode", "9", "--tool"]
    bench = [str(m.root / "benchmarks" / "kernel_bench.py"), "--quick", "--ours-only"]
    bench += ["--out", str(m.cache / "sanitizer.csv")]  # its times mean nothing
    stress = ["-m", "gpucheck.stress", "--small", "--rounds", "3"]
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else neighbours in a pool hide a wrong address
    selection = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "4097"]
    selection += [str(m.root / "tests" / "kernels" / "test_cuda_selection.py")]
    return [
        Step("memcheck-operations", [*tool, "memcheck", *PYTHON, *bench], 100, env),
        Step("memcheck-compactions", [*tool, "memcheck", *PYTHON, *stress], 60, env),
        # for reading only: it also looks at kernels that are not ours
        Step("racecheck-operations", [*tool, "racecheck", *PYTHON, *bench], 100, env),
        Step("memcheck-cuda", [*tool, "memcheck", *PYTHON, *selection], 60, env, CUDA_BUILD),
    ]


LISTS: dict[str, Callable[[Machine], list[Stage]]] = {"first": first, "second": second}
