# SPDX-License-Identifier: Apache-2.0
"""What compressing one prompt should take on an H100, reckoned without one.

    python benchmarks/predicted_time.py --out benchmarks/results/predicted_h100.csv

bacon, one prompt of 8,192 tokens, all 28 layers of Qwen2-VL-7B, budget 1024. A prediction, not a
measurement. A Triton kernel takes the longest of

    bytes       what it moves to and from memory, at 80 % of 3.35 TB/s; caches are taken to save
                nothing but what the same program reads twice
    tensor      its matrix products, at 70 % of 989 TFLOP/s
    issue       its instructions for sm_90: those of its largest loop times the rounds of a program,
                and all others once, one per cycle of each of the four schedulers of a
                multiprocessor, 132 of them at 1.755 GHz, for the programs of the fullest one.
                A program that has a multiprocessor to itself also waits 30 cycles for each shuffle
                and barrier
    exp         exponentials, 16 per cycle and multiprocessor
    shuffle     shuffles and barriers of warps, one per cycle and multiprocessor

and 2 us to start and to end, which is all that a torch operator takes here. On the host, launching
takes 12 us for a Triton kernel and 6 us for a torch operator; the GPU works meanwhile, so a call
takes the longer of both sums.
"""

import argparse
import csv
import importlib
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import launches
import torch
from triton import compile as compile_kernel
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_kvcompress.kernels import splits

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "kernels"))
from kernel_resources import KERNELS

BYTES_PER_S, FLOPS_PER_S = 0.8 * 3.35e12, 0.7 * 989e12
CLOCK, MULTIPROCESSORS, SCHEDULERS, EXP_PER_CYCLE = 1.755e9, 132, 4, 16
START, WAIT_CYCLES = 2e-6, 30
HOST_TRITON, HOST_TORCH = 12e-6, 6e-6

ROWS, HEADS, QUERY_HEADS, LENGTH, SIZE = 28, 4, 28, 8192, 128
SEQUENCES, KEPT, WINDOW = ROWS * HEADS, launches.BUDGET, 32
SCORES, KEYS = 4 * SEQUENCES * LENGTH, 2 * SEQUENCES * LENGTH * SIZE  # bytes
MOVED = 4 * SEQUENCES * KEPT * SIZE  # of keys and values that are kept


class Code(NamedTuple):
    """Instructions of a compiled kernel, of one warp.

    Attributes:
        loop, once: in its largest loop, and outside of that.
        loop_waits, waits: shuffles and barriers in that loop, and all others.
    """

    loop: int
    once: int
    loop_waits: int
    waits: int


class Step(NamedTuple):
    """One launch.

    Attributes:
        programs, rounds: of the grid, and of each program's largest loop.
    """

    kernel: str
    programs: int
    rounds: int
    bytes: int
    flops: float = 0.0
    exps: float = 0.0


