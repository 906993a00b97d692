# SPDX-License-Identifier: Apache-2.0
"""What requests may choose: what they get, and what a refusal says."""

import pickle
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvcompress.budget import Budget
from vllm_kvcompress.choices import KEYS, Choices, RequestError
from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError
from vllm_kvcompress.policy import When
from vllm_kvcompress.scoring import Need

BLOCK_SIZE = 16


def choices_of(**settings) -> Choices:
    config = {"method": "bacon", "budget": 128, "mode": "rel"} | settings
    return Choices.of(KVCompressionConfig.parse(config), BLOCK_SIZE)


DEFAULT = choices_of()
OPEN = choices_of(allow="off,budget,window,when,aircache,h2o+uniform,pyramidkv")
CLOSED = choices_of(allow="nothing")


def refusal(choices: Choices, **asked) -> str:
    with pytest.raises(RequestError) as caught:
        choices.settings(asked)
    return str(caught.value)


class TestWhatTheyGet:
    def test_nothing_asked(self):
        for asked in (None, {}, {"session_id": "a", "kv_transfer_params": {"x": 1}}):
            assert DEFAULT.settings(asked) == (DEFAULT.own, False, False)

    def test_off_is_a_budget_that_no_prompt_exceeds(self):
        config, off, asked = DEFAULT.settings({"kv_compression": "off"})
        assert config.budget == Budget(ratio=1.0)
        assert off
        assert asked

    @pytest.mark.parametrize("name", ["bacon", "bacon+uniform", "bacon+uniform+none"])
    def test_the_engines_own_method_keeps_its_options(self, name):
        config = DEFAULT.settings({"kv_compression": name, "kv_budget": "10%"}).config
        assert config.options == {"mode": "rel"}
        assert config.budget == Budget(ratio=0.1)

    def test_other_methods_bring_their_own(self):
        config = OPEN.settings({"kv_compression": "aircache"}).config
        assert (config.scorer, config.budget) == ("aircache", Budget(ratio=0.1))
        config = OPEN.settings({"kv_compression": "h2o+uniform"}).config
        assert (config.scorer, config.options, config.budget.tokens) == ("h2o", {}, 128)

    @pytest.mark.parametrize("name", ["pyramidkv", "snapkv+pyramid"])
    def test_other_names_of_what_is_allowed(self, name):
        config = OPEN.settings({"kv_compression": name}).config
        assert config.options == {"rounding": "official"}

    def test_all_keys(self):
        asked = {"kv_compression": "pyramidkv", "kv_budget": "64", "kv_window": "8"}
        config = OPEN.settings(asked | {"kv_compression_when": "pressure"}).config
        assert (config.budget.tokens, config.window) == (64, 8)
        assert config.when == When(0.8)

    @pytest.mark.parametrize("choices", [OPEN, CLOSED])
    def test_the_engines_own_values_are_always_allowed(self, choices):
        asked = {"kv_compression": "bacon", "kv_budget": 128, "kv_window": 32}
        config = choices.settings(asked | {"kv_compression_when": "always"}).config
        assert config == choices.own

    def test_a_smaller_window_allows_a_smaller_budget(self):
        assert OPEN.settings({"kv_window": 8, "kv_budget": 16}).config.budget.tokens == 16

    def test_configs_reach_other_processes(self):
        for config in (*OPEN.configs, OPEN.settings({"kv_compression": "off"}).config):
            assert pickle.loads(pickle.dumps(config)) == config

    def test_room_for_all_methods(self):
        assert Need.KEY_ATTENTION_SUMS | Need.INSTRUCTION_QUERIES in OPEN.needs
        assert OPEN.max_rows == 256
        assert DEFAULT.max_rows == 32

    def test_labels_have_a_bound(self):
        """Whatever requests ask for, metrics get no further series."""
        expected = "bacon+uniform", "aircache+aircache", "h2o+uniform", "snapkv+pyramid", "off"
        assert OPEN.labels == expected

    def test_budgets_and_policies_do_not_split_a_batch(self):
        asked = [{}, {"kv_budget": 40}, {"kv_budget": "5%", "kv_compression_when": "pressure"}]
        operations = {OPEN.settings(one).config.operation for one in asked}
        assert len(operations) == 1
        assert OPEN.settings({"kv_window": 8}).config.operation not in operations
        assert OPEN.settings({"kv_compression": "aircache"}).config.operation not in operations


