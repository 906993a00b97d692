# SPDX-License-Identifier: Apache-2.0
"""Builds the CUDA operations into a folder, from the sources and with the flags of setup.py."""

import argparse
import importlib.util
import os
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

from gpucheck.steps import NOT_RUN

EXTENSION = "vllm_kvcompress._cuda"


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
    """Compile the extension of ``root``'s setup.py, and no other, into ``target``; load it.

    Raises:
        RuntimeError, OSError: it does not compile, or not load.
    """
    import setuptools
    import torch

    arguments: dict[str, Any] = {}
    setuptools.setup = arguments.update
    os.environ["KVCOMPRESS_CUDA"] = "1"
    os.chdir(root)  # paths in setup.py are relative
    runpy.run_path("setup.py")
    modules = [module for module in arguments["ext_modules"] if module.name == EXTENSION]
    assert len(modules) == 1, "setup.py has no such extension"
    distribution = setuptools.Distribution(
        {"ext_modules": modules, "cmdclass": arguments["cmdclass"]}
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
