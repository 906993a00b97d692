# SPDX-License-Identifier: Apache-2.0
"""How ``--kv-compression-when`` is read."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError
from vllm_kvcompress.policy import ALWAYS, DEFAULT_MARK, WaitingQueue, When


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("always", ALWAYS),
        ("pressure", When(DEFAULT_MARK)),
        ("pressure:0.9", When(0.9)),
        (" pressure:0.05 ", When(0.05)),
        (When(0.3), When(0.3)),
    ],
)
def test_parse(text, expected):
    assert When.parse(text) == expected
    assert expected.always == (expected.mark is None)


@pytest.mark.parametrize(
    "text",
    [
        *("", "never", "always:0.5", "always:", "pressure:", "pressure:0", "pressure:1"),
        *("pressure:80%", "pressure:-0.1", "pressure:nan", "pressure:0.5:0.6", "Pressure"),
        *(0.8, None, True),
    ],
)
def test_refused(text):
    with pytest.raises(ValueError, match=r"expected always, pressure or pressure:MARK"):
        When.parse(text)
    with pytest.raises(KVCompressionError, match="--kv-compression-when"):
        KVCompressionConfig.parse({"method": "snapkv", "when": text})


@given(st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_settings_keep_the_mark(mark):
    config = KVCompressionConfig.parse({"method": "snapkv", "when": When(mark)})
    again = KVCompressionConfig.parse(json.loads(json.dumps(config.to_json())))
    assert again == config
    assert again.when.mark == mark


@pytest.mark.parametrize("size", [0, -1, 1.5, "64", True, None])
def test_workspace_is_a_whole_number_of_mib(size):
    with pytest.raises(KVCompressionError, match="workspace_mib: expected a whole number"):
        KVCompressionConfig.parse({"method": "snapkv", "workspace_mib": size})


class TestWaitingQueue:
    def test_each_prompt_keeps_its_policy(self):
        queue = WaitingQueue[str]()
        assert queue.lowest_mark == 1
        queue.add("a", "A", ALWAYS, returns=False)
        queue.add("b", "B", When(0.9), returns=False)
        queue.add("c", "C", When(0.5), returns=True)
        assert queue.prompts() == ["A", "B", "C"]
        assert queue.expected() == [("a", "A"), ("c", "C")]
        assert queue.lowest_mark == 0.5
        assert queue.any_returning
        queue.discard("c")
        queue.discard("c")
        assert queue.lowest_mark == 0.9
        assert not queue.any_returning
        assert queue.prompts() == ["A", "B"]

    def test_who_comes_again_is_there_once(self):
        queue = WaitingQueue[str]()
        queue.add("a", "before", When(0.3), returns=False)
        queue.add("a", "after", When(0.7), returns=False)
        assert queue.prompts() == ["after"]
        assert queue.lowest_mark == 0.7
        queue.discard("a")
        assert queue.prompts() == queue.expected() == []
        assert queue.lowest_mark == 1

    def test_marks(self):
        assert When(0.5).wants(0.6)
        assert not When(0.5).wants(0.5)
        assert not ALWAYS.wants(1.0)
