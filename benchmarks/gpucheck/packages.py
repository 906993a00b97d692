# SPDX-License-Identifier: Apache-2.0
"""Import paths for a machine without a network: nothing is installed, nothing is downloaded."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

DATA_FOLDERS = ("purelib", "platlib")


def unpack_wheel(wheel: Path, site: Path) -> None:
    """Put a wheel's packages and metadata into ``site``, as an installer would; no scripts.

    Raises:
        ValueError: the wheel holds a path outside of itself.
    """
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            head, _, rest = name.partition("/")
            kind, _, inner = rest.partition("/")
            if head.endswith(".data") and kind not in DATA_FOLDERS:
                continue  # scripts, headers, data files
            target = site / (inner if head.endswith(".data") else name)
            if not target.resolve().is_relative_to(site.resolve()):
                raise ValueError(f"{wheel.name} holds {name}, which lies outside of it")
            if name.endswith("/"):
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink)


def unpack(packages: Path, site: Path) -> None:
    """Make ``packages`` importable from ``site``: wheels that it holds, or what its ``unbundle.sh``
    puts there, or else itself.

    Raises:
        ValueError: ``packages`` is no folder.
        subprocess.CalledProcessError: ``unbundle.sh PACKAGES SITE`` fails.
    """
    if not packages.is_dir():
        raise ValueError(f"--packages: expected a folder, got {packages}")
    wheels, script = sorted(packages.glob("*.whl")), packages / "unbundle.sh"
    if not wheels and not script.exists():
        site.unlink(missing_ok=True)
        site.parent.mkdir(parents=True, exist_ok=True)
        site.symlink_to(packages.resolve())
        return
    if script.exists():
        subprocess.run(["sh", script, packages, site], check=True)
    for wheel in wheels:
        unpack_wheel(wheel, site)


def stage_plugin(root: Path, site: Path) -> Path:
    """Make this checkout importable from ``site``, entry points included.

    A plain copy: the package's folders do not lie where Python would look for them, and a machine
    without a network may lack what builds a wheel. It goes before an installed plugin, and what is
    built into it changes nobody's environment.
    """
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    name, version = project["name"], project["version"]
    shutil.rmtree(site, ignore_errors=True)
    package = site / "vllm_kvcompress"
    hidden = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(root / "vllm_kvcompress", package, ignore=hidden)
    shutil.copytree(root / "triton_kernels", package / "kernels", ignore=hidden)
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return site.resolve()


if __name__ == "__main__":
    unpack(*map(Path, sys.argv[1:]))
