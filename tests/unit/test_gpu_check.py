# SPDX-License-Identifier: Apache-2.0
"""The parts of the GPU check that decide: they must pass what is right and stop what is wrong."""

import dataclasses
import os
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import kernel_bench
import numpy as np
import oracle
import pytest
import torch
from conftest import ROOT
from decode_operations import decode_operations
from experiments import paged_decode
from gpucheck import compare, stress
from gpucheck.compare import assert_same_kept, assert_same_tokens
from gpucheck.forced import ForcedModel
from gpucheck.packages import stage_plugin, unpack, unpack_wheel
from gpucheck.watch import ScoredPrompt
from operations import OPERATIONS, Shape, make_inputs
from row_operations import ROW_OPERATIONS
from whole_call import WHOLE_CALLS

from vllm_kvcompress import kernels
from vllm_kvcompress.kernels import reference

CONFIG = oracle.OracleConfig(budget=64, window=32, kernel=1, block_size=16)


def python(*code: str) -> list[str]:
    return [sys.executable, "-P", "-c", "; ".join(code)]


class TestPackages:
    def test_wheel(self, tmp_path):
        wheel = tmp_path / "thing-1-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("thing/__init__.py", "")
            archive.writestr("thing-1.data/purelib/other.py", "")
            archive.writestr("thing-1.data/scripts/tool", "")
        site = tmp_path / "site"
        unpack(tmp_path, site)
        files = {str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()}
        assert files == {"thing/__init__.py", "other.py"}

    def test_wheel_that_reaches_out(self, tmp_path):
        wheel = tmp_path / "evil.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("../evil.py", "")
        with pytest.raises(ValueError, match="outside"):
            unpack_wheel(wheel, tmp_path / "site")
        assert not (tmp_path / "evil.py").exists()

    def test_folder_of_packages(self, tmp_path):
        packages, site = tmp_path / "packages", tmp_path / "cache" / "site"
        (packages / "thing").mkdir(parents=True)
        for _ in range(2):  # a second run finds what the first has left
            unpack(packages, site)
            assert (site / "thing").is_dir()
        with pytest.raises(ValueError, match="--packages"):
            unpack(tmp_path / "nothing", site)

    def test_script_that_unpacks(self, tmp_path):
        script = tmp_path / "unbundle.sh"
        script.write_text('mkdir -p "$2" && cp "$1/thing.txt" "$2"')
        (tmp_path / "thing.txt").touch()
        unpack(tmp_path, tmp_path / "site")
        assert (tmp_path / "site" / "thing.txt").exists()
        script.write_text("exit 3")
        with pytest.raises(subprocess.CalledProcessError):
            unpack(tmp_path, tmp_path / "site")

    def test_staged_plugin(self, tmp_path):
        """A copy has package, kernels and entry point, and goes before what is installed."""
        site = stage_plugin(ROOT, tmp_path / "plugin")
        code = python(
            "from importlib.metadata import entry_points",
            "(e,) = entry_points(group='vllm.general_plugins', name='kvcompress')",
            "import vllm_kvcompress, vllm_kvcompress.kernels.reference as r",
            "print(e.value, vllm_kvcompress.__file__, r.__file__, sep='\\n')",
        )
        env = os.environ | {"PYTHONPATH": str(site)}
        done = subprocess.run(code, env=env, capture_output=True, text=True, check=True)
        value, package, operations = done.stdout.splitlines()
        assert value == "vllm_kvcompress:register"
        assert package == str(site / "vllm_kvcompress" / "__init__.py")
        assert operations == str(site / "vllm_kvcompress" / "kernels" / "reference.py")


def answer(token_ids, logprobs):
    return SimpleNamespace(token_ids=token_ids, logprobs=logprobs)


