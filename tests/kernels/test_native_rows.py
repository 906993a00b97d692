# SPDX-License-Identifier: Apache-2.0
"""The C++ operations on single rows, proxies and the elite, against their definitions."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import DTYPES, NAN, prompts_of, scales_of

from vllm_kvcompress.kernels import native, reference

INF = float("inf")
COVERS = ("floor", "min")
HALF, QUARTER = torch.tensor([0.5]), torch.tensor([0.25])

pytestmark = pytest.mark.usefixtures("cpp")


@pytest.fixture
def threads():
    """Sets the number of threads."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def random_queries(*shape: int, factor: float = 2.0) -> torch.Tensor:
    return factor * torch.randn(shape, generator=torch.Generator().manual_seed(shape[-1]))


class TestGroupMasses:
    def check(self, lengths, heads, head_size, size, rows, groups, dtype=torch.bfloat16, **options):
        num_q_heads, num_kv_heads = heads
        generator = torch.Generator().manual_seed(head_size)
        prompts = prompts_of(lengths, num_kv_heads, head_size, size, dtype, generator)
        factor, softcap = options.get("factor", 2.0), options.get("softcap", 0.0)
        queries = random_queries(len(lengths), rows, num_q_heads, head_size, factor=factor)
        if dtype == torch.bfloat16:
            queries = queries.bfloat16()
        lens, numbers = (
            torch.tensor(lengths),
            (groups, scales_of(len(lengths), head_size**-0.5), softcap),
        )
        keys = reference.read_prompt(prompts, "key")
        expected = reference.group_attention_sum(queries, keys, lens, *numbers)
        found = native.group_attention_sum(queries, prompts, lens, *numbers)
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-7)
        assert found.dtype == torch.float32
        past = torch.arange(found.shape[3]) >= lens[:, None, None, None]
        assert found[past.expand_as(found)].eq(0).all()
        total = torch.full_like(found[..., 0], rows / groups)
        torch.testing.assert_close(found.sum(3), total, rtol=1e-4, atol=0)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("lengths", "heads", "head_size", "size", "rows", "groups"),
        [
            ([1], (1, 1), 64, 16, 1, 1),
            ([63, 9, 64], (8, 2), 24, 16, 12, 3),
            ([1000, 33], (7, 1), 80, 32, 10, 5),
            ([200, 129], (2, 2), 128, 128, 33, 1),
        ],
    )
    def test_shapes(self, lengths, heads, head_size, size, rows, groups, dtype):
        self.check(lengths, heads, head_size, size, rows, groups, dtype)

    @pytest.mark.parametrize("softcap", [0.0, 0.3, 30.0])
    @pytest.mark.parametrize("factor", [0.01, 40.0])
    def test_options(self, softcap, factor):
        """Nearly flat and nearly one-hot rows."""
        shape = ([300, 47], (6, 2), 16, 16, 8, 4)
        self.check(*shape, dtype=torch.float32, softcap=softcap, factor=factor)

    def test_rows_of_several_panels(self):
        """A long prompt, of which less than the rows of a group are in memory."""
        self.check([9000], (4, 1), 8, 32, 20, 1)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_key_that_outshines_the_first_ones(self, dtype):
        """By more than floats can tell the exponentials of."""
        generator = torch.Generator().manual_seed(5)
        prompts = prompts_of([640], 1, 16, 16, dtype, generator)
        keys = prompts.layout.key_index.view(16, 16)
        prompts.pages[prompts.block_table[0, 30, None], keys[3]] = 1000.0
        queries, lens = random_queries(1, 8, 2, 16).to(dtype), torch.tensor([640])
        arguments = (lens, 2, QUARTER)
        expected = reference.group_attention_sum(
            queries, reference.read_prompt(prompts, "key"), *arguments
        )
        found = native.group_attention_sum(queries, prompts, *arguments)
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-9)

    def test_logits_of_minus_infinity(self):
        """Whole tiles of them, then a visible key."""
        generator = torch.Generator().manual_seed(3)
        prompts = prompts_of([640], 1, 4, 16, torch.float32, generator)
        keys = prompts.layout.key_index.view(16, 4)
        prompts.pages[prompts.block_table[0, :36, None], keys[:, 0]] = -INF
        queries, lens = random_queries(1, 8, 2, 4).abs(), torch.tensor([640])
        expected = reference.group_attention_sum(
            queries, reference.read_prompt(prompts, "key"), lens, 2, HALF
        )
        found = native.group_attention_sum(queries, prompts, lens, 2, HALF)
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-9)

    def test_a_nan_spoils_what_it_spoils_in_the_definition(self):
        prompts = prompts_of([100], 2, 16, 16, torch.float32, torch.Generator().manual_seed(2))
        queries, lens = random_queries(1, 4, 4, 16), torch.tensor([100])
        queries[0, 2, 1, 5] = NAN
        keys = reference.read_prompt(prompts, "key")
        expected = reference.group_attention_sum(queries, keys, lens, 2, QUARTER)[..., :100]
        found = native.group_attention_sum(queries, prompts, lens, 2, QUARTER)[..., :100]
        assert found.isnan().any()
        assert not found.isnan().all()
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-9, equal_nan=True)

    def test_what_does_not_fit_is_refused(self):
        prompts = prompts_of([64], 1, 8, 16, torch.float32, torch.Generator().manual_seed(4))
        queries = torch.zeros(1, 6, 1, 8)
        for length in (0, 65):
            with pytest.raises(RuntimeError, match="prompt_lens: expected 1 to 64"):
                native.group_attention_sum(queries, prompts, torch.tensor([length]), 1, HALF)
        with pytest.raises(RuntimeError, match="num_groups: expected a divisor of 6, got 4"):
            native.group_attention_sum(queries, prompts, torch.tensor([64]), 4, HALF)


