# SPDX-License-Identifier: Apache-2.0
"""Throughput over prompt lengths and budgets, and over prompts that share a prefix.

    python benchmarks/sweep.py --dummy llama-3.1-8b --out sweep.csv      # on a GPU
    python benchmarks/sweep.py --device cpu --quick --out sweep.csv

Two engines in turns, as in ``serving.py``, with prefix caching. Of every length the pool holds
three and a half uncompressed requests; in the shared case all that stock needs. One CSV row per
quantity, written as soon as it is measured.
"""

import argparse
import csv
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from dummy_models import make
from gpucheck.machine import facts
from serving import ROOT, STOCK, Arm, Engines, as_rows, headlines, percentiles
from serving_engine import MAX_SEQS, Settings


class Load(NamedTuple):
    """Requests that arrive at once; ``shared_tokens`` of their prompts are the same."""

    requests: int
    prompt_tokens: int
    output_tokens: int
    shared_tokens: int = 0

    @property
    def name(self) -> str:
        shared = f", {self.shared_tokens} shared" if self.shared_tokens else ""
        return f"{self.requests} x {self.prompt_tokens}{shared}"


LOADS = (
    Load(12, 8192, 256),
    Load(MAX_SEQS, 8256, 512, 8192),
    Load(16, 2048, 256),
    Load(6, 32768, 256),
)
QUICK = (Load(4, 256, 8), Load(4, 288, 8, 256))
BUDGETS = ("50%", "25%", "10%")
ARMS = (STOCK, *(Arm(f"always {budget}", "always", budget) for budget in BUDGETS))


def pool_of(load: Load, block_size: int) -> int:
    """Blocks."""
    each = -(-(load.prompt_tokens + load.output_tokens) // block_size)
    if not load.shared_tokens:
        return 3 * each + each // 2
    # the shared prefix once, and twice the room that the rest takes
    own = each - load.shared_tokens // block_size + 1
    return load.shared_tokens // block_size + 2 * own * load.requests + each


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dummy", default="llama-3.1-8b", metavar="NAME")
    parser.add_argument("--method", default="bacon")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="tiny: does it run at all?")
    parser.add_argument("--out", type=Path, required=True, help="CSV file")
    args = parser.parse_args()
    loads = QUICK if args.quick else LOADS
    size = 16 if args.device == "cuda" else 32
    pools = {load: pool_of(load, size) for load in loads}
    settings = Settings(
        model=str(make(args.dummy, ROOT / ".cache" / "dummy", shrunk=args.quick)),
        method=args.method, budget=BUDGETS[0], block_size=size, pool_blocks=max(pools.values()),
        threads=1, load_format="dummy", device=args.device, start="fast", prefix_caching=True,
        max_model_len=max(load.prompt_tokens + load.output_tokens for load in loads) + 64,
    )  # fmt: skip
    known = facts(args.device)
    writer = None
    with args.out.open("w", newline="", buffering=1) as sink, Engines(settings) as engines:
        for load, pool in pools.items():
            engines.limit_pool(pool)
            rows = as_rows(load.name, engines.repeat("burst", args.rounds, ARMS, **load._asdict()))
            for row in rows:
                shared = known | asdict(settings) | {"pool_blocks": pool, "model": args.dummy}
                entry = shared | {"device": known["device"]} | row._asdict()
                entry |= {"samples": len(entry.pop("values"))} | percentiles(row.values)
                writer = writer or csv.DictWriter(sink, entry, lineterminator="\n")
                if sink.tell() == 0:
                    writer.writeheader()
                writer.writerow(
                    {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in entry.items()}
                )
            for line in headlines(rows):
                print(f"== {line}", flush=True)


if __name__ == "__main__":
    main()