class TestSameTokens:
    STOCK = answer([5, 6, 7], [-1.0, -1.0, -1.0])

    @pytest.mark.parametrize(
        ("other", "parted"),
        [
            (answer([5, 6, 7], [-1.0, -1.001, -1.0]), 0),
            (answer([5, 9, 9], [-1.0, -1.001, -8.0]), 1),  # another text from the near tie on
        ],
    )
    def test_same(self, other, parted):
        assert assert_same_tokens([other], [self.STOCK], "float16") == parted

    @pytest.mark.parametrize(
        "other",
        [
            answer([5, 9, 7], [-1.0, -1.2, -1.0]),
            answer([5, 6, 7], [-1.0, -1.2, -1.0]),
            answer([5, 6], [-1.0, -1.0]),
        ],
    )
    def test_different(self, other):
        with pytest.raises(AssertionError):
            assert_same_tokens([other], [self.STOCK], "float16")


class TestSameKept:
    @pytest.fixture
    def scored(self):
        rng = np.random.default_rng(0)
        keys = rng.normal(size=(2, 2, 200, 8)).astype(np.float32)
        queries = rng.normal(size=(2, 4, 200, 8)).astype(np.float32)
        return ScoredPrompt(queries, keys, 1.0)

    def kept(self, scored):
        return oracle.kept_sets(scored.queries, scored.keys, CONFIG, scored.scale)

    def test_equal(self, scored):
        assert assert_same_kept(self.kept(scored), scored, CONFIG) == (4, 0)

    @pytest.mark.parametrize("share", [0.99, 1.01])
    def test_near_tie(self, scored, monkeypatch, share):
        """The best token that was dropped in place of the worst that was kept."""
        scores = oracle.scores(scored.queries, scored.keys, CONFIG, 1.0)[0, 0]
        kept = self.kept(scored)
        num_candidates = len(kept[0][0]) - CONFIG.window
        worst, best = scores.argsort()[::-1][num_candidates - 1 : num_candidates + 1]
        kept[0][0] = np.sort(np.append(np.setdiff1d(kept[0][0], worst), best))
        gap = scores[worst] / scores[best] - 1
        monkeypatch.setattr(compare, "SCORE_GAP", share * gap)
        if share > 1:
            assert assert_same_kept(kept, scored, CONFIG) == (4, 1)
        else:
            with pytest.raises(AssertionError, match="gap"):
                assert_same_kept(kept, scored, CONFIG)

    @pytest.mark.parametrize("change", ["other token", "one less", "order"])
    def test_different(self, scored, change):
        kept = self.kept(scored)
        head = kept[1][0]
        if change == "other token":
            dropped = np.setdiff1d(np.arange(160), head)
            scores = oracle.scores(scored.queries, scored.keys, CONFIG, 1.0)[1, 0]
            worst = dropped[scores[dropped].argmin()]
            kept[1][0] = np.sort(np.append(head[1:], worst))
        elif change == "one less":
            kept[1][0] = head[1:]
        else:
            kept[1][0] = head[::-1]
        with pytest.raises(AssertionError, match="layer 1 head 0"):
            assert_same_kept(kept, scored, CONFIG)


def test_forced_model(checkpoint):
    """One forced pass says what the step-by-step reference decoder says."""
    model = checkpoint("llama", layers=2)
    prompt = list(range(90)) * 2
    expected = oracle.Oracle(model).generate(prompt, 6, CONFIG)
    forced = ForcedModel(model)
    got = forced.logprobs(prompt, expected.token_ids, expected.kept)
    assert got.tolist() == pytest.approx(expected.logprobs, abs=1e-5)
    everything = forced.logprobs(prompt, expected.token_ids, None)
    assert everything[0] == pytest.approx(expected.logprobs[0], abs=1e-5)
    assert (everything[1:] - got[1:]).abs().max() > 0.01