class TestElite:
    """Prompts of an image and an instruction, whose elite differs between query heads."""

    def case(self, lengths, texts, heads, head_size, size, share, dtype=torch.bfloat16):
        num_q_heads, num_kv_heads = heads
        generator = torch.Generator().manual_seed(head_size)
        prompts = prompts_of(lengths, num_kv_heads, head_size, size, dtype, generator)
        num, rows = len(lengths), max(8, *texts)
        queries = torch.full((num, rows, num_q_heads, head_size), NAN)
        elite = torch.zeros(num, num_q_heads, rows, dtype=torch.bool)
        # what stands after a prompt looks visual
        segment = torch.zeros(num, prompts.block_table.shape[1] * size, dtype=torch.int64)
        for n, (length, text) in enumerate(zip(lengths, texts, strict=True)):
            own = 2 * torch.randn(text, num_q_heads, head_size, generator=generator)
            chosen = torch.rand(num_q_heads, text, generator=generator) < share
            chosen[:, int(torch.randint(text, (1,), generator=generator))] = True
            elite[n, :, rows - text :] = chosen
            # a row that is nobody's elite may hold anything, for each head
            last = chosen.t().clone()
            last[-1] = True
            queries[n, rows - text :] = own.masked_fill(~last[:, :, None], NAN)
            segment[n, :length] = -1
            segment[n, length // 4 : length - text] = 1
        if dtype == torch.bfloat16:
            queries = queries.bfloat16()
        return queries, elite, segment, prompts, torch.tensor(lengths), torch.tensor(texts)

    CASES = (
        ([1], [1], (1, 1), 64, 16, 1.0),
        ([63, 40], [20, 5], (8, 2), 24, 16, 0.3),
        ([130, 9], [3, 1], (7, 1), 80, 32, 1.0),
        ([1000, 333], [100, 256], (4, 4), 32, 32, 0.6),
    )

    @pytest.mark.parametrize("softcap", [0.0, 5.0])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", CASES, ids=str)
    def test_attention(self, shape, dtype, softcap):
        queries, elite, segment, prompts, lens, _ = self.case(*shape, dtype)
        keys = reference.read_prompt(prompts, "key")
        numbers = (scales_of(len(lens), shape[3] ** -0.5), softcap)
        expected = reference.elite_attention(queries, elite, segment, keys, lens, *numbers)
        found = native.elite_attention(queries, elite, segment, prompts, lens, *numbers)
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-7)
        assert found.any() or max(shape[0]) == 1

    @pytest.mark.parametrize("softcap", [0.0, 5.0])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", CASES, ids=str)
    def test_last_row(self, shape, dtype, softcap):
        queries, _, _, prompts, lens, texts = self.case(*shape, dtype)
        keys = reference.read_prompt(prompts, "key")
        numbers = (scales_of(len(lens), shape[3] ** -0.5), softcap)
        expected = reference.last_row_logits(queries, keys, lens, texts, *numbers)
        found = native.last_row_logits(queries, prompts, lens, texts, *numbers)
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)

    def test_the_last_row_reads_the_instruction_only(self):
        """Blocks before it may not even exist."""
        queries, _, _, prompts, lens, texts = self.case([200], [30], (4, 2), 16, 16, 0.5)
        expected = native.last_row_logits(queries, prompts, lens, texts, QUARTER)
        prompts.block_table[:, :10] = 1 << 40
        assert native.last_row_logits(queries, prompts, lens, texts, QUARTER).equal(expected)

    def test_text_keys_are_not_looked_at(self):
        """NaN in them stays where it is; a NaN in a visual key reaches all rows."""
        queries, elite, segment, prompts, lens, _ = self.case([300], [8], (4, 2), 16, 16, 0.2)
        elite[:], arguments = False, (queries, elite, segment, prompts, lens, QUARTER)
        elite[:, :, -1] = True
        expected = native.elite_attention(*arguments)
        where = prompts.layout.key_index.view(16, 16)
        # the first visual token is the 75th, the tile and the block that it is in begin at the 64th
        page = prompts.block_table[0, 4] * 2
        prompts.pages[page, where[10]] = NAN
        assert native.elite_attention(*arguments).equal(expected)
        prompts.pages[page, where[11]] = NAN
        spoilt = native.elite_attention(*arguments)[0].isnan()
        visual = segment[0] >= 0
        assert spoilt[:2, :300].equal(visual[:300].expand(2, -1))
        assert not spoilt[2:].any()

    def test_a_head_without_elite_has_no_attention(self):
        queries, elite, segment, prompts, lens, _ = self.case([70], [20], (4, 2), 16, 16, 0.5)
        elite[0, 1] = False
        keys = reference.read_prompt(prompts, "key")
        expected = reference.elite_attention(queries, elite, segment, keys, lens, QUARTER)
        found = native.elite_attention(queries, elite, segment, prompts, lens, QUARTER)
        assert found[0, 1, segment[0] >= 0].isnan().all()
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-7, equal_nan=True)

    def test_an_instruction_that_is_longer_than_its_prompt(self):
        """Rows before position 0 hold anything."""
        case = self.case([90, 30], [64, 3], (2, 1), 16, 16, 0.5)
        queries, elite, segment, prompts, lens, _ = case
        scale = scales_of(2, 0.25)
        keys = reference.read_prompt(prompts, "key")
        expected = reference.elite_attention(queries, elite, segment, keys, lens, scale)
        found = native.elite_attention(queries, elite, segment, prompts, lens, scale)
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-7)
        with pytest.raises(RuntimeError, match="instruction_len: expected at most 30, got 31"):
            native.last_row_logits(queries, prompts, lens, torch.tensor([64, 31]), scale)


