# SPDX-License-Identifier: Apache-2.0
"""Page tables in Triton (interpreted, or on a GPU) and in C++ against their definition."""

import pytest
import torch

from vllm_kvcompress.kernels import HeldPages, native, page_tables, reference_decode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["triton", "cpp"])
def function(request):
    if request.param == "triton":
        return page_tables.head_page_tables, DEVICE
    request.getfixturevalue("cpp")
    return native.head_page_tables, "cpu"


@pytest.mark.parametrize(
    ("num_layers", "num_rows", "num_heads", "num_blocks", "block_size", "width"),
    [
        (1, 1, 1, 1, 16, 1),
        (3, 5, 3, 40, 16, 43),
        (1, 8, 4, 1100, 32, 1110),
        (2, 2, 7, 63, 16, 80),
        (4, 3, 2, 300, 32, 299),
    ],
)
@pytest.mark.parametrize(("layer", "layer_pages"), [(0, 0), (0, 70_000), (2, 70_000)])
def test_equals_the_definition(
    function, num_layers, num_rows, num_heads, num_blocks, block_size, width, layer, layer_pages
):
    generator = torch.Generator().manual_seed(num_rows)

    def draw(low, high, *shape):
        return torch.randint(low, high, shape, dtype=torch.int32, generator=generator)

    num_slots = num_rows + 4
    full = draw(0, num_blocks, num_slots)
    full[::3] = 0  # uncompressed
    compressed = full >= 6
    full = torch.where(compressed, full, 0).int()
    # n blocks offer n pages per head
    kept = torch.where(compressed, torch.minimum(draw(6, 12, num_slots), full), 1).int()
    count = draw(0, 7, num_layers, num_slots, num_heads)
    count = torch.where(compressed[:, None], count, 0).int()
    start = (count.cumsum(2) - count).int()
    if layer_pages:  # a layer's pages begin anywhere among those of all layers
        start += torch.where(compressed, draw(0, 9, num_slots), 0).int()[:, None]
    blocks = draw(0, 9999, num_rows, num_blocks + 3)[:, :num_blocks]  # a row stride of its own
    slots = torch.randperm(num_slots, generator=generator)[:num_rows]
    seq_lens = draw(1, num_blocks * block_size + 1, num_rows)
    seq_lens[-1] = 0  # padding
    found = []
    for call, where in (function, (reference_decode.head_page_tables, "cpu")):
        table = torch.full((num_layers, num_rows * num_heads, width), -1, dtype=torch.int32)
        kv_len = torch.full(table.shape[:2], -1, dtype=torch.int32)
        state = (t.to(where) for t in (slots, full, kept, count, start))
        table, kv_len = table.to(where), kv_len.to(where)
        held = HeldPages(*state, layer, layer_pages)
        call(table, kv_len, blocks.to(where), seq_lens.to(where), held, block_size)
        found.append((table.cpu(), kv_len.cpu()))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
