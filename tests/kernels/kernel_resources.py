# SPDX-License-Identifier: Apache-2.0
"""What every Triton kernel takes from a GPU, compiled ahead of time for GPUs that are not here.

``make triton-resources`` writes ``resources.csv`` anew, the columns of one Triton after the other.
"""

import csv
import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

CAPABILITIES = (80, 90, 100)
EXPERIMENTS = str(Path(__file__).parents[2] / "benchmarks")
TABLE = Path(__file__).with_name("resources.csv")
VERSIONS = ("3.6", "3.9")
"""Of Triton: the oldest that vLLM's supported releases run with, and that of our environment."""


class Kernel(NamedTuple):
    """How to compile a kernel.

    Attributes:
        module: below vllm_kvcompress.kernels, or with the package of an experiment.
        types: of the arguments that are not int32; a list for a tuple of arguments.
        constants: values of the constexpr arguments.
        capabilities: GPUs that it runs on.
    """

    module: str
    types: dict[str, str | list[str]]
    constants: dict[str, int | float | bool | str]
    num_warps: int = 4
    capabilities: tuple[int, ...] = CAPABILITIES


class Resources(NamedTuple):
    """Of one compiled kernel; spills are bytes of local memory per thread."""

    registers: int
    shared_bytes: int
    spill_bytes: int


SCORE_TYPES = {"q_ptr": "*bf16", "pages_ptr": "*bf16", "scale": "fp32", "softcap": "fp32"} | (
    dict.fromkeys(("table_ptr", "prompt_lens_ptr", "lens_ptr"), "*i64")
    | dict.fromkeys(("max_ptr", "sum_ptr", "lse_ptr", "mean_ptr", "last_ptr"), "*fp32")
    | {"scale_ptr": "*fp32"}
)
SCORE_CONSTANTS = {
    "WINDOW": 32,
    "HEAD_SIZE": 128,
    "PAGE_TOKENS": 16,
    "PADDED": 32,
    "BLOCK_R": 256,
    "BLOCK_D": 128,
    "BLOCK_T": 64,
    "KEYS_PER_PART": 256,
    "HAS_SOFTCAP": False,
    "EXACT": False,
    "key_scale_ptr": None,
}
COLUMN_TYPES = SCORE_TYPES | (
    dict.fromkeys(("lengths_ptr", "positions_ptr"), "*i64") | {"total_ptr": "*fp32"}
)
COLUMN_CONSTANTS = {
    "HEAD_SIZE": 128,
    "PAGE_TOKENS": 16,
    "BLOCK_D": 128,
    "BLOCK_C": 64,
    "BLOCK_T": 64,
    "HAS_SOFTCAP": False,
    "EXACT": False,
    "key_scale_ptr": None,
}
COPY_TYPES = dict.fromkeys(("pages_ptr", "staged_ptr", "rows_ptr"), "*bf16") | dict.fromkeys(
    (
        "table_ptr",
        "kept_ptr",
        "count_ptr",
        "start_ptr",
        "num_full_ptr",
        "num_kept_ptr",
        "num_pages_ptr",
    ),
    "*i64",
)
COPY_CONSTANTS = {"ROW": 256, "PAGE_TOKENS": 16, "BLOCK_E": 256, "BLOCK_K": 32}
SELECT_TYPES = {"scores_ptr": "*fp32"} | dict.fromkeys(
    ("count_ptr", "candidates_ptr", "protected_end_ptr", "kept_ptr"), "*i64"
)
DECODE_TYPES = {"slots_ptr": "*i64"} | (
    dict.fromkeys(("scale", "value_scale", "softcap"), "fp32")
    | dict.fromkeys(("q_ptr", "pages_ptr", "out_ptr"), "*bf16")
    | dict.fromkeys(("partial_ptr", "lse_ptr"), "*fp32")
)
DECODE_CONSTANTS = {
    "GROUP": 7,
    "HEAD_SIZE": 128,
    "PAGE_TOKENS": 16,
    "BLOCK_D": 128,
    "BLOCK_T": 64,
}
TILED = {"BLOCK": 2048}
HELD = {"BLOCK": 8192}  # by the registers of one program
CALIBRATE_TYPES = {"trace_ptr": "*fp32", "final_ptr": "*fp32", "lambda_c": "fp32"} | (
    dict.fromkeys(("num_candidates_ptr", "capacity_ptr"), "*i64")
    | dict.fromkeys(("mean_ptr", "last_ptr", "base_ptr", "evidence_ptr", "value_ptr"), "*fp32")
    | dict.fromkeys(("scores_ptr", "pooled_ptr", "values_ptr", "moments_ptr"), "*fp32")
)
NO_GRIDS = dict.fromkeys(("segment_ptr", "lines_ptr"))
GRID_TYPES = (
    CALIBRATE_TYPES
    | dict.fromkeys(("segment_ptr", "lines_ptr"), "*i64")
    | (dict.fromkeys(("balance_ptr", "weight_ptr", "raised_ptr", "scaled_ptr"), "*fp32"))
)
VALUE_CONSTANTS = {"MODE": "rel", "LOCAL_K": 5, "EPS": 1e-8, "BLOCK_T": 512}
STRENGTH_CONSTANTS = {"TOPK_FRAC": 2.0, "GATED": True, "EPS": 1e-8}
COUNT_TYPES = {"base_ptr": "*fp32", "scaled_ptr": "*fp32", "masses_ptr": "*fp64"} | (
    dict.fromkeys(("capacity_ptr", "counts_ptr"), "*i64")
)
PROXY_TYPES = SCORE_TYPES | {"masses_ptr": "*fp32"}
PROXY_CONSTANTS = {"BLOCK_R": 64} | {
    name: value for name, value in COLUMN_CONSTANTS.items() if name != "BLOCK_C"
}
ELITE_TYPES = (
    SCORE_TYPES
    | {"elite_ptr": "*u8", "logits_ptr": "*fp32"}
    | (dict.fromkeys(("instruction_len_ptr", "segment_ptr"), "*i64"))
)
ELITE_CONSTANTS = PROXY_CONSTANTS | {"BLOCK_R": 16}
VOTE_TYPES = {"masses_ptr": "*fp32", "votes_ptr": "*fp32"} | (
    dict.fromkeys(("end_ptr", "least_ptr", "tie_end_ptr"), "*i64")
)
NORM_TYPES = {"pages_ptr": "*bf16", "table_ptr": "*i64"} | dict.fromkeys(
    ("grams_ptr", "value_scale_ptr", "norms_ptr"), "*fp32"
)
NORM_CONSTANTS = {
    "HEAD_SIZE": 128,
    "PAGE_TOKENS": 16,
    "BLOCK_D": 128,
    "BLOCK_E": 32,
    "BLOCK_T": 64,
    "EXACT": False,
    "value_scale_ptr": None,
}
POOL_CONSTANTS = {"KERNEL": 5, "TAKE_MAX": False, "BLOCK_T": 512}

