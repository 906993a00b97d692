# SPDX-License-Identifier: Apache-2.0
"""The store of window queries that straddle chunks."""

import torch

from vllm_kvcompress.window_store import WindowStore

NUM_Q_HEADS, HEAD_SIZE = 4, 8


def test_rows_are_stable_and_come_back():
    store = WindowStore(num_layers=2, window=3)
    assert store.rows(["a", "b", "a"]).tolist() == [0, 1, 0]
    store.discard(["a", "unknown"])
    assert store.rows(["b", "c"]).tolist() == [1, 0]
    assert store.rows(["d"]).tolist() == [2]


def test_growing_keeps_the_queries():
    store = WindowStore(num_layers=2, window=3)
    like = torch.zeros(10, NUM_Q_HEADS, HEAD_SIZE, dtype=torch.bfloat16)
    store.rows(["a"])
    first = store.reserve(like)
    first[0] = 1
    store.rows([str(i) for i in range(5)])
    grown = store.reserve(like)
    assert grown.shape == (12, 2, 3, NUM_Q_HEADS, HEAD_SIZE)
    assert grown.dtype == torch.bfloat16
    assert grown[0].eq(1).all()
    assert store.reserve(like) is grown
