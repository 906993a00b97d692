# SPDX-License-Identifier: Apache-2.0
"""Does the plugin work on this GPU, and how fast is it? One command, no network, 8 minutes at most.

    python benchmarks/gpu_check.py --packages DIR
    python benchmarks/gpu_check.py --rehearse           # without a GPU: are all parts in order?

    kernels   the CUDA operations, if there is nvcc; tests/kernels compiled; random compactions;
              compute-sanitizer, if it is installed
    engines   vLLM in process against stock vLLM and against the float64 reference
    timing    every operation at the shapes of well-known models
    serving   with and without compression, in pairs, on a model with random weights

The run stops at the first failure. See docs/gpu-check.md.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from gpucheck.packages import import_path, stage_plugin
from gpucheck.steps import Run, Step

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "gpu-check"
PLUGIN = CACHE / "plugin"
STAGES = ("kernels", "engines", "timing", "serving")
TIMED = ("timing", "serving")  # these have the machine to themselves
CUDA_BUILD = "cuda-build"
WITH_CUDA = ("kernels", "timing")  # stages that use what it builds
CASES = (  # model runner, mode, type, type of the KV cache
    ("V2", "full", "float16", "auto"),
    ("V1", "full", "float16", "auto"),
    ("V2", "eager", "float16", "auto"),
    ("V1", "eager", "float16", "auto"),
    ("V2", "piecewise", "float16", "auto"),
    ("V1", "piecewise", "float16", "auto"),
    ("V2", "full", "bfloat16", "auto"),
    ("V2", "full-decode", "float16", "auto"),
    ("V2", "full", "bfloat16", "fp8"),
)
REHEARSED_CASES = (
    ("V1", "eager", "float32", "auto"),
    ("V2", "eager", "float32", "auto"),
    ("V1", "eager", "float32", "fp8"),
)
NOT_ON_A_GPU = ("test_reference.py", "test_native*.py", "test_ahead_of_time.py")
CUDA_TEST = "test_cuda_selection"
PYTHON = [sys.executable, "-P"]


def environment(packages: Path | None, rehearse: bool) -> dict[str, str]:
    """For all children: where to import from, and nothing that asks a network."""
    # a rehearsal wants the C++ operations, which are built by installing
    installed = rehearse and importlib.util.find_spec("vllm_kvcompress") is not None
    paths = [] if installed else [stage_plugin(ROOT, PLUGIN)]
    if packages is not None:
        paths.append(import_path(packages, CACHE / "site"))
    paths += [ROOT / "benchmarks", ROOT / "tests", ROOT / "tests" / "integration"]
    entries = [*(str(path) for path in paths if path), *filter(None, [os.getenv("PYTHONPATH")])]
    return {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {
        "PYTHONPATH": os.pathsep.join(entries),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",  # a package of its own
        "VLLM_LOGGING_LEVEL": "INFO",  # the start-up line goes into the logs
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }


def find_sanitizer() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [str(Path(home) / "bin") for home in homes if home]
    search = os.pathsep.join([os.environ.get("PATH", ""), *folders])
    return shutil.which("compute-sanitizer", path=search)


def cuda_build(plugin: Path) -> Step:
    """Building csrc/cuda into a copy of the plugin; without it the rest of the check goes on."""
    command = ["-m", "gpucheck.cuda_build", "--root", str(ROOT), "--into", str(plugin)]
    command += ["--scratch", str(plugin.with_name(CUDA_BUILD))]
    return Step(CUDA_BUILD, [*PYTHON, *command], 90, fatal=())


def kernel_steps(folder: Path, rehearse: bool) -> list[Step]:
    pytest = ["-m", "pytest", "-x", "-p", "no:cacheprovider", "--durations=5"]
    stress = ["-m", "gpucheck.stress"]
    few = [*stress, "--small", "--rounds"]
    # a process per file, side by side: most of their time goes into compiling variants of kernels
    files = sorted((ROOT / "tests" / "kernels").glob("test_*.py"))
    tests = [
        Step(file.stem, [*PYTHON, *pytest, str(file)], 150)
        for file in files
        if file.stem != CUDA_TEST and not any(map(file.match, NOT_ON_A_GPU))
    ]
    in_cuda = [*PYTHON, *pytest, str(ROOT / "tests" / "kernels" / f"{CUDA_TEST}.py")]
    # no engine uses it yet, so a failure does not keep the rest from being checked
    selection = Step(CUDA_TEST, in_cuda, 90, fatal=(), needs=CUDA_BUILD)
    if rehearse:
        compactions = Step("compactions", [*PYTHON, *few, "20", "--interpret"], 120)
        return [*tests, compactions, selection]
    steps = [*tests, Step("compactions", [*PYTHON, *stress], 90), selection]
    sanitizer = find_sanitizer()
    if sanitizer is None:
        note = "compute-sanitizer was not found: nothing was checked with it"
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        (folder / "logs" / "sanitizer.txt").write_text(note + "\n")
        print(note, flush=True)
        return steps
    tool = [sanitizer, "--target-processes", "all", "--error-exitcode", "9", "--tool"]
    every = [str(ROOT / "benchmarks" / "kernel_bench.py"), "--quick", "--ours-only"]
    every += ["--out", str(CACHE / "sanitizer.csv")]  # its times mean nothing
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else neighbours in a pool hide a wrong address
    found = ("failed",)  # a slow tool says nothing about us
    return [
        *steps,
        Step("memcheck-operations", [*tool, "memcheck", *PYTHON, *every], 45, env, found),
        Step("memcheck-compactions", [*tool, "memcheck", *PYTHON, *few, "3"], 45, env, found),
        # for reading only: it also looks at kernels that are not ours
        Step("racecheck-operations", [*tool, "racecheck", *PYTHON, *every], 45, env, ()),
        *(
            Step(f"{check}-cuda", [*tool, check, *in_cuda, "-k", "4097"], 45, env, (), CUDA_BUILD)
            for check in ("memcheck", "racecheck")
        ),
    ]


def engine_steps(folder: Path, rehearse: bool) -> list[Step]:
    steps = []
    for runner, mode, dtype, cache in REHEARSED_CASES if rehearse else CASES:
        name = f"{runner}-{mode}-{dtype}" + ("" if cache == "auto" else f"-{cache}")
        out = folder / "engines" / f"{name}.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        command = ["-m", "gpucheck.engines", "--runner", runner, "--mode", mode, "--dtype", dtype]
        command += ["--cache", cache]
        command += ["--models", str(CACHE / "models" / name), "--out", str(out)]
        command += ["--cpu"] if rehearse else []
        steps.append(Step(name, [*PYTHON, *command], 200))
    return steps


def timing_steps(folder: Path, rehearse: bool) -> list[Step]:
    command = [str(ROOT / "benchmarks" / "kernel_bench.py"), "--out", str(folder / "kernels.csv")]
    command += ["--device", "cpu", "--quick"] if rehearse else ["--seconds", "60"]
    return [Step("kernel-times", [*PYTHON, *command], 100)]


def serving_steps(folder: Path, rehearse: bool) -> list[Step]:
    command = [str(ROOT / "benchmarks" / "serving.py"), "--dummy", "llama-3.1-8b"]
    command += ["--out", str(folder / "serving")]
    if rehearse:
        command += ["--quick", "--workloads", "roomy"]
    else:
        command += ["--device", "cuda", "--workloads", "tight", "--rounds", "1", "--requests", "16"]
        command += ["--output-tokens", "256", "--single", "2048", "8192"]
    return [Step("serving-pair", [*PYTHON, *command], 200)]


STEPS = {
    "kernels": kernel_steps,
    "engines": engine_steps,
    "timing": timing_steps,
    "serving": serving_steps,
}


def machine_facts(device: str, env: dict[str, str]) -> dict[str, str]:
    """Hardware and versions as the children see them; ends the run where something is missing."""
    command = [*PYTHON, "-m", "gpucheck.machine", device]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def result_folder(out: Path, facts: dict[str, str]) -> Path:
    """``gpu_<name>_<date>``, and a number where there is one already."""
    name = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    base = out / f"gpu_{name}_{facts['date']}"
    folders = [base, *(base.with_name(f"{base.name}_{number}") for number in range(2, 100))]
    return next(folder for folder in folders if not folder.exists())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--packages", type=Path, metavar="DIR",
                        help="what this machine lacks: wheels, or packages to import")  # fmt: skip
    parser.add_argument("--rehearse", action="store_true", help="run what needs no GPU")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument(
        "--jobs", type=int, help="processes at the same time; default: cores / 2, 8 at most"
    )
    parser.add_argument("--minutes", type=float, help="of the whole run; default: 8")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    start = time.monotonic()
    env = environment(args.packages, args.rehearse)
    facts = machine_facts("cpu" if args.rehearse else "cuda", env)
    if args.rehearse:
        folder = CACHE / "rehearsal"
        shutil.rmtree(folder, ignore_errors=True)
        print("A REHEARSAL: no GPU is used, and no number that comes out of it means anything.")
    else:
        folder = result_folder(args.out.resolve(), facts)
    folder.mkdir(parents=True)
    versions = facts | {"rehearsal": args.rehearse}
    (folder / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")
    print(", ".join(f"{key} {value}" for key, value in facts.items() if value), flush=True)

    patience = 3 if args.rehearse else 1  # small machines, with other work to do
    run = Run(folder, env, start + 60 * (args.minutes or 8.0 * patience))
    jobs = args.jobs or min(max(1, len(os.sched_getaffinity(0)) // 2), 8)
    passed = True
    for stage in STAGES:
        if passed and stage in args.stages:
            steps = STEPS[stage](folder, args.rehearse)
            if stage in WITH_CUDA and not run.result(CUDA_BUILD):
                steps.insert(0, cuda_build(PLUGIN))
            if run.result(CUDA_TEST) in ("failed", "out of time"):
                # a wrong kernel may take the process of all timings with it
                for library in (PLUGIN / "vllm_kvcompress").glob("_cuda*"):
                    library.unlink()
            steps = [step._replace(seconds=patience * step.seconds) for step in steps]
            passed = run.stage(stage, steps, 1 if stage in TIMED else jobs)
    what = "rehearsal" if args.rehearse else "GPU check"
    gaps = [outcome for outcome in run.outcomes if outcome.outcome != "passed"]
    if gaps:
        print("Not everything was checked:", *gaps, sep="\n")
    print(f"The {what} {'passed' if passed else 'FAILED'} in {time.monotonic() - start:.0f} s.")
    print(f"Logs and tables: {folder}")
    sys.exit(not passed)


if __name__ == "__main__":
    main()