class TestRefusals:
    @pytest.mark.parametrize(
        ("asked", "nearest"),
        [
            ({"kv_budget": 8}, "33"),
            ({"kv_budget": "0"}, "33"),
            ({"kv_budget": -5}, "33"),
            ({"kv_budget": 64.0}, "64"),
            ({"kv_budget": "0%"}, "1%"),
            ({"kv_budget": "250%"}, "100%"),
            ({"kv_budget": 0.0}, "1%"),
            ({"kv_budget": "many"}, "128"),
            ({"kv_budget": float("nan")}, "128"),
            ({"kv_window": 0}, "1"),
            ({"kv_window": 33}, "32"),
            ({"kv_window": "9" * 30}, "32"),
            ({"kv_window": 2.5}, "2"),
            ({"kv_compression_when": "pressure:7"}, "pressure:0.99"),
            ({"kv_compression_when": "presure"}, "pressure:0.8"),
            ({"kv_compression_when": "never"}, "always"),
            ({"kv_compression": "airchache"}, "aircache"),
            ({"kv_compression": "of"}, "off"),
            ({"kv_compression": 0}, "bacon+uniform"),
        ],
    )
    def test_the_nearest_value_is_named_and_valid(self, asked, nearest):
        text = refusal(OPEN, **asked)
        assert f"Nearest valid value: {nearest}." in text
        [key] = asked
        OPEN.settings({key: nearest})

    def test_a_budget_of_visual_tokens_may_be_small(self):
        asked = {"kv_compression": "aircache", "kv_budget": 1}
        assert OPEN.settings(asked).config.budget.tokens == 1

    def test_a_method_that_was_not_allowed(self):
        text = refusal(DEFAULT, kv_compression="h2o")
        assert "Nearest valid value: bacon+uniform. Valid: bacon+uniform, bacon, off." in text
        assert "started with --kv-compression-allow off,budget,h2o." in text

    def test_a_method_that_does_not_exist(self):
        assert "--kv-compression-allow" not in refusal(DEFAULT, kv_compression="bacno")

    @pytest.mark.parametrize(
        ("asked", "word"),
        [
            ({"kv_compression": "off"}, "off"),
            ({"kv_budget": 64}, "budget"),
            ({"kv_window": 16}, "window"),
            ({"kv_compression_when": "pressure"}, "when"),
        ],
    )
    def test_what_is_not_allowed_at_all(self, asked, word):
        text = refusal(CLOSED, **asked)
        assert "requests may not choose this here" in text
        assert f"--kv-compression-allow {word}." in text

    @pytest.mark.parametrize("key", ["kv_bugdet", "kv_method", "kv-budget", "kv_compress"])
    def test_unknown_keys(self, key):
        text = refusal(DEFAULT, **{key: 1})
        assert f"unknown key {key!r}." in text
        assert f"Valid: {', '.join(KEYS)}." in text

    def test_off_with_a_budget(self):
        assert "leave it out" in refusal(DEFAULT, kv_compression="off", kv_budget=64)

    @pytest.mark.parametrize("value", [[1], {"a": 1}])
    def test_other_types(self, value):
        assert "expected a text or a number" in refusal(DEFAULT, kv_budget=value)


class TestAllow:
    def test_forms(self):
        one = KVCompressionConfig.parse({"method": "bacon", "allow": " off, h2o,off"})
        two = KVCompressionConfig.parse({"method": "bacon", "allow": ["off", "h2o"]})
        assert one == two == KVCompressionConfig.parse(one.to_json())
        assert CLOSED.own == KVCompressionConfig.parse(CLOSED.own.to_json())
        assert DEFAULT.own.allow == ("off", "budget")

    @pytest.mark.parametrize(
        ("allow", "text"),
        [
            ("off,bacno", "--kv-compression-allow: unknown scorer 'bacno'. Did you mean 'bacon'?"),
            ("widnow", "Or did you mean 'window'?"),
            (7, "--kv-compression-allow: expected some of off, budget, window, when"),
            ([["off"]], "--kv-compression-allow: expected some of"),
        ],
    )
    def test_what_cannot_be_read(self, allow, text):
        with pytest.raises(KVCompressionError, match=re.escape(text)):
            KVCompressionConfig.parse({"method": "bacon", "allow": allow})

    def test_methods_that_cannot_run_with_their_defaults(self):
        with pytest.raises(KVCompressionError) as caught:
            choices_of(allow="sparsemm,h2o+uniform+elastic,snapkv")
        text = str(caught.value)
        assert "--kv-compression-allow sparsemm: sparsemm: head_scores is required" in text
        assert "--kv-compression-allow h2o+uniform+elastic: merge elastic joins" in text


words = st.sampled_from(
    ["off", "bacon", "h2o+uniform", "aircache", "always", "pressure:0.5", "10%"]
)
values = st.one_of(
    words,
    st.text(max_size=12),
    st.text("0123456789.%+-eE:_ ", max_size=8),
    st.integers(-(2**63), 2**64),
    st.floats(),
    st.lists(st.integers(), max_size=2),
    st.none(),
)
keys = st.one_of(st.sampled_from(KEYS), st.sampled_from(["kv_transfer_params", "x"]), st.text())


@given(st.dictionaries(keys, values, max_size=5), st.sampled_from([DEFAULT, OPEN, CLOSED]))
def test_any_wish_is_served_or_refused(asked, choices):
    """Nothing else comes of it; what is served keeps within what the engine has room for."""
    try:
        config, off, _ = choices.settings(asked)
    except RequestError:
        return
    assert config.window <= choices.max_rows
    assert config.operation in {c.operation for c in choices.configs} or config.window < 32
    assert KVCompressionConfig.parse(config.to_json()) == config
    assert off is (str(asked.get("kv_compression")).strip() == "off")


@given(st.recursive(values | st.booleans(), lambda v: st.lists(v) | st.dictionaries(words, v)))
def test_any_list_is_read_or_refused(allow):
    try:
        config = KVCompressionConfig.parse({"method": "bacon", "allow": allow})
        Choices.of(config, BLOCK_SIZE)
    except KVCompressionError:
        return
    assert KVCompressionConfig.parse(config.to_json()) == config
