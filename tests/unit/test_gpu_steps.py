# SPDX-License-Identifier: Apache-2.0
"""The runner of the GPU check: whatever becomes of a step, the rest goes on and nothing is lost."""

import csv
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import gpu_check
import pytest
from conftest import ROOT
from gpucheck import steps as runner
from gpucheck.lists import EXPECTED, LISTS, Machine
from gpucheck.steps import NOT_RUN, SUMMARY_LINES, Archive, Run, Step


def python(*code: str) -> list[str]:
    return [sys.executable, "-P", "-c", "; ".join(code)]


FINE = python("print('== fine')")


@pytest.fixture
def run(tmp_path):
    now = time.monotonic()
    return Run(tmp_path / "results", dict(os.environ), now, now + 60)


@pytest.fixture(autouse=True)
def folder(run):
    run.folder.mkdir()


def outcomes(run) -> dict[str, tuple[str, str]]:
    """As a reader of the results finds them."""
    with (run.folder / "steps.csv").open() as source:
        return {row["step"]: (row["outcome"], row["note"]) for row in csv.DictReader(source)}


class TestSteps:
    def test_a_failure_stops_nothing(self, run):
        bad = python("print('== half')", "print('why')", "raise SystemExit(3)")
        run.together([Step("good", FINE, 30), Step("bad", bad, 30), Step("next", FINE, 30)])
        run.together([Step("missing", ["/no/such/program"], 30), Step("last", FINE, 30)])
        found = outcomes(run)
        assert {name: outcome for name, (outcome, _) in found.items()} == {
            "good": "passed", "bad": "failed", "next": "passed", "missing": "failed",
            "last": "passed",
        }  # fmt: skip
        assert found["bad"][1] == "why"
        assert "/no/such/program" in found["missing"][1]
        assert "half" in run.log("bad").read_text()

    def test_a_hang_ends_at_its_limit_with_its_children(self, run, tmp_path):
        mark = tmp_path / "mark"
        child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(mark)!r}).touch()"
        code = python(
            "import subprocess, sys, time",
            f"subprocess.Popen([sys.executable, '-c', {child!r}])",
            "print('== so far', flush=True)",
            "time.sleep(60)",
        )
        run.together([Step("slow", code, 1), Step("next", FINE, 30)])
        assert outcomes(run) == {"slow": ("out of time", "== so far"), "next": ("passed", "")}
        time.sleep(3)
        assert not mark.exists()

    def test_nothing_goes_on_after_the_end(self, run):
        run.end = time.monotonic() + runner.SHORTEST + 1
        hang = python("import time", "time.sleep(60)")
        run.together([Step("slow", hang, 30), Step("late", FINE, 30)])
        assert {name: outcome for name, (outcome, _) in outcomes(run).items()} == {
            "slow": "out of time", "late": "left out",
        }  # fmt: skip
        assert time.monotonic() < run.end + 5

    def test_side_by_side(self, run, tmp_path):
        """Four steps that wait for each other."""
        meet = "import pathlib, sys, time; d = pathlib.Path(sys.argv[1]); (d / sys.argv[2]).touch()"
        wait = "[time.sleep(0.05) for _ in iter(lambda: len([*d.glob('here*')]) < 4, False)]"
        command = [*python(meet, wait), str(tmp_path)]
        run.together([Step(f"step {n}", [*command, f"here{n}"], 60) for n in range(4)], jobs=4)
        assert [outcome.outcome for outcome in run.outcomes] == ["passed"] * 4

    def test_cannot_run_here(self, run):
        """A step that says so, and what needs it, are told apart from what passed and failed."""
        steps = [
            Step("build", python("print('no tools')", f"raise SystemExit({NOT_RUN})"), 30),
            Step("uses it", FINE, 30, needs="build"),
            Step("broken", python("print('x.cu(1): error: bad', 'x')", "1 / 0"), 30),
            Step("uses that", FINE, 30, needs="broken"),
            Step("good", FINE, 30),
            Step("uses good", FINE, 30, needs="good"),
        ]
        run.together(steps[:3], jobs=3)
        run.together(steps[3:])
        assert outcomes(run) == {
            "build": ("not run", "no tools"),
            "uses it": ("not run", "build not run: no tools"),
            "broken": ("failed", "x.cu(1): error: bad x"),
            "uses that": ("not run", "broken failed: x.cu(1): error: bad x"),
            "good": ("passed", ""),
            "uses good": ("passed", ""),
        }

    def test_environment(self, run):
        code = python("import os", "raise SystemExit(os.environ['ANSWER'] != '42')")
        run.together([Step("env", code, 30, {"ANSWER": "42"})])
        assert outcomes(run) == {"env": ("passed", "")}

    def test_summary(self, run):
        """Every step has a line; headlines share the rest, the first ones of all steps first."""
        many = python("[print('==', n) for n in range(100)]", "print('not this')")
        run.together([Step("a", many, 30), Step("b", many, 30), Step("c", FINE, 30)])
        lines = list(run.summary())
        assert len(lines) == SUMMARY_LINES
        assert "3 steps" in lines[0]
        assert "3 passed" in lines[0]
        texts = [line.strip() for line in lines]
        assert texts.count("0") == texts.count("5") == 2  # of a and of b
        assert "fine" in texts
        assert not any("not this" in line for line in lines)
        assert (run.folder / "summary.txt").read_text().splitlines()[1:] == lines[1:]


