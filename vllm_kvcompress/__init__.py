# SPDX-License-Identifier: Apache-2.0
"""KV-cache compression after prefill for vLLM, as a plugin.

This module is what vLLM's entry point imports in every process, so it imports nothing itself:
a failure belongs to :func:`register`, where vLLM does not swallow it.
"""

__version__ = "0.1.0"


def register() -> None:
    """Attach the plugin to vLLM (entry point ``vllm.general_plugins``); idempotent.

    Nothing changes for an engine that does not ask for compression.

    Raises:
        RuntimeError: the installed vLLM lacks something the plugin builds on.
    """
    from vllm_kvcompress.adapter import install

    install()
