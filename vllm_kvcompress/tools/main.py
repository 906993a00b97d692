# SPDX-License-Identifier: Apache-2.0
"""Entry point of the ``vllm-kvcompress`` command."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from vllm_kvcompress.tools import cpu_env


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="vllm-kvcompress", description="Companion of the KV-compression plugin for vLLM."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("methods", help="list scorers and allocators with their options")
    commands.add_parser(
        "mend-cpu-env",
        help="mend the packaging faults of vLLM's CPU build in this environment",
        add_help=False,
    )
    args, rest = parser.parse_known_args(argv)
    if args.command == "mend-cpu-env":
        return cpu_env.main(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    print(describe_methods())
    return 0


def describe_methods() -> str:
    """Every method with its source and the options that --kv-compression-config takes."""
    from vllm_kvcompress.allocation import ALLOCATORS
    from vllm_kvcompress.scoring import SCORERS

    lines = []
    for title, table in (("Scorers", SCORERS), ("Allocators", ALLOCATORS)):
        lines.append(f"{title}:")
        for name, method in table.items():
            summary = (method.__doc__ or "").strip().splitlines()[0]
            options = ", ".join(f"{f.name}={f.default!r}" for f in dataclasses.fields(method))
            lines += [f"  {name}: {summary}", f"    options: {options or 'none'}"]
            lines.append(f"    source: {method.source}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
