# SPDX-License-Identifier: Apache-2.0
"""The Triton page-table kernel, in the interpreter or on a GPU, against its reference."""

import pytest
import torch

from vllm_kvcompress.kernels import page_tables, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    ("num_rows", "num_heads", "num_blocks", "block_size", "width"),
    [(1, 1, 1, 16, 1), (5, 3, 40, 16, 33), (8, 4, 1100, 32, 1061), (2, 7, 63, 16, 63)],
)
@pytest.mark.parametrize(("layer", "layer_pages"), [(0, 0), (0, 70_000), (2, 70_000)])
def test_equals_the_reference(
    num_rows, num_heads, num_blocks, block_size, width, layer, layer_pages
):
    generator = torch.Generator().manual_seed(num_rows)

    def draw(low, high, *shape):
        return torch.randint(low, high, shape, dtype=torch.int32, generator=generator)

    full = draw(0, num_blocks, num_rows)
    full[::3] = 0  # uncompressed rows
    compressed = full > 0
    kept = torch.where(compressed, torch.minimum(draw(1, 6, num_rows), full), 1).int()
    count = torch.where(compressed[:, None], draw(0, 7, num_rows, num_heads), 0).int()
    start = (count.cumsum(1) - count).int()
    if layer_pages:  # a layer's pages begin anywhere among those of all layers
        start += torch.where(compressed, draw(0, 9, num_rows), 0).int()[:, None]
    table = draw(0, 9999, num_rows, num_blocks + 3)[:, :num_blocks]  # a row stride of its own
    seq_lens = draw(1, num_blocks * block_size + 1, num_rows)
    tensors = [t.to(DEVICE) for t in (table, seq_lens, full, kept, count, start)]
    expected = reference.head_page_tables(*tensors, block_size, width, layer, layer_pages)
    found = page_tables.head_page_tables(*tensors, block_size, width, layer, layer_pages)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
