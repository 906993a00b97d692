# SPDX-License-Identifier: Apache-2.0
"""What a number was measured on."""

import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
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
    """Write the facts into a JSON file, or say what is missing."""
    device, file = sys.argv[1], Path(sys.argv[2])
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"not importable here: {', '.join(missing)}; hand them over with --packages")
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no GPU; --rehearse runs what can run without one")
    found = facts(device)
    programs = ("make", "nvcc", "compute-sanitizer", "ncu")
    found["programs"] = " ".join(name for name in programs if shutil.which(name))
    found["clocks"] = gpu_query("clocks.sm,clocks.max.sm,clocks.mem") if device == "cuda" else ""
    file.write_text(json.dumps(found, indent=2) + "\n")
    print("==", ", ".join(f"{key} {value}" for key, value in found.items() if value), flush=True)
    if device == "cuda":
        from vllm import _custom_ops
        from vllm.vllm_flash_attn import is_fa_version_supported

        ones = torch.ones(4, 256, dtype=torch.bfloat16, device=device)
        result = torch.zeros_like(ones)
        _custom_ops.rms_norm(result, ones, ones[0], 1e-6)
        assert torch.equal(result, ones), "vLLM's own kernels are wrong here"
        print(f"== vLLM's kernels run; FlashAttention 3: {is_fa_version_supported(3)}", flush=True)


if __name__ == "__main__":
    main()