KERNELS = {  # by name, followed by what is special about a variant
    "_stage_kernel": Kernel("compaction", COPY_TYPES, COPY_CONSTANTS),
    "_write_kernel": Kernel("compaction", COPY_TYPES, COPY_CONSTANTS),
    "_read_kernel": Kernel(
        "prompt_rows",
        COPY_TYPES,
        {
            "HEAD_SIZE": 128,
            "PAGE_TOKENS": 16,
            "BLOCK_D": 128,
            "BLOCK_T": 32,
            "SCALED": False,
            "scale_ptr": None,
        },
    ),
    "_head_page_tables_kernel": Kernel(
        "page_tables", {"slots_ptr": "*i64"}, {"PAGE_TOKENS": 16, "SPANS": True, "TILE": 256}
    ),
    "_decode_splits_kernel": Kernel(
        "experiments.decode_attention",
        DECODE_TYPES,
        DECODE_CONSTANTS | {"BLOCK_G": 16, "SPANS": False, "HAS_SOFTCAP": False, "EXACT": False},
    ),
    "_join_splits_kernel": Kernel(
        "experiments.decode_attention", DECODE_TYPES, DECODE_CONSTANTS | {"BLOCK_S": 16}
    ),
    "_row_sums_kernel": Kernel("window_attention", SCORE_TYPES, SCORE_CONSTANTS, num_warps=8),
    "_scores_kernel": Kernel(
        "window_attention",
        SCORE_TYPES,
        SCORE_CONSTANTS | {"TILES": 1, "TAKE_MAX": False},
        num_warps=8,
    ),
    "_scores_kernel max": Kernel(
        "window_attention",
        SCORE_TYPES,
        SCORE_CONSTANTS | {"BLOCK_R": 128, "TILES": 2, "TAKE_MAX": True},
        num_warps=8,
    ),
    "_combine_kernel": Kernel(
        "splits",
        SCORE_TYPES,
        {"KEYS_PER_PART": 256, "BASE_2": True, "BLOCK_P": 16, "BLOCK_C": 64},
    ),
    "_row_lse_kernel": Kernel("column_attention", COLUMN_TYPES, COLUMN_CONSTANTS, num_warps=8),
    "_key_attention_sum_kernel": Kernel(
        "column_attention", COLUMN_TYPES, COLUMN_CONSTANTS, num_warps=8
    ),
    "_select_kernel": Kernel("selection", SELECT_TYPES, HELD, num_warps=16),
    "_begin_selection_kernel": Kernel("selection", SELECT_TYPES, {}),
    "_digit_kernel": Kernel(
        "tiled_radix", {"values_ptr": "*fp32", "others_ptr": "*fp32"}, TILED, num_warps=8
    ),
    "_place_kernel": Kernel("selection", SELECT_TYPES, TILED, num_warps=8),
    "_pool_kernel": Kernel("calibration", CALIBRATE_TYPES, POOL_CONSTANTS | NO_GRIDS),
    "_pool_kernel grids": Kernel("calibration", GRID_TYPES, POOL_CONSTANTS),
    "_evidence_kernel": Kernel("calibration", CALIBRATE_TYPES, POOL_CONSTANTS),
    "_value_kernel": Kernel("calibration", CALIBRATE_TYPES, VALUE_CONSTANTS | NO_GRIDS),
    "_value_kernel grids": Kernel("calibration", GRID_TYPES, VALUE_CONSTANTS),
    "_balance_kernel": Kernel("grid_scores", GRID_TYPES, {"BLOCK_T": 512}),
    "_weigh_kernel": Kernel(
        "grid_scores", GRID_TYPES, TILED | {"TINY": 1e-30, "CLAMP": True}, num_warps=8
    ),
    "_output_norms_kernel": Kernel("value_norms", NORM_TYPES, NORM_CONSTANTS),
    "_calibrate_kernel": Kernel(
        "calibration", CALIBRATE_TYPES, STRENGTH_CONSTANTS | HELD, num_warps=16
    ),
    "_begin_statistics_kernel": Kernel("tiled_calibration", CALIBRATE_TYPES, {"TOPK_FRAC": 2.0}),
    "_moments_kernel": Kernel("tiled_calibration", CALIBRATE_TYPES, TILED, num_warps=8),
    "_add_values_kernel": Kernel(
        "tiled_calibration",
        CALIBRATE_TYPES,
        TILED | STRENGTH_CONSTANTS,
        num_warps=8,
    ),
    "_scale_kernel": Kernel("head_budgets", COUNT_TYPES, HELD | {"NORMALIZE": True}, num_warps=16),
    "_count_kernel": Kernel("head_budgets", COUNT_TYPES, HELD, num_warps=16),
    "_apportion_kernel": Kernel(
        "budgets",
        {"shares_ptr": "*fp64"}
        | dict.fromkeys(("total_ptr", "low_ptr", "high_ptr", "counts_ptr"), "*i64"),
        {"BLOCK": 1024},
    ),
    "_begin_heads_kernel": Kernel("head_budgets", COUNT_TYPES, {}),
    "_tile_masses_kernel": Kernel("head_budgets", COUNT_TYPES, TILED, num_warps=8),
    "_scale_tile_kernel": Kernel(
        "head_budgets", COUNT_TYPES, TILED | {"NORMALIZE": True}, num_warps=8
    ),
    "_count_tiles_kernel": Kernel("head_budgets", COUNT_TYPES, {}),
    "_proxy_sums_kernel": Kernel(
        "proxy_attention", PROXY_TYPES, PROXY_CONSTANTS | {"KEYS_PER_PART": 256}
    ),
    "_group_attention_sum_kernel": Kernel(
        "proxy_attention",
        PROXY_TYPES,
        PROXY_CONSTANTS | {"GROUPS_PER_PROGRAM": 4, "BLOCK_T": 128},
        num_warps=8,
    ),
    "_last_logits_kernel": Kernel("elite_rows", ELITE_TYPES, ELITE_CONSTANTS),
    "_elite_sums_kernel": Kernel(
        "elite_rows", ELITE_TYPES, ELITE_CONSTANTS | {"BLOCK_I": 256, "KEYS_PER_PART": 256}
    ),
    "_elite_attention_kernel": Kernel(
        "elite_rows", ELITE_TYPES, ELITE_CONSTANTS | {"BLOCK_I": 256}
    ),
    "_cover_kernel": Kernel(
        "votes",
        VOTE_TYPES,
        {"FLOOR": True, "UNIT_BITS": 39, "SHARE_BITS": 30, "BLOCK": 4096},
        num_warps=16,
    ),
    "_votes_kernel": Kernel("votes", VOTE_TYPES, {"BLOCK_T": 256}),
    "_strong_keys_kernel": Kernel(
        "strong_keys",
        ELITE_TYPES | {"least": "fp32"},
        PROXY_CONSTANTS,
    ),
    "_skewness_kernel": Kernel(
        "skewness",
        {"values_ptr": "*fp32", "moments_ptr": "*fp64"}
        | dict.fromkeys(("segment_ptr", "prompt_lens_ptr"), "*i64"),
        {"EQUAL_UP_TO": 1e-6, "BLOCK": 1024},
        num_warps=8,
    ),
}
# keys in float8: GPUs of capability 80 have no conversion for e4m3, and vLLM no attention over it
KERNELS |= {
    f"{name} e4m3": KERNELS[name]._replace(
        types=KERNELS[name].types | {"pages_ptr": "*fp8e4nv", "key_scale_ptr": "*fp32"},
        constants={
            key: value for key, value in KERNELS[name].constants.items() if key != "key_scale_ptr"
        },
        capabilities=(90, 100),
    )
    for name in (
        "_row_sums_kernel",
        "_scores_kernel",
        "_row_lse_kernel",
        "_key_attention_sum_kernel",
    )
}


