# SPDX-License-Identifier: Apache-2.0
"""How many requests fit on a GPU with compression and without, from a model's configuration.

Run as ``vllm-kvcompress estimate MODEL --prompt 8000 --output 500 --budget 10% --gpu-memory 80``.
No weights are loaded. Sizes are per GPU.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from vllm_kvcompress.capacity import Holding, ModelShape, compressed, num_blocks, uncompressed
from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError
from vllm_kvcompress.plan import BlockPlanner
from vllm_kvcompress.prompt import PromptFacts

GIB = 1 << 30


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="vllm-kvcompress estimate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", help="name or folder, as vllm serve takes it")
    add("--prompt", type=int, required=True, metavar="TOKENS", help="prompt length")
    add("--visual", type=int, default=0, metavar="TOKENS", help="how many of them are visual")
    add("--output", type=int, required=True, metavar="TOKENS", help="output length")
    add("--method", default="bacon", help="as --kv-compression")
    add("--budget", help="as --kv-budget")
    add("--window", default=KVCompressionConfig.window, help="as --kv-window")
    add("--gpu-memory", type=float, metavar="GIB", help="of one GPU")
    add("--gpu-memory-utilization", type=float, default=0.92, metavar="SHARE", help="as vLLM's")
    add("--weights", type=float, metavar="GIB", help="of all GPUs; default: counted")
    add(
        "--other",
        type=float,
        default=2.0,
        metavar="GIB",
        help="activations and graphs of one GPU, which only a start can tell; default: 2",
    )
    add("--kv-cache-memory-bytes", type=int, metavar="N", help="as vLLM's, instead of the above")
    add("--kv-cache-dtype", default="auto", help="as vLLM's")
    add("--tensor-parallel-size", type=int, default=1, metavar="N", help="as vLLM's")
    add("--block-size", type=int, default=16, metavar="TOKENS", help="as vLLM's")
    args = parser.parse_args(argv)
    if (args.gpu_memory is None) == (args.kv_cache_memory_bytes is None):
        parser.error("give --gpu-memory or --kv-cache-memory-bytes")
    if args.prompt < 1 or args.output < 1 or not 0 <= args.visual < args.prompt:
        parser.error("--prompt and --output are at least 1, --visual is less than --prompt")
    return args


def reserved_bytes(config: KVCompressionConfig) -> int:
    """At most, for what prompts keep, for temporaries, and for what is copied at a time."""
    return 2 * (config.workspace_mib << 20) + config.copy_bytes


def cache_bytes(args: argparse.Namespace, shape: ModelShape, reserved: int) -> int:
    """What is left for the cache of one GPU.

    Args:
        reserved: for compression; 0 without it.

    Raises:
        KVCompressionError: nothing is left.
    """
    if args.kv_cache_memory_bytes is not None:
        return args.kv_cache_memory_bytes
    left = args.gpu_memory * args.gpu_memory_utilization * GIB - args.other * GIB
    left -= shape.weight_bytes / args.tensor_parallel_size
    left -= reserved
    if left <= 0:
        raise KVCompressionError(
            f"the weights of {shape.weight_bytes / GIB:.1f} GiB leave no room for a cache on "
            f"{args.tensor_parallel_size} x {args.gpu_memory:g} GiB: raise --gpu-memory or "
            "--tensor-parallel-size."
        )
    return int(left)


def report(args: argparse.Namespace, shape: ModelShape, config: KVCompressionConfig) -> str:
    """The table that is printed."""
    block, ranks = args.block_size, args.tensor_parallel_size
    token = shape.token_bytes(ranks)
    planner = BlockPlanner(config, block, shape.num_layers, shape.num_kv_heads)
    facts = PromptFacts(args.prompt, ((0, args.visual),) if args.visual else ())
    sizes = [cache_bytes(args, shape, reserved) for reserved in (0, reserved_bytes(config))]
    pools = [num_blocks(size, token, block) for size in sizes]
    stock = uncompressed(facts, args.output, block, pools[0])
    ours = compressed(planner, facts, args.output, pools[1])
    rows = [
        ("", "without", "with"),
        ("GiB for the KV cache", *(f"{size / GIB:.2f}" for size in sizes)),
        (f"blocks of {block} tokens", *(f"{pool:,}" for pool in pools)),
        *(
            (title, *(f"{value(holding):,.{digits}f}" for holding in (stock, ours)))
            for title, value, digits in (
                ("blocks of a request after prefill", _peak, 0),
                ("blocks of a request at its end", _end, 0),
                ("requests at once", _at_once, 0),
                ("MiB read for an output token", lambda h: h.read_tokens * token / (1 << 20), 1),
            )
        ),
    ]
    head = (
        f"{args.model}: {shape.num_layers} layers x {shape.num_kv_heads} KV heads x "
        f"{shape.head_size}, {token:,} bytes of cache per token"
    )
    if shape.weight_bytes:
        head += f", weights {shape.weight_bytes / GIB:.3g} GiB"
    asked = f"with: {config.method}, budget {config.budget}, window {config.window}, when always"
    lines = [f"{title:<36}{left:>14}{right:>14}" for title, left, right in rows]
    notes = []
    if ours == stock:
        notes.append("No block would come back from such a prompt: it is kept whole.")
    if not stock.at_once or not ours.at_once:
        notes.append("0 requests at once: one alone does not fit.")
    return "\n".join([head, asked, "", *lines, *notes])


def _peak(holding: Holding) -> float:
    return holding.peak_blocks


def _end(holding: Holding) -> float:
    return holding.end_blocks


def _at_once(holding: Holding) -> float:
    return holding.at_once


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    raw = {"method": args.method, "window": args.window}
    try:
        config = KVCompressionConfig.parse(
            raw | ({} if args.budget is None else {"budget": args.budget})
        )
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm_kvcompress.adapter import model_shape  # imports vLLM

        weights = None if args.weights is None else int(args.weights * GIB)
        if args.kv_cache_memory_bytes is not None:
            weights = weights or 0
        shape = model_shape.shape_of(args.model, args.kv_cache_dtype, weights)
        print(report(args, shape, config))
    except (KVCompressionError, ValueError, OSError) as error:
        print(f"vllm-kvcompress estimate: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
