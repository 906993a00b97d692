# SPDX-License-Identifier: Apache-2.0
"""Budgets that are known from the prompt length: published numbers, files, and properties."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvcompress.allocation.profiles import load_head_scores
from vllm_kvcompress.allocation.pyramid import Pyramid
from vllm_kvcompress.allocation.sparsemm import SparseMM

ENDLESS = 10_000
"""Tokens of a prompt that bounds no head."""

SIGMA = [[0, 0.1, 0.3, 0.2], [0.05, 0.05, 0.1, 0.2]]
"""Head scores of the worked example: 2 layers x 4 query heads, in groups of 2."""


def layers(allocator, capacity, num_candidates, num_layers) -> list[int]:
    """Scored tokens per layer; every head of a layer has them."""
    rows = allocator.head_budgets(capacity, num_candidates, num_layers, 3)
    assert all(row == [row[0]] * 3 for row in rows)
    return [row[0] for row in rows]


class TestPyramid:
    @pytest.mark.parametrize(
        ("beta", "num_candidates", "official", "exact"),
        [
            (20, 96, [16, 11, 6, 1], [16, 11, 5, 0]),
            (4, 96, [14, 10, 6, 2], [14, 10, 6, 2]),
            (4, 12, [12, 10, 8, 6], [12, 9, 7, 4]),
        ],
    )
    def test_published_schedules(self, beta, num_candidates, official, exact):
        assert layers(Pyramid(beta=beta), 8, num_candidates, 4) == exact
        assert layers(Pyramid(beta=beta, rounding="official"), 8, num_candidates, 4) == official

    def test_published_model(self):
        exact = layers(Pyramid(), 32, ENDLESS, 28)
        assert sum(exact) == 896
        assert exact[:5] == [62, 60, 58, 56, 53]
        assert exact[-3:] == [6, 4, 2]

    @pytest.mark.parametrize(
        ("budget", "num_layers", "first", "last", "mean", "overspent"),
        [
            (64, 28, 63, 9, 36.0, 6.3),
            (64, 32, 63, 1, 32.0, 0.0),
            (64, 48, 63, 16, 39.5, 11.7),
            (128, 28, 188, 26, 107.0, 8.6),
            (128, 32, 188, 33, 110.5, 11.3),
            (128, 48, 188, 47, 117.5, 16.8),
            (256, 28, 437, 32, 234.5, 4.1),
            (256, 32, 437, 34, 235.5, 4.5),
            (256, 48, 437, 14, 225.5, 0.6),
        ],
    )
    def test_published_overspend(self, budget, num_layers, first, last, mean, overspent):
        official = layers(Pyramid(rounding="official"), budget - 32, ENDLESS, num_layers)
        assert (official[0], official[-1]) == (first, last)
        assert sum(official) / num_layers == mean
        assert 100 * ((mean + 32) / budget - 1) == pytest.approx(overspent, abs=0.051)

    @given(st.integers(1, 99), st.integers(1, 300), st.integers(2, 120), st.integers(1, 40))
    def test_bound_on_overspend(self, capacity, more, num_layers, beta):
        """The one that the method's description tells."""
        allocator = Pyramid(beta=beta, rounding="official")
        spent = sum(layers(allocator, capacity, capacity + more, num_layers)) / num_layers
        bound = min(num_layers / 2 - 1, capacity - capacity // beta)
        assert 0 <= spent - capacity <= bound

    @pytest.mark.parametrize(("num_layers", "overspent"), [(63, 0), (64, 31), (94, 31)])
    def test_overspend_of_deep_models(self, num_layers, overspent):
        """Up to 48 % of a budget of 64: with a step of 0 all layers get what the first has."""
        official = layers(Pyramid(rounding="official"), 32, ENDLESS, num_layers)
        assert sum(official) == (32 + overspent) * num_layers
        assert overspent / 64 < 0.485

    @given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 50), st.integers(1, 40))
    def test_total_bounds_and_order(self, capacity, more, num_layers, beta):
        num_candidates = capacity + more
        for rounding in ("exact", "official"):
            allocator = Pyramid(beta=beta, rounding=rounding)
            result = layers(allocator, capacity, num_candidates, num_layers)
            assert len(result) == num_layers
            assert all(0 <= count <= num_candidates for count in result)
            assert result == sorted(result, reverse=True)
            assert result == layers(allocator, capacity, num_candidates, num_layers)
            if rounding == "exact":
                assert sum(result) == capacity * num_layers
            else:
                assert sum(result) >= capacity * num_layers

    @pytest.mark.parametrize("options", [{"beta": 0}, {"beta": 2.5}, {"rounding": "up"}])
    def test_bad_options(self, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            Pyramid(**options)


@pytest.fixture
def write(tmp_path):
    """Writes a file and returns its path."""
    count = iter(range(1000))

    def write(content) -> str:
        path = tmp_path / f"heads-{next(count)}.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


def as_file(sigma) -> dict[str, list[float]]:
    return {f"{i}-{h}": [s] for i, layer in enumerate(sigma) for h, s in enumerate(layer)}


class TestSparseMM:
    def test_published_budgets(self, write):
        path = write(as_file(SIGMA))
        exact, official = SparseMM(path), SparseMM(path, rounding="official")
        assert exact.head_budgets(10, 100, 2, 2) == [[5, 19], [4, 12]]
        assert official.head_budgets(10, 100, 2, 2) == [[5, 19], [5, 12]]
        assert exact.head_budgets(10, 12, 2, 2) == [[8, 12], [8, 12]]
        assert sum(map(sum, official.head_budgets(10, 12, 2, 2))) == 34

    @pytest.mark.parametrize(
        ("budget", "even", "rest"), [(64, 3, 3248), (128, 9, 9744), (256, 22, 22624)]
    )
    def test_published_model(self, write, budget, even, rest):
        """28 layers, 28 query and 4 KV heads, with one head that has all the score."""
        sigma = [[0.0] * 28 for _ in range(28)]
        sigma[5][13] = 0.25
        tokens = SparseMM(write(as_file(sigma))).head_budgets(budget - 32, 10**6, 28, 4)
        assert tokens[5].pop(1) == even + rest
        assert {count for layer in tokens for count in layer} == {even}

    def test_one_query_head_per_kv_head(self, write):
        """No groups: each score is a head's own."""
        tokens = SparseMM(write(as_file([[1, 3]])), rho=0.0).head_budgets(4, 100, 1, 2)
        assert tokens == [[2, 6]]

    def test_the_mean_of_a_list_counts(self, write):
        path = write({"0-0": [0.1, 0.3], "0-1": [0.6]})
        assert load_head_scores(path) == ((pytest.approx(0.2), 0.6),)

    def test_order_of_keys_does_not_matter(self, write):
        ordered = as_file(SIGMA)
        shuffled = dict(sorted(ordered.items(), key=lambda item: item[0][::-1], reverse=True))
        assert list(shuffled) != list(ordered)
        assert load_head_scores(write(shuffled)) == load_head_scores(write(ordered))

    def test_keys_are_numbers_not_text(self, write):
        """Head 10 comes after head 9."""
        scores = load_head_scores(write({f"0-{h}": [float(h)] for h in reversed(range(12))}))
        assert scores == (tuple(float(h) for h in range(12)),)

    @given(st.data())
    def test_total_and_bounds(self, tmp_path_factory, data):
        num_layers, num_heads, group = (data.draw(st.integers(1, 4)) for _ in range(3))
        row = st.lists(st.floats(0, 1), min_size=num_heads * group, max_size=num_heads * group)
        sigma = data.draw(st.lists(row, min_size=num_layers, max_size=num_layers))
        if not math.fsum(map(math.fsum, sigma)):
            sigma[0][0] = 1.0
        path = tmp_path_factory.mktemp("heads") / "scores.json"
        path.write_text(json.dumps(as_file(sigma)))
        capacity = data.draw(st.integers(1, 60))
        num_candidates = capacity + data.draw(st.integers(1, 200))
        rho = data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
        allocator = SparseMM(str(path), rho=rho)
        result = allocator.head_budgets(capacity, num_candidates, num_layers, num_heads)
        flat = [count for layer in result for count in layer]
        assert [len(layer) for layer in result] == [num_heads] * num_layers
        assert sum(flat) == capacity * num_layers * num_heads
        assert all(0 <= count <= num_candidates for count in flat)
        assert result == allocator.head_budgets(capacity, num_candidates, num_layers, num_heads)

    def test_a_missing_path_says_how_to_make_the_file(self):
        with pytest.raises(ValueError, match="vllm-kvcompress calibrate-heads MODEL"):
            SparseMM()


class TestHeadScoreFiles:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{0-0: [1]", "is not JSON"),
            ([1, 2], "expected a JSON object"),
            ({}, "expected a JSON object"),
            ({"layer0": [1]}, "'layer0' is not \"layer-head\""),
            ({"0-0": [1], "0--1": [1]}, "'0--1' is not"),
            ({"0-0": []}, "head 0-0 needs a list"),
            ({"0-0": 0.5}, "head 0-0 needs a list"),
            ({"0-0": ["0.5"]}, "head 0-0 needs a list"),
            ({"0-0": [True]}, "head 0-0 needs a list"),
            ('{"0-0": [NaN]}', "head 0-0 needs a list"),
            ({"0-0": [1], "0-1": [0.5, -0.1]}, "head 0-1 has a negative score, -0.1"),
            ({"0-0": [1], "00-0": [1]}, "duplicate entry for head 0-0"),
            ({"0-0": [0], "0-1": [0.0]}, "all head scores are 0"),
        ],
    )
    def test_bad_content(self, write, content, message):
        path = write(content)
        with pytest.raises(ValueError, match=message) as error:
            SparseMM(path)
        assert path in str(error.value)

    def test_missing_heads_are_named(self, write):
        content = as_file([[1.0] * 4] * 3)
        for key in ("0-2", "2-0", "2-3"):
            del content[key]
        del content["1-1"]
        message = "3 layers x 4 query heads these are missing: 0-2, 1-1, 2-0, 2-3$"
        with pytest.raises(ValueError, match=message):
            SparseMM(write(content))

    def test_many_missing_heads_are_counted(self, write):
        with pytest.raises(ValueError, match="0-1, 0-2, 0-3, 0-4, 0-5 and 3 more"):
            SparseMM(write({"0-0": [1], "0-9": [1]}))

    def test_no_such_file(self, tmp_path):
        with pytest.raises(ValueError, match="cannot be read: No such file"):
            SparseMM(str(tmp_path / "absent.json"))

    @pytest.mark.parametrize(("num_layers", "num_query_heads"), [(3, 4), (2, 8), (1, 4), (2, 2)])
    def test_a_file_of_another_model(self, write, num_layers, num_query_heads):
        path = write(as_file(SIGMA))
        message = f"2 layers x 4 query heads, the model has {num_layers} x {num_query_heads}"
        with pytest.raises(ValueError, match=message):
            SparseMM(path).check_model(num_layers, num_query_heads)
        SparseMM(path, allow_uniform_fallback=True).check_model(num_layers, num_query_heads)
        SparseMM(path).check_model(2, 4)

    def test_a_file_that_cannot_be_split_among_kv_heads(self, write):
        with pytest.raises(ValueError, match="does not fit 2 layers of 3 KV heads"):
            SparseMM(write(as_file(SIGMA))).head_budgets(10, 100, 2, 3)

    @pytest.mark.parametrize("sigma", [[[0.0, 0.0]], SIGMA])
    def test_uniform_fallback_is_even_and_told(self, write, caplog, sigma):
        allocator = SparseMM(write(as_file(sigma)), allow_uniform_fallback=True)
        assert allocator.head_budgets(7, 100, 1, 2) == [[7, 7]]
        assert "does not fit the model" in caplog.text
