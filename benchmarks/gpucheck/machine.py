# SPDX-License-Identifier: Apache-2.0
"""What a number was measured on."""

import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

PACKAGES = ("torch", "triton", "vllm", "transformers", "numpy", "vllm-kvcompress")


def installed_version(package: str) -> str:
    """Empty where the package is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line for line in lines if line.startswith("model name")]
    return models[0].partition(":")[2].strip() if models else platform.machine()


def gpu_query(field: str) -> str:
    """One field of ``nvidia-smi --query-gpu`` for the first GPU; empty where there is none."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def facts(device: str) -> dict[str, str]:
    """Hardware and versions, in the order of a table's columns.

    Args:
        device: "cuda" or "cpu", where the work is done.
    """
    import torch

    on_gpu = device == "cuda"
    versions = {name.replace("-", "_"): installed_version(name) for name in PACKAGES}
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if on_gpu else cpu_name(),
        "memory_gib": f"{torch.cuda.mem_get_info()[1] / 2**30:.0f}" if on_gpu else "",
        "driver": gpu_query("driver_version") if on_gpu else "",
        "cuda": torch.version.cuda or "",
        "cores": str(len(os.sched_getaffinity(0))),
        "python": platform.python_version(),
        **versions,
    }


NEEDED = ("torch", "triton", "vllm", "transformers", "safetensors", "pytest", "hypothesis", "PIL")


def main() -> None:
    """Print the facts as JSON, or say what is missing."""
    device = sys.argv[1]
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"not importable here: {', '.join(missing)}; hand them over with --packages")
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no GPU; --rehearse runs what can run without one")
    print(json.dumps(facts(device)))


if __name__ == "__main__":
    main()