class TestArchive:
    def members(self, file: Path) -> dict[str, bytes]:
        with tarfile.open(file) as archive:
            return {m.name: archive.extractfile(m).read() for m in archive.getmembers()}

    def test_is_there_while_steps_run(self, run, tmp_path):
        file = tmp_path / "out" / "all.tar.gz"
        hang = python("print('half', flush=True)", "import time", "time.sleep(60)")
        with Archive(run.folder, file, 1 << 20, every=0.2):
            run.together([Step("slow", hang, 2)])
            log = self.members(file)["results/logs/slow.txt"]
            assert log.endswith(b"half\n")
        assert b"out of time" in self.members(file)["results/steps.csv"]
        assert [path.name for path in file.parent.iterdir()] == ["all.tar.gz"]

    def test_leaves_out_the_largest(self, run, tmp_path):
        (run.folder / "small").write_bytes(os.urandom(1000))
        (run.folder / "large").write_bytes(os.urandom(100_000))
        file = tmp_path / "all.tar.gz"
        Archive(run.folder, file, 50_000).save()
        found = self.members(file)
        assert found.keys() == {"results/small", "results/left_out.txt"}
        assert found["results/left_out.txt"] == b"large"
        assert file.stat().st_size < 50_000


def machine(tmp_path, rehearse=False, device="cuda", packages=None) -> Machine:
    return Machine(ROOT, tmp_path / "cache", tmp_path, device, rehearse, packages, tmp_path)


class TestLists:
    @pytest.mark.parametrize("name", LISTS)
    @pytest.mark.parametrize(("rehearse", "device"), [(0, "cuda"), (1, "cuda"), (1, "cpu")])
    def test_steps(self, tmp_path, name, rehearse, device):
        """Names and needs fit, scripts and tests exist, arguments are known."""
        stages = LISTS[name](machine(tmp_path, bool(rehearse), device, tmp_path))
        steps = [step for stage in stages for step in stage]
        names = [step.name for step in steps]
        assert len(set(names)) == len(names)
        assert names[:2] == ["unpack", "machine"]
        for number, step in enumerate(steps):
            assert not step.needs or step.needs in names[:number]
            for word in step.command:
                if word.endswith(".py"):
                    assert Path(word).exists(), word
                if word.startswith("gpucheck."):
                    assert (ROOT / "benchmarks" / f"{word.replace('.', '/')}.py").exists(), word
        assert EXPECTED.keys() <= set(names) if rehearse else not EXPECTED.keys() & set(names)

    def test_what_is_timed_has_the_machine_to_itself(self, tmp_path):
        for make in LISTS.values():
            for stage in make(machine(tmp_path)):
                if len(stage) > 1:
                    words = [word for step in stage for word in step.command]
                    timed = ("serving.py", "sweep.py", "profile_step", "per_head_decode")
                    assert not any(word.endswith(timed) for word in words)
                    bench = [s.name for s in stage if any("kernel_bench" in w for w in s.command)]
                    assert all(name.startswith(("memcheck", "racecheck")) for name in bench)


def test_a_stopped_check_leaves_an_archive_and_a_summary(tmp_path, monkeypatch):
    """SIGTERM in the middle of a step that hangs."""
    monkeypatch.setattr(gpu_check, "CACHE", tmp_path)
    script = (
        "import pathlib, sys, gpu_check; gpu_check.CACHE = pathlib.Path(sys.argv.pop(1)); "
        "gpu_check.main()"
    )
    command = [*python(script), str(tmp_path), "first", "--rehearse", "--out", str(tmp_path)]
    command += ["--only", "fails-on-purpose", "hangs-on-purpose", "--jobs", "1"]
    env = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "hangs-on-purpose begins" in line:
            process.send_signal(signal.SIGTERM)
            break
    rest = process.communicate(timeout=30)[0]
    assert process.returncode == 143
    assert "fails-on-purpose: on purpose" in rest
    assert "2 failed" in rest  # the other one was ended
    with tarfile.open(tmp_path / "gpu-first.tar.gz") as archive:
        assert any(name.endswith("logs/fails-on-purpose.txt") for name in archive.getnames())


def test_a_rehearsal_expects_what_happens_on_purpose(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "CACHE", tmp_path)
    monkeypatch.setattr(gpu_check, "PATIENCE", 1)
    arguments = ["gpu_check", "first", "--rehearse", "--only", *EXPECTED]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as left:
        gpu_check.main()
    assert not left.value.code
    printed = capsys.readouterr().out.splitlines()
    assert any("out of time  hangs-on-purpose" in line for line in printed)
    monkeypatch.setitem(EXPECTED, "fails-on-purpose", "passed")
    with pytest.raises(SystemExit) as left:
        gpu_check.main()
    assert left.value.code
