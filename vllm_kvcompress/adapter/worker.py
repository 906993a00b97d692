# SPDX-License-Identifier: Apache-2.0
"""Loaded by every worker of a compressing engine, before it builds anything."""

from vllm_kvcompress.adapter import runner


class KVCompressionWorkerExtension:
    """Named by path in the engine's configuration, so a worker without the plugin cannot start."""


runner.install()