def in_float32(name: str, num_warps: int, **tiles: int) -> tuple[str, Kernel]:
    """A kernel for queries and pages in float32, with the tiles that it is launched with."""
    kernel = KERNELS[name]
    types = kernel.types | dict.fromkeys(("q_ptr", "pages_ptr"), "*fp32")
    constants = kernel.constants | {"EXACT": True} | tiles
    return f"{name} fp32", kernel._replace(types=types, constants=constants, num_warps=num_warps)


KERNELS |= dict(
    (
        in_float32("_row_sums_kernel", 16, BLOCK_R=32, BLOCK_T=32),
        in_float32("_scores_kernel", 16, BLOCK_R=32, BLOCK_T=32, TILES=7),
        in_float32("_row_lse_kernel", 8, BLOCK_C=16),
        in_float32("_key_attention_sum_kernel", 8, BLOCK_C=16),
        in_float32("_proxy_sums_kernel", 8, BLOCK_R=32, BLOCK_T=32),
        in_float32("_group_attention_sum_kernel", 8, BLOCK_R=32, BLOCK_T=32),
        in_float32("_last_logits_kernel", 8),
        in_float32("_strong_keys_kernel", 8, BLOCK_R=32, BLOCK_T=16),
        in_float32("_elite_sums_kernel", 8),
        in_float32("_elite_attention_kernel", 8),
        in_float32("_decode_splits_kernel", 8, BLOCK_T=32),
        in_float32("_output_norms_kernel", 8, BLOCK_T=32),
    )
)

