# SPDX-License-Identifier: Apache-2.0
"""The only package that imports vLLM; ``symbols.py`` lists what it builds on."""


def install() -> None:
    """Add the command-line flags and the backend choice to this process; idempotent."""
    from vllm_kvcompress.adapter import cli, selection

    cli.install()
    selection.install()
