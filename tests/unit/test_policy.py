# SPDX-License-Identifier: Apache-2.0
"""How ``--kv-compression-when`` is read."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError
from vllm_kvcompress.policy import ALWAYS, DEFAULT_MARK, When


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