def masses_of(length: int, groups: int = 3) -> torch.Tensor:
    """[6, 2, groups, length]: flat, peaked, few values, zeros, tiny and huge numbers."""
    generator = torch.Generator().manual_seed(length)
    logits = torch.randn(6, 2, groups, length, generator=generator)
    masses = (logits * torch.tensor([1, 12, 1, 1, 1, 1]).view(6, 1, 1, 1)).softmax(-1)
    masses[2] = (logits[2] * 2).round().abs()
    masses[3] = 0.0
    masses[3, 1, :, ::3] = 1.0
    masses[4] *= 1e-38 / masses[4].amax()  # no normal numbers but one
    masses[5] *= 3e38
    return masses


class TestCountVotes:
    def check(self, masses, end, tau, cover):
        outside = torch.arange(masses.shape[3]) >= end[:, None]
        masses = masses.masked_fill(outside[:, None, None], NAN)
        expected = reference.cover_votes(masses, end, tau, cover)
        found = native.cover_votes(masses, end, tau, cover)
        assert found.dtype == torch.float32
        assert found.equal(expected)

    @pytest.mark.parametrize("cover", COVERS)
    @pytest.mark.parametrize("tau", [0.0, 1e-9, 1e-4, 0.2, 0.5, 0.95, 1 - 1e-9, 1.0])
    @pytest.mark.parametrize("length", [1, 63, 1000, 4097])
    def test_shapes(self, length, tau, cover):
        end = torch.tensor([length, length - 1, length // 2, length, length, length // 3 + 1])
        self.check(masses_of(length), end, tau, cover)

    @pytest.mark.parametrize("cover", COVERS)
    @pytest.mark.parametrize(
        "row",
        [
            [0.0, 0.0, 0.0],
            [-0.0, 0.0, -0.0, 1.0],
            [1e-40, 3e-41, 1e-42],
            [1.2e-38, 1.1e-38, 1.1e-38],
            [1.0, 1e-11, 1e-13, 0.0],
            [3e38, 3e38, 1.0],
            [0.25, 0.25, 0.25, 0.25],
        ],
        ids=str,
    )
    def test_odd_numbers(self, row, cover):
        for tau in (0.0, 0.25, 0.5, 0.75, 1.0):
            self.check(torch.tensor(row)[None, None, None], torch.tensor([len(row)]), tau, cover)

    @settings(max_examples=100)
    @given(
        numbers=st.lists(st.integers(0, 5), min_size=4, max_size=40),
        end=st.integers(0, 20),
        eighths=st.integers(0, 8),
        cover=st.sampled_from(COVERS),
    )
    def test_ties_and_exact_boundaries(self, numbers, end, eighths, cover):
        half = len(numbers) // 2
        masses = torch.tensor(numbers[: 2 * half], dtype=torch.float32).view(1, 1, 2, half)
        self.check(masses / 4, torch.tensor([min(end, half)]), eighths / 8, cover)

    def test_masses_need_not_be_dense(self):
        masses = masses_of(500)[..., ::2]
        self.check(masses, torch.full((6,), 250), 0.9, "floor")

    @pytest.mark.parametrize("cover", COVERS)
    def test_what_is_no_number_harms_nobody_else(self, cover):
        masses = masses_of(300)
        spoilt = masses.clone()
        spoilt[1, 1, 1, 7], spoilt[2, 0, 0, 9] = NAN, INF
        end = torch.full((6,), 300)
        same = torch.ones(6, 2, dtype=torch.bool)
        same[1, 1] = same[2, 0] = False
        found = native.cover_votes(spoilt, end, 0.9, cover)[same]
        assert found.equal(native.cover_votes(masses, end, 0.9, cover)[same])

    def test_what_does_not_fit_is_refused(self):
        masses = torch.zeros(1, 1, 1, 2**20 + 1)
        with pytest.raises(RuntimeError, match=r"at most 2\^20 tokens, got 1048577"):
            native.cover_votes(masses, torch.tensor([5]), 0.5, "min")
        with pytest.raises(RuntimeError, match="tau: expected 0 to 1"):
            native.cover_votes(masses[..., :9], torch.tensor([5]), 1.1, "min")


def results() -> list[torch.Tensor]:
    """Of all operations, on inputs that are large enough for several threads."""
    elite = TestElite()
    queries, chosen, segment, prompts, lens, texts = elite.case(*elite.CASES[3])
    scale = scales_of(2, 32**-0.5)
    proxies = random_queries(2, 16, 4, 32)
    masses = native.group_attention_sum(proxies, prompts, lens, 4, scale)
    return [
        masses,
        native.cover_votes(masses, lens, 0.9, "floor"),
        native.last_row_logits(queries, prompts, lens, texts, scale),
        native.elite_attention(queries, chosen, segment, prompts, lens, scale),
    ]


def test_threads_do_not_show(threads):
    threads(1)
    expected = results()
    for number in (2, 5):
        threads(number)
        for ours, theirs in zip(results(), expected, strict=True):
            assert ours.equal(theirs)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_smaller_instruction_sets(capability):
    """The kernels that other processors would use."""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    command = [sys.executable, "-P", "-m", "pytest", __file__, "-k", "TestGroup or TestElite"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
