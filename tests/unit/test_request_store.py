# SPDX-License-Identifier: Apache-2.0
"""The store of what prompts leave behind from chunk to chunk."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvcompress.request_store import RequestStore

CPU = torch.device("cpu")


def test_rows_are_stable_and_come_back():
    store = RequestStore()
    assert store.rows(["a", "b", "a"]).tolist() == [0, 1, 0]
    store.discard(["a", "unknown"])
    assert store.rows(["b", "c"]).tolist() == [1, 0]
    assert store.rows(["d"]).tolist() == [2]


def test_growing_keeps_what_is_stored():
    store = RequestStore()
    store.rows(["a"])
    first = store.reserve((2, 3), torch.bfloat16, CPU)
    first[0] = 1
    store.rows([str(i) for i in range(5)])
    grown = store.reserve((2, 3), torch.bfloat16, CPU)
    assert grown.shape == (12, 2, 3)
    assert grown.dtype == torch.bfloat16
    assert grown[0].eq(1).all()
    assert grown[1:].eq(0).all()
    assert store.reserve((2, 3), torch.bfloat16, CPU) is grown


def test_shapes_may_only_grow():
    """A longer prompt needs more columns; what stands in the old ones stays."""
    store = RequestStore()
    store.rows(["a", "b"])
    store.reserve((2, 3), torch.float32, CPU)[:2] = 1
    wide = store.reserve((2, 5), torch.float32, CPU)
    assert wide.shape == (4, 2, 5)
    assert wide[:2, :, :3].eq(1).all()
    assert wide[:, :, 3:].eq(0).all()
    assert store.reserve((2, 4), torch.float32, CPU) is wide


steps = st.lists(
    st.tuples(
        st.lists(st.sampled_from("abcdef"), min_size=1, max_size=4, unique=True),
        st.integers(1, 6),
        st.lists(st.sampled_from("abcdef"), max_size=3),
    ),
    max_size=12,
)


@given(steps)
def test_every_request_counts_for_itself(case):
    """Adding up in the store equals adding up by request; a row starts as zeros."""
    store, naive = RequestStore(), {}
    for number, (req_ids, width, gone) in enumerate(case, 1):
        rows = store.rows(req_ids)
        assert len(set(rows.tolist())) == len(req_ids)
        tensor = store.reserve((width,), torch.float64, CPU)
        tensor[torch.from_numpy(rows), :width] += number
        for req_id, row in zip(req_ids, rows, strict=True):
            total = naive.setdefault(req_id, torch.zeros(6, dtype=torch.float64))
            total[:width] += number
            found = tensor[row]
            assert found.equal(total[: len(found)])
            assert total[len(found) :].eq(0).all()
        store.discard(gone)
        for req_id in gone:
            naive.pop(req_id, None)
