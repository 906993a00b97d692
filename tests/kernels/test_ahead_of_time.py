# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel compiles for GPUs that are not here, and stays within its resources."""

import json
import os
import subprocess
import sys

import pytest

SCORE_CONSTANTS = {
    "WINDOW": 32,
    "HEAD_SIZE": 128,
    "PAGE_TOKENS": 16,
    "BLOCK_W": 32,
    "BLOCK_D": 128,
    "BLOCK_T": 64,
    "HAS_SOFTCAP": False,
    "EXACT": False,
}
SCORE_TYPES = {
    "q_ptr": "*bf16",
    "pages_ptr": "*bf16",
    "table_ptr": "*i64",
    "prompt_lens_ptr": "*i64",
    "max_ptr": "*fp32",
    "sum_ptr": "*fp32",
    "lse_ptr": "*fp32",
    "mean_ptr": "*fp32",
    "last_ptr": "*fp32",
    "scale": "fp32",
    "softcap": "fp32",
}
COPY_CONSTANTS = {"ROW": 256, "PAGE_TOKENS": 16, "BLOCK_E": 256, "BLOCK_K": 32}
COPY_TYPES = dict.fromkeys(
    ("table_ptr", "kept_ptr", "count_ptr", "start_ptr", "num_full_ptr", "num_kept_ptr"), "*i64"
) | {"pages_ptr": "*bf16", "staged_ptr": "*bf16"}
# kernel: (module, arguments that are not int32, constants, most bytes of shared memory)
KERNELS = {
    "_stage_kernel": ("compaction", COPY_TYPES, COPY_CONSTANTS, 0),
    "_write_kernel": ("compaction", COPY_TYPES, COPY_CONSTANTS, 0),
    "_head_page_tables_kernel": ("page_tables", {}, {"BLOCK_SIZE": 16, "TILE": 1024}, 0),
    "_row_sums_kernel": (
        "window_attention",
        SCORE_TYPES,
        {**SCORE_CONSTANTS, "KEYS_PER_SPLIT": 1024},
        65536,
    ),
    "_scores_kernel": (
        "window_attention",
        SCORE_TYPES,
        {**SCORE_CONSTANTS, "TAKE_MAX": False},
        65536,
    ),
}

COMPILE = """
import importlib, json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

name, module, types, constants, capability = json.loads(sys.argv[1])
kernel = getattr(importlib.import_module("vllm_kvcompress.kernels." + module), name)
plain = {arg: "*i32" if arg.endswith("_ptr") else "i32" for arg in kernel.arg_names}
signature = {arg: types.get(arg, kind) for arg, kind in plain.items()}
signature |= dict.fromkeys(constants, "constexpr")
source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
print(json.dumps([len(compiled.asm["cubin"]), compiled.metadata.shared]))
"""


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", KERNELS)
def test_compiles(name, capability):
    module, types, constants, most_shared = KERNELS[name]
    request = json.dumps([name, module, types, constants, capability])
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", "-c", COMPILE, request]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    cubin_bytes, shared = json.loads(done.stdout)
    assert cubin_bytes > 0
    assert shared <= most_shared
