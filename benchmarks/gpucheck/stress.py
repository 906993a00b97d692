# SPDX-License-Identifier: Apache-2.0
"""Compactions at random, thousands of them, each compared with the plain definition.

    python -m gpucheck.stress --rounds 10000
    python -m gpucheck.stress --rounds 3 --small          # for compute-sanitizer
    python -m gpucheck.stress --rounds 20 --interpret     # Triton's interpreter; no GPU

Sources and targets of a compaction overlap: a token may move into the page that another program
still reads. A missing order between the two shows as a wrong element now and then, so rounds are
many, prompts fill the device several times over, and every round starts from fresh random pages.
"""

import argparse
import os
import random
import sys
import time
from types import ModuleType
from typing import NamedTuple

import torch

from vllm_kvcompress.kernels import PageLayout, PromptPages, reference


class Compaction(NamedTuple):
    """Arguments of the two operations of a compaction, one layer of N prompts.

    Attributes:
        staged: [N, pages, block_size * 2 * D], written.
        kept: [N, Hkv, K] positions.
        count, start: [N, Hkv] pages of each head, and the number of its first.
        num_pages: [N] staged pages that are written.
        num_full, num_kept: [N] blocks.
    """

    staged: torch.Tensor
    kept: torch.Tensor
    count: torch.Tensor
    start: torch.Tensor
    num_pages: torch.Tensor
    num_full: torch.Tensor
    num_kept: torch.Tensor


CHECK_EVERY = 100  # rounds between two waits for the device


def draw_case(
    rng: random.Random, generator: torch.Generator, small: bool
) -> tuple[PromptPages, Compaction]:
    """Random prompts of one layer, with int16 elements, and what is kept of them.

    Ragged everywhere: block counts per prompt, pages per head, kept positions. The heads of a
    prompt own exactly the n * Hkv pages of its kept blocks, in some cases all but a few of them.
    """
    device = generator.device
    num, heads = (rng.randint(1, 2), 2) if small else (rng.randint(1, 8), rng.choice((1, 2, 4, 8)))
    size = rng.choice((16, 32))
    head_size = 32 if small else rng.choice((64, 80, 128))
    most = 9 if small else rng.choice((9, 40, 120))

    def integers(low: int, high: torch.Tensor | int, *shape: int) -> torch.Tensor:
        """In [low, high], high per row or for all."""
        share = torch.rand(*shape, dtype=torch.float64, device=device, generator=generator)
        return (low + share * (high - low + 1)).long()

    num_full = integers(most // 2, most, num)
    num_kept = integers(2, num_full - 1, num)
    # the n * Hkv pages of a prompt in runs of n per head, their ends moved at random by up to n
    total = num_kept[:, None] * heads
    even = num_kept[:, None] * torch.arange(1, heads, device=device)
    moved = integers(0, 2 * num_kept[:, None], num, heads - 1) - num_kept[:, None]
    cuts = (even + moved).clamp_min(0).minimum(total).sort(1).values
    edges = torch.cat([torch.zeros_like(total), cuts, total], 1)
    start = edges[:, :-1]
    count = torch.minimum(edges[:, 1:] - start, num_full[:, None])

    length = most * size
    scores = torch.rand(num, heads, length, device=device, generator=generator)
    position = torch.arange(length, device=device)
    scores.masked_fill_((position >= (num_full * size)[:, None])[:, None], 2.0)  # beyond the prompt
    kept = scores.argsort(2)
    kept = kept.masked_fill(position >= (count * size)[:, :, None], length).sort(2).values
    pages = torch.randint(
        -(1 << 15), 1 << 15, ((num * most + 1) * heads, size * 2 * head_size),
        dtype=torch.int16, device=device, generator=generator,
    )  # fmt: skip
    table = torch.randperm(num * most, device=device, generator=generator).view(num, most) + 1
    prompts = PromptPages(pages, table, heads, PageLayout(size, head_size))
    staged = pages.new_zeros(num, int(num_kept.max()) * heads, pages.shape[1])
    num_pages = (start + count).amax(1)
    return prompts, Compaction(staged, kept, count, start, num_pages, num_full, num_kept)


def compact(prompts: PromptPages, tables: Compaction, interpret: bool) -> None:
    """Ours: what engines call, or its Triton version on CPU tensors."""
    if interpret:
        from vllm_kvcompress.kernels import compaction

        in_place(compaction, prompts, tables)
    else:
        from vllm_kvcompress import kernels

        in_place(kernels, prompts, tables)


def in_place(operations: ModuleType, prompts: PromptPages, tables: Compaction) -> None:
    """Kept tokens into the pages of the kept blocks, by the operations of a module."""
    staged, kept, count, start, *numbers = tables
    operations.stage_tokens(prompts, kept, count, start, staged)
    operations.write_pages(prompts, staged, *numbers, 0)  # of one layer


def run(rounds: int, seed: int, small: bool, interpret: bool) -> int:
    """Rounds with a wrong element outside block 0, which belongs to nobody."""
    device = torch.device("cpu" if interpret else "cuda")
    generator, rng = torch.Generator(device).manual_seed(seed), random.Random(seed)
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    moved = torch.zeros((), dtype=torch.int64, device=device)
    for number in range(1, rounds + 1):
        prompts, tables = draw_case(rng, generator, small)
        before = prompts.pages.clone()
        expected = prompts._replace(pages=before.clone())
        compact(prompts, tables._replace(staged=tables.staged.clone()), interpret)
        in_place(reference, expected, tables)
        heads = prompts.num_kv_heads
        wrong += (prompts.pages[heads:] != expected.pages[heads:]).any()
        moved += (expected.pages[heads:] != before[heads:]).any()
        if number % CHECK_EVERY == 0 or number == rounds:
            print(f"{number} compactions, {int(wrong)} wrong", flush=True)
            if wrong:
                return int(wrong)
    assert int(moved) == rounds, "a round moved nothing, so it checked nothing"
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="few and small prompts")
    parser.add_argument("--interpret", action="store_true", help="in Triton's interpreter")
    args = parser.parse_args()
    if args.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    elif not torch.cuda.is_available():
        sys.exit("no GPU here; --interpret rehearses without one")
    start = time.monotonic()
    wrong = run(args.rounds, args.seed, args.small, args.interpret)
    print(f"{args.rounds} rounds in {time.monotonic() - start:.1f} s, seed {args.seed}")
    sys.exit(f"{wrong} compactions were wrong" if wrong else 0)


if __name__ == "__main__":
    main()