def steps() -> list[Step]:
    """The Triton kernels of the call."""
    parts = LENGTH // splits.KEYS_PER_PART
    each = splits.parts_per_split(SEQUENCES, LENGTH, torch.device("cpu"))
    programs, tiles = SEQUENCES * math.ceil(parts / each), each * splits.KEYS_PER_PART // 64
    exps = SEQUENCES * 256 * LENGTH  # 7 query heads of 32 rows, padded
    products = 2 * exps * SIZE
    partial = 8 * SEQUENCES * parts * 256
    tokens = SEQUENCES * math.ceil(LENGTH / 512)
    copies = SEQUENCES * math.ceil(KEPT / 32)
    return [
        Step("_row_sums_kernel", programs, tiles, KEYS + partial, products, exps),
        Step("_combine_kernel", SEQUENCES * 4, parts // 16, partial),
        Step("_scores_kernel", programs, tiles, KEYS + 2 * SCORES, products, exps),
        Step("_evidence_kernel", tokens, 5, 4 * SCORES),
        Step("_value_kernel", tokens, 4, 6 * SCORES),
        Step("_calibrate_kernel", SEQUENCES, 32, 3 * SCORES),
        Step("_select_kernel", SEQUENCES, 16, SCORES + 8 * SEQUENCES * KEPT),
        Step("_stage_kernel", copies, 0, 2 * MOVED),
        Step("_write_kernel", copies, 0, 2 * MOVED),
    ]


def machine_code(name: str) -> list[tuple[int, str]]:
    """Address and instruction of a kernel for sm_90."""
    entry = KERNELS[name]
    function = getattr(importlib.import_module(f"vllm_kvcompress.kernels.{entry.module}"), name)
    signature, aligned = {}, {}
    for i, argument in enumerate(function.arg_names):
        kind = entry.types.get(argument, "*i32" if argument.endswith("_ptr") else "i32")
        signature[argument] = kind
        if kind.startswith("*"):
            aligned[i,] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(entry.constants, "constexpr")
    source = ASTSource(
        fn=function, signature=signature, constexprs=dict(entry.constants), attrs=aligned
    )
    options = {"num_warps": entry.num_warps}
    compiled = compile_kernel(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", cubin.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/]+);", text)
    return [(int(address, 16), instruction.strip()) for address, instruction in found]


def code_of(name: str) -> Code:
    code = machine_code(name)
    loops = [
        (int(target[1], 16), address)
        for address, instruction in code
        if (target := re.search(r"\bBRA\S* .*?(0x[0-9a-f]+)", instruction))
        and int(target[1], 16) < address
    ]
    first, last = max(loops, key=lambda loop: loop[1] - loop[0], default=(0, -1))
    inside = [instruction for address, instruction in code if first <= address <= last]
    code_once = [i for a, i in code if not first <= a <= last and not i.startswith("NOP")]
    return Code(len(inside), len(code_once), _waits(inside), _waits(code_once))


def _waits(instructions: list[str]) -> int:
    return sum(bool(re.search(r"\b(SHFL|BAR)\b", text)) for text in instructions)


def predict(step: Step) -> dict[str, str | int | float]:
    """Microseconds of one launch, and what they are made of."""
    code, warps = code_of(step.kernel), KERNELS[step.kernel].num_warps
    fullest = math.ceil(step.programs / MULTIPROCESSORS)
    instructions = code.loop * step.rounds + code.once
    waits = code.loop_waits * step.rounds + code.waits
    times = {
        "bytes": step.bytes / BYTES_PER_S,
        "tensor": step.flops / FLOPS_PER_S,
        "issue": instructions * warps * fullest / SCHEDULERS / CLOCK,
        "exp": step.exps / (EXP_PER_CYCLE * MULTIPROCESSORS * CLOCK),
        "shuffle": waits * warps * fullest / CLOCK,
    }
    if fullest == 1:  # nothing else runs while a program waits
        times["issue"] += waits * WAIT_CYCLES / CLOCK
    limit = max(times, key=lambda name: times[name])
    row: dict[str, str | int | float] = {"step": step.kernel, "programs": step.programs}
    row |= {f"{name}_us": round(1e6 * time, 1) for name, time in times.items()}
    return row | {"limit": limit, "gpu_us": round(1e6 * (times[limit] + START), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="CSV file")
    args = parser.parse_args()
    counted = launches.count("bacon", launches.sizes_of(1), 1 << 33)
    rows = [predict(step) for step in steps()]
    assert counted.in_triton == len(rows), "the steps are not those of the pipeline"
    others = counted.total - counted.in_triton
    rows.append({"step": f"{others} torch operators", "gpu_us": round(1e6 * others * START, 1)})
    gpu = sum(float(row["gpu_us"]) for row in rows)
    host = 1e6 * (counted.in_triton * HOST_TRITON + others * HOST_TORCH)
    rows.append({"step": "all, on the GPU", "gpu_us": round(gpu, 1)})
    rows.append({"step": "all, on the host", "gpu_us": round(host, 1)})
    rows.append({"step": "the call", "gpu_us": round(max(gpu, host), 1)})
    with args.out.open("w", newline="") as sink:
        writer = csv.DictWriter(sink, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(*(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