COMPILE = """
import importlib, json, re, subprocess, sys, tempfile, traceback
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def measure(function, module, types, constants, num_warps, capabilities):
    path = module if "." in module else "vllm_kvcompress.kernels." + module
    kernel = getattr(importlib.import_module(path), function)
    signature, aligned = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        kind = types.get(argument, "*i32" if argument.endswith("_ptr") else "i32")
        signature[argument] = tuple(kind) if isinstance(kind, list) else kind
        # as the tensors of a launch are
        paths = [(i, j) for j in range(len(kind))] if isinstance(kind, list) else [(i,)]
        if kind[0].startswith("*"):
            aligned |= {path: [["tt.divisibility", 16]] for path in paths}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    for capability in capabilities:
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target=target, options={"num_warps": num_warps})
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(compiled.asm["cubin"])
            cubin.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        used = dict(re.findall(r"(\\w+):(\\d+)", usage))
        yield int(used["REG"]), compiled.metadata.shared, int(used["STACK"]) + int(used["LOCAL"])


for name, kernel in json.load(sys.stdin).items():
    try:
        found = list(measure(name.split()[0], *kernel))
    except triton.TritonError:
        found = traceback.format_exc()
    print(json.dumps([name, found]), flush=True)
"""
PROCESSES = 2
"""That compile at the same time; loading Triton takes longer than most of their kernels."""

