# SPDX-License-Identifier: Apache-2.0
"""What a server would say at its start, found without starting one."""

from collections.abc import Sequence

from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_kvcompress import adapter, kernels
from vllm_kvcompress.adapter.selection import supported_backends
from vllm_kvcompress.config import KVCompressionError


def refusals(model: str, flags: Sequence[str]) -> str | None:
    """Why ``vllm serve MODEL FLAGS`` refuses, as far as the configuration shows it; None if not.

    Weights are not needed. What shows only when layers are built, or in the checkpoint, stays open.
    """
    adapter.install()
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    try:
        EngineArgs.from_cli_args(
            parser.parse_args(["--model", model, *flags])
        ).create_engine_config()
    except KVCompressionError as error:
        return str(error)
    except (ValueError, OSError) as error:
        return f"vLLM itself refuses:\n  - {error}"
    return None


def machine() -> dict[str, str]:
    """What there is to run on, in words."""
    device = current_platform.device_type
    faults = kernels.missing_on(device)
    names = [name for name in supported_backends() if name.startswith("CPU") == (device == "cpu")]
    return {
        "device": current_platform.get_device_name() if current_platform.is_cuda() else device,
        "attention backend": f"{' or '.join(names) or 'none'}, if vLLM chooses it for the model",
        "kernels": "; ".join(faults) or kernels.describe(device),
    }
