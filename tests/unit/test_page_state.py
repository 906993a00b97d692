# SPDX-License-Identifier: Apache-2.0
"""Which pages requests hold, slot by slot, and where their page tables stand."""

import torch

from vllm_kvcompress import page_state
from vllm_kvcompress.page_state import HeadPageState, PageTables

NUM_KV_HEADS = 2
CPU = torch.device("cpu")


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


class TestHeadPageState:
    COUNT = torch.tensor([[[1, 3], [4, 2]], [[2, 2], [3, 3]]])  # [N, L, Hkv]

    def stored(self, num_layers: int) -> HeadPageState:
        state = HeadPageState(3, num_layers, NUM_KV_HEADS, CPU)
        blocks = torch.tensor([5, 6]), torch.tensor([2, 3])
        state.store(torch.tensor([2, 0]), *blocks, self.COUNT, self.COUNT + 10)
        return state

    def test_pages_of_all_layers(self):
        state = self.stored(2)
        assert state.num_full_blocks.tolist() == [6, 0, 5, 0]
        assert state.num_kept_blocks.tolist() == [3, 1, 2, 1]
        assert state.page_count[:, 2].tolist() == [[1, 3], [4, 2]]
        assert state.page_count[:, 0].tolist() == [[2, 2], [3, 3]]
        assert state.page_start[:, 2].tolist() == [[11, 13], [14, 12]]
        assert state.page_count[:, [1, 3]].eq(0).all()

    def test_layers_that_are_alike_share_the_first_ones_pages(self):
        state = self.stored(1)
        assert state.page_count[0].tolist() == [[2, 2], [0, 0], [1, 3], [0, 0]]
        assert state.page_start[0, 2].tolist() == [11, 13]


class TestPageTables:
    def test_nobodys_slot_lists_all_blocks(self):
        buffers = PageTables(HeadPageState(3, 2, NUM_KV_HEADS, CPU), 3, 4)
        rows = torch.tensor([3]), int32(4, 7, 2)[None], int32(9)
        tables, kv_len = buffers.fill(*rows, 0, 2)
        assert tables.tolist() == [[[8, 14, 4], [9, 15, 5]]] * 2
        assert kv_len.tolist() == [[9, 9]] * 2
        tables, _ = buffers.fill(*rows, 1, 1, layer_pages=20)
        assert tables.tolist() == [[[28, 34, 24], [29, 35, 25]]]

    def test_few_requests_have_room_for_more_layers(self, monkeypatch):
        monkeypatch.setattr(page_state, "MOST_IDS", 100)
        buffers = PageTables(HeadPageState(6, 4, NUM_KV_HEADS, CPU), 5, 4)
        assert [buffers.layers_at_once(rows) for rows in (1, 2, 3, 5, 6)] == [4, 4, 3, 2, 1]

    def test_one_layer_has_room_whatever_its_size(self, monkeypatch):
        monkeypatch.setattr(page_state, "MOST_IDS", 100)
        buffers = PageTables(HeadPageState(60, 4, NUM_KV_HEADS, CPU), 5, 4)
        assert buffers.layers_at_once(60) == 1

    def test_tables_stay_where_they_are(self):
        """Full graphs read them at the address that they had when they were captured."""
        state = HeadPageState(3, 2, NUM_KV_HEADS, CPU)
        count = torch.ones(1, 2, NUM_KV_HEADS, dtype=torch.int64)
        start = torch.tensor([[[0, 1], [2, 3]]])
        state.store(torch.tensor([1]), torch.tensor([2]), torch.tensor([1]), count, start)
        buffers = PageTables(state, 4, 4)
        blocks = int32(4, 7, 2, 9)[None]
        tables, kv_len = buffers.fill(torch.tensor([0]), blocks, int32(14), 0, 2)
        addresses = tables.data_ptr(), kv_len.data_ptr()
        assert tables.tolist() == [[[8, 14, 4, 18], [9, 15, 5, 19]]] * 2
        tables, kv_len = buffers.fill(torch.tensor([1]), blocks, int32(11), 0, 2)
        assert addresses == (tables.data_ptr(), kv_len.data_ptr())
        assert kv_len.tolist() == [[7, 7]] * 2
        # past the length nothing is written
        assert tables.tolist() == [[[14, 4, 4, 18], [15, 5, 5, 19]]] * 2
