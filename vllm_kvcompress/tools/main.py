# SPDX-License-Identifier: Apache-2.0
"""Entry point of the ``vllm-kvcompress`` command."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import vllm_kvcompress
from vllm_kvcompress.tools import calibrate_heads, cpu_env, doctor


class _Version(argparse.Action):
    """Prints versions of this package and of what it runs in."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        found = doctor.versions()
        ours = found.pop("vllm-kvcompress", vllm_kvcompress.__version__)
        others = ", ".join(f"{name} {version}" for name, version in found.items())
        print(f"vllm-kvcompress {ours} ({others})")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="vllm-kvcompress", description="Companion of the KV-compression plugin for vLLM."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print versions, and end")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "estimate",
        help="tell how many requests fit on a GPU, with compression and without",
        add_help=False,
    )
    commands.add_parser(
        "doctor",
        help="tell what is installed, and what a model would be refused for",
        add_help=False,
    )
    commands.add_parser(
        "methods", help="list presets, scorers, allocators and merges", add_help=False
    )
    commands.add_parser(
        "models", help="list vLLM's models: which are served, and why not", add_help=False
    )
    commands.add_parser(
        "mend-cpu-env",
        help="mend the packaging faults of vLLM's CPU build in this environment",
        add_help=False,
    )
    commands.add_parser(
        "calibrate-heads",
        help="measure how visual each head of a model is, for allocators that ask for it",
        add_help=False,
    )
    commands.add_parser(
        "explain",
        help="show on an image which visual tokens are kept, and why",
        add_help=False,
    )
    args, rest = parser.parse_known_args(argv)
    if args.command == "mend-cpu-env":
        return cpu_env.main(rest)
    if args.command == "calibrate-heads":
        return calibrate_heads.main(rest)
    if args.command == "explain":
        from vllm_kvcompress.tools import explain  # imports torch

        return explain.main(rest)
    if args.command == "doctor":
        return doctor.main(rest)
    if args.command == "estimate":
        from vllm_kvcompress.tools import estimate  # imports torch

        return estimate.main(rest)
    if args.command == "models":
        from vllm_kvcompress.tools import models  # imports vLLM, which the others can do without

        return models.main(rest)
    from vllm_kvcompress.tools import methods  # imports torch, which the others can do without

    return methods.main(rest)


if __name__ == "__main__":
    sys.exit(main())