class TestStress:
    def compact(self, monkeypatch, function):
        def ours(prompts, tables, interpret):
            function(prompts, tables)

        monkeypatch.setattr(stress, "compact", ours)
        return stress.run(rounds=8, seed=1, small=True, interpret=True)

    def test_right(self, monkeypatch):
        def right(prompts, tables):
            stress.in_place(reference, prompts, tables)

        assert self.compact(monkeypatch, right) == 0

    def test_no_order_between_reading_and_writing(self, monkeypatch):
        """One head after the other: what a later head reads may be written already."""

        def one_by_one(prompts, tables):
            for head in range(tables.kept.shape[1]):
                only = torch.zeros_like(tables.count)
                only[:, head] = tables.count[:, head]
                last = (tables.start + tables.count)[:, head]
                stress.in_place(reference, prompts, tables._replace(count=only, num_pages=last))

        assert self.compact(monkeypatch, one_by_one) > 2  # of 8

    def test_cases_are_legal(self):
        """Heads own pages of their own, inside the kept blocks, and no more than they have."""
        generator = torch.Generator().manual_seed(3)
        rng = stress.random.Random(3)
        for _ in range(20):
            prompts, tables = stress.draw_case(rng, generator, small=False)
            _, kept, count, start, _, num_full, num_kept = tables
            size = prompts.layout.block_size
            assert (start[:, 1:] >= (start + count)[:, :-1]).all()
            assert ((start + count)[:, -1] <= num_kept * kept.shape[1]).all()
            assert (count <= num_full[:, None]).all()
            rank = torch.arange(kept.shape[2])
            used = rank < (count * size)[:, :, None]
            assert (kept.lt((num_full * size)[:, None, None]) == used).all()


@pytest.mark.parametrize(
    "operation",
    [*OPERATIONS, *WHOLE_CALLS, *decode_operations(), *ROW_OPERATIONS],
    ids=lambda o: o.name,
)
def test_no_time_for_a_wrong_result(monkeypatch, operation):
    shape = Shape("tiny", 4, 2, 16, 256, 2)
    inputs = make_inputs(shape, torch.device("cpu"))
    operation.check(inputs)
    place = paged_decode if operation.kernel == "paged_decode" else kernels
    original = getattr(place, operation.kernel)

    def wrong(*args, **kwargs):
        if operation.kernel == "write_pages":
            return original(args[0], args[1].roll(1, 1), *args[2:])
        if operation.kernel == "head_page_tables":
            return original(*args[:3], args[3] + 1, *args[4:])
        result = original(*args, **kwargs)
        return tuple(r + 1 for r in result) if isinstance(result, tuple) else result + 1

    monkeypatch.setattr(place, operation.kernel, wrong)
    with pytest.raises(AssertionError, match=operation.name.split()[0]):
        operation.check(inputs)


def test_fastest_selection():
    """Rows of the candidates: a reason where one has no time, and which of the others won."""
    shape, cpu = Shape("tiny", 4, 2, 16, 256, 2), torch.device("cpu")
    (operation,) = (o for o in OPERATIONS if o.name == "select_tokens")
    timer, machine = kernel_bench.Timer(cpu, True), kernel_bench.Machine(1e9, 1e9)
    inputs = make_inputs(shape, cpu)
    (row,) = (
        row
        for row in kernel_bench.measure(operation, shape, inputs, timer, machine, cpu, False)
        if row["implementation"] == "cuda"
    )
    assert (row["samples"], row["note"]) == (0, "runs on a GPU only")
    some = dataclasses.replace(operation, candidates=("torch", "topk"))
    *_, row = kernel_bench.measure(some, shape, inputs, timer, machine, cpu, False)
    assert row["implementation"] == "fastest"
    assert str(row["note"]).startswith(("torch: topk takes ", "topk: torch takes "))
    assert kernel_bench.ranking({"row": 3.0, "cuda": 2.0, "tile": 5.0}) == (
        "cuda: row takes 1.50 times as long, tile takes 2.50 times as long"
    )
    assert kernel_bench.ranking({"row": 3.0}) == "row"