Measured = dict[int, Resources] | str
"""Resources by capability, or why there are none."""


def measure(names: Sequence[str], triton: str | None = None) -> dict[str, Measured]:
    """Compile kernels, in processes that do not interpret, for all their GPUs.

    Args:
        triton: folder to import Triton from; None: the one of this environment.
    """
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = [triton, EXPERIMENTS, env.get("PYTHONPATH")]
    env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, "-P", "-c", COMPILE]

    def compile_some(some: Sequence[str]) -> subprocess.CompletedProcess[str]:
        request = json.dumps({name: KERNELS[name] for name in some})
        return subprocess.run(
            command, env=env, input=request, capture_output=True, text=True, check=False
        )

    measured: dict[str, Measured] = {}
    with ThreadPoolExecutor(PROCESSES) as pool:
        shares = [names[first::PROCESSES] for first in range(PROCESSES)]
        for some, done in zip(shares, pool.map(compile_some, shares), strict=True):
            measured |= dict.fromkeys(some, done.stderr)  # a compiler may take its process with it
            for name, found in map(json.loads, done.stdout.splitlines()):
                if isinstance(found, list):
                    resources = (Resources(*numbers) for numbers in found)
                    found = dict(zip(KERNELS[name].capabilities, resources, strict=True))
                measured[name] = found
    return measured


def version(triton: str | None = None) -> str:
    """Of the Triton in that folder, or in this environment: as in ``VERSIONS``."""
    where = {} if triton is None else {"path": [triton]}
    (found,) = importlib.metadata.distributions(name="triton", **where)
    return ".".join(found.version.split(".")[:2])


def recorded() -> dict[tuple[str, int, str], Resources]:
    """The committed table, by kernel, capability and version of Triton."""
    with TABLE.open(newline="") as file:
        return {
            (row["kernel"], int(row["capability"]), version): Resources(
                *(int(row[f"{field}, {version}"]) for field in Resources._fields)
            )
            for row in csv.DictReader(file)
            for version in VERSIONS
            if row[f"registers, {version}"]
        }


def main() -> None:
    """Replace the columns of one Triton; argument: its folder, if it is not this environment's."""
    (triton,) = sys.argv[1:] or (None,)
    mine = version(triton)
    assert mine in VERSIONS, f"no column for Triton {mine}"
    known = {key: value for key, value in recorded().items() if key[2] != mine}
    for name, found in measure(list(KERNELS), triton).items():
        assert isinstance(found, dict), f"{name}: {found}"
        known |= {(name, capability, mine): numbers for capability, numbers in found.items()}
    with TABLE.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        fields = [f"{field}, {version}" for version in VERSIONS for field in Resources._fields]
        table.writerow(("kernel", "capability", *fields))
        for name, kernel in sorted(KERNELS.items()):
            for capability in kernel.capabilities:
                columns = (known.get((name, capability, each), ("",) * 3) for each in VERSIONS)
                table.writerow((name, capability, *itertools.chain(*columns)))


if __name__ == "__main__":
    main()
