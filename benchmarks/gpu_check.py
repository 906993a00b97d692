# SPDX-License-Identifier: Apache-2.0
"""What a few minutes on a GPU can tell: is the plugin right there, and how fast?

    python benchmarks/gpu_check.py first --packages DIR --out OUT    # 9 minutes on a bare machine
    python benchmarks/gpu_check.py second --packages DIR --out OUT   # what is left to ask
    python benchmarks/gpu_check.py first --rehearse                  # without a GPU

Two lists of steps, most valuable first, for one runner (``gpucheck/steps.py``). Every step stands
alone: one that fails or hangs is recorded, and the rest goes on. Nothing is installed and no
network is asked. OUT receives one archive, rewritten every 15 seconds; a summary is printed last.
See docs/gpu-check.md.
"""

import argparse
import importlib.util
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from gpucheck.lists import EXPECTED, LISTS, Machine
from gpucheck.machine import gpu_query
from gpucheck.packages import stage_plugin
from gpucheck.steps import Archive, Run

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "gpu-check"
MINUTES = 9.0
MOST_BYTES = 15 << 20  # of the archive
PATIENCE = 4
"""Limits of a rehearsal are so many times longer: machines without a GPU are slow at this."""


def environment(rehearse: bool) -> dict[str, str]:
    """For all steps: where to import from, and nothing that asks a network."""
    # a rehearsal without any CUDA wants the C++ operations, which are built by installing
    installed = rehearse and importlib.util.find_spec("vllm_kvcompress") is not None
    paths = [] if installed else [stage_plugin(ROOT, CACHE / "plugin")]
    paths += [CACHE / "site", ROOT / "benchmarks", ROOT / "tests", ROOT / "tests" / "integration"]
    entries = [*map(str, paths), *filter(None, [os.getenv("PYTHONPATH")])]
    return {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {
        "PYTHONPATH": os.pathsep.join(entries),
        "PYTHONUNBUFFERED": "1",
        # vLLM starts processes of its own, which must not find this checkout's folders as packages
        "PYTHONSAFEPATH": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",  # a package of its own
        "VLLM_CACHE_ROOT": str(CACHE / "vllm"),  # what one step has compiled the next need not
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }


def result_folder(name: str, device: str) -> Path:
    """Empty, ``gpu_<device>_<date>_<list>``."""
    words = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    folder = CACHE / name / f"gpu_{words}_{time.strftime('%Y-%m-%d')}_{name}"
    shutil.rmtree(folder.parent, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def main() -> None:
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("list", choices=LISTS)
    parser.add_argument("--packages", type=Path, metavar="DIR",
                        help="what it lacks: wheels, an unbundle.sh, or packages")  # fmt: skip
    parser.add_argument("--out", type=Path, default=CACHE, help="folder for the archive")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of the whole run")
    parser.add_argument("--rehearse", action="store_true", help="small shapes; no GPU is needed")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cpu in a rehearsal")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="leave out all other steps")
    parser.add_argument("--jobs", type=int, help="of steps that time nothing; default: all cores")
    parser.add_argument("--model", type=Path, help="SmolLM2 or the like, for its accuracy")
    args = parser.parse_args()
    device = args.device or ("cpu" if args.rehearse else "cuda")
    name = "rehearsal" if args.rehearse else gpu_query("name") or "unknown"
    folder = result_folder(args.list, name)
    if args.rehearse:
        print("A REHEARSAL: no number that comes out of it means anything.")
    machine = Machine(ROOT, CACHE, folder, device, args.rehearse, args.packages, args.model)
    patience = PATIENCE if args.rehearse else 1
    jobs = args.jobs or len(os.sched_getaffinity(0))
    run = Run(folder, environment(args.rehearse), start, start + 60 * args.minutes * patience)

    def stop(*_: Any) -> None:  # what there is gets archived and told first
        run.stop()  # raising here would leave the runner's threads behind, and their processes

    signal.signal(signal.SIGTERM, stop)
    stages = LISTS[args.list](machine)
    try:
        with Archive(folder, args.out / f"gpu-{args.list}.tar.gz", MOST_BYTES):
            for stage in stages:
                steps = [
                    step._replace(seconds=patience * step.seconds)
                    for step in stage
                    if not args.only or step.name in args.only
                ]
                run.together(steps, jobs)
    finally:
        print(*run.summary(), sep="\n", flush=True)
    if run.stopped:
        sys.exit(143)
    sys.exit(
        any(o.outcome not in (EXPECTED.get(o.step, "passed"), "not run") for o in run.outcomes)
    )


if __name__ == "__main__":
    main()
