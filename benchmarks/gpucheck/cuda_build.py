# SPDX-License-Identifier: Apache-2.0
"""Builds the CUDA operations of ``experiments`` into a folder."""

import argparse
import importlib.util
import shutil
import sys
from pathlib import Path

from gpucheck.steps import NOT_RUN

EXTENSION = "vllm_kvcompress._cuda"
SOURCES = "benchmarks/experiments/cuda"


def obstacle() -> str | None:
    """Why nothing can be built here; None if it can."""
    if importlib.util.find_spec("setuptools") is None:
        return "setuptools is not importable here"
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if CUDA_HOME is None:
        return "no CUDA toolkit: CUDA_HOME is not set, and there is no nvcc in PATH"
    if shutil.which("nvcc", path=f"{CUDA_HOME}/bin") is None:
        return f"no nvcc in {CUDA_HOME}/bin"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
        return "thread-block clusters begin with sm_90, which is newer than this GPU"
    return None


def build(root: Path, target: Path, scratch: Path) -> None:
    """Compile the extension, below ``root``, into ``target``; load it.

    Raises:
        RuntimeError, OSError: it does not compile, or not load.
    """
    import setuptools
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension

    # thread-block clusters begin with sm_90; later GPUs compile the PTX
    target_gpu = "-gencode=arch=compute_90,code=[sm_90,compute_90]"
    module = CppExtension(
        EXTENSION,
        [str(path) for path in sorted((root / SOURCES).glob("*.cu"))],
        include_dirs=[f"{CUDA_HOME}/include"],
        library_dirs=[f"{CUDA_HOME}/lib64"],
        libraries=["cudart"],
        extra_compile_args={"cxx": [], "nvcc": ["-O3", "-std=c++20", target_gpu]},
    )
    distribution = setuptools.Distribution(
        {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}
    )
    command = distribution.get_command_obj("build_ext")
    command.build_lib, command.build_temp = str(target), str(scratch)
    command.ensure_finalized()
    command.run()
    torch.ops.load_library(command.get_ext_fullpath(EXTENSION))


def main() -> None:
    """Build, or leave with ``NOT_RUN`` and the reason as last line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", type=Path, required=True, help="of the checkout")
    parser.add_argument("--into", type=Path, required=True, help="holds the package")
    parser.add_argument("--scratch", type=Path, required=True, help="for object files")
    args = parser.parse_args()
    why = obstacle()
    if why is not None:
        print(why)
        sys.exit(NOT_RUN)
    build(args.root, args.into.resolve(), args.scratch.resolve())


if __name__ == "__main__":
    main()
