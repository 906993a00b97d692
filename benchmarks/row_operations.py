# SPDX-License-Identifier: Apache-2.0
"""The operations of shiftkv and aircache that ``kernel_bench.py`` times."""

from typing import NamedTuple

import torch
from operations import Cost, Inputs, Operation, Shape, entries, require
from rivals import Calls

from vllm_kvcompress import kernels
from vllm_kvcompress.kernels import reference

PROXIES, GROUPS, TAU, COVER = 512, 32, 0.95, "floor"
ROWS, ELITE = 256, 4  # queries that are kept of the instruction, and elite ones of every head


# group_attention_sum


def masses_cost(shape: Shape) -> Cost:
    logits = shape.num * shape.num_q_heads * PROXIES * shape.length
    keys, masses = shape.page_bytes // 2, 4 * GROUPS * entries(shape)
    plain = 12 * logits // GROUPS + 2 * masses + 4 * keys
    return Cost(keys + masses, 2 * logits * shape.head_size, plain)


def masses_calls(x: Inputs) -> Calls:
    size = (x.shape.num, PROXIES, x.shape.num_q_heads, x.shape.head_size)
    proxies = _normal(x, *size).bfloat16()
    numbers = (x.prompt_lens, GROUPS, x.scale)

    def plain():
        return reference.group_attention_sum(
            proxies, reference.read_prompt(x.prompts, "key"), *numbers
        )

    return {
        "ours": lambda: kernels.group_attention_sum(proxies, x.prompts, *numbers),
        "torch": plain,
    }


def masses_check(x: Inputs) -> None:
    calls = masses_calls(x)
    close = torch.allclose(calls["ours"](), calls["torch"](), rtol=1e-3, atol=1e-8)
    require(close, "group_attention_sum")


# cover_votes


def votes_cost(shape: Shape) -> Cost:
    masses = GROUPS * entries(shape)
    return Cost(4 * (masses + entries(shape)), 0, 80 * masses)


def votes_calls(x: Inputs) -> Calls:
    spread = _normal(x, x.shape.num, x.shape.num_kv_heads, GROUPS, x.shape.length)
    args = (spread.mul_(4).exp_(), x.prompt_lens - 1, TAU, COVER)
    return {
        "ours": lambda: kernels.cover_votes(*args),
        "torch": lambda: reference.cover_votes(*args),
    }


def votes_check(x: Inputs) -> None:
    calls = votes_calls(x)
    require(torch.equal(calls["ours"](), calls["torch"]()), "cover_votes")


# elite_attention, of prompts that are one image and an instruction


class Instruction(NamedTuple):
    """Queries [N, Q, Hq, D] bfloat16, elite [N, Hq, Q] bool, segment [N, T] int64."""

    queries: torch.Tensor
    elite: torch.Tensor
    segment: torch.Tensor


def instruction(x: Inputs) -> Instruction:
    shape, device = x.shape, x.queries.device
    rows = min(ROWS, shape.length // 2)
    queries = _normal(x, shape.num, rows, shape.num_q_heads, shape.head_size).bfloat16()
    elite = torch.zeros(shape.num, shape.num_q_heads, rows, dtype=torch.bool, device=device)
    elite[:, :, -4 * ELITE :: 4] = True
    segment = torch.zeros(shape.num, shape.length, dtype=torch.int64, device=device)
    segment[:, -rows:] = -1
    return Instruction(queries, elite, segment)


def elite_cost(shape: Shape) -> Cost:
    heads = shape.num * shape.num_q_heads
    keys, logits = shape.page_bytes // 2, heads * shape.length * 32
    flops = 2 * heads * ELITE * shape.length * shape.head_size
    return Cost(keys + 4 * heads * shape.length, flops, 12 * logits + 4 * keys)


def elite_calls(x: Inputs) -> Calls:
    rows, numbers = instruction(x), (x.prompt_lens, x.scale)

    def plain():
        return reference.elite_attention(*rows, reference.read_prompt(x.prompts, "key"), *numbers)

    return {"ours": lambda: kernels.elite_attention(*rows, x.prompts, *numbers), "torch": plain}


def elite_check(x: Inputs) -> None:
    calls = elite_calls(x)
    close = torch.allclose(calls["ours"](), calls["torch"](), rtol=1e-3, atol=1e-9)
    require(close, "elite_attention")


def _normal(x: Inputs, *size: int) -> torch.Tensor:
    """Random float32 numbers that bfloat16 has as well, the same every time."""
    device = x.queries.device
    generator = torch.Generator(device).manual_seed(x.shape.length)
    numbers = torch.empty(*size, dtype=torch.bfloat16, device=device)
    return numbers.normal_(generator=generator).float()


ROW_OPERATIONS = (
    Operation(
        "group_attention_sum", masses_cost, masses_calls, masses_check, "group_attention_sum"
    ),
    Operation("cover_votes", votes_cost, votes_calls, votes_check, "cover_votes"),
    Operation("elite_attention", elite_cost, elite_calls, elite_check, "elite_attention"),
)
