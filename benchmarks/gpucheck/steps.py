# SPDX-License-Identifier: Apache-2.0
"""Processes with a time limit and a log each, and a table of how they went."""

import csv
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

NOT_RUN = 77
"""Exit status of a step that cannot run here; the last line of its output says why."""


class Step(NamedTuple):
    """One process.

    Attributes:
        name: of its log.
        seconds: its time limit.
        fatal: outcomes that end the run.
        needs: name of a step that comes before; unless it passes, this one does not run.
    """

    name: str
    command: list[str]
    seconds: float
    env: Mapping[str, str] = MappingProxyType({})
    fatal: tuple[str, ...] = ("failed", "out of time")
    needs: str = ""


class Outcome(NamedTuple):
    """How a step went: "passed", "failed", "out of time", "left out" or "not run", and why."""

    stage: str
    step: str
    outcome: str
    seconds: float
    is_fatal: bool
    note: str = ""

    def __str__(self) -> str:
        why = f": {self.note}" if self.note else ""
        return f"{self.seconds:6.1f} s  {self.outcome:11}  {self.stage}: {self.step}{why}"


@dataclass
class Run:
    """All steps of one run.

    Attributes:
        folder: receives ``steps.csv`` and ``logs/``.
        end: on the monotonic clock; no step lasts longer.
        stopped: since a fatal step.
    """

    folder: Path
    env: dict[str, str]
    end: float
    outcomes: list[Outcome] = field(default_factory=list)
    stopped: bool = False
    _started: dict[str, Future[Outcome]] = field(default_factory=dict)

    def stage(self, name: str, steps: Sequence[Step], jobs: int = 1) -> bool:
        """Run steps, ``jobs`` at a time; after a fatal one no further step starts.

        Returns:
            Whether no step was fatal so far.
        """
        with ThreadPoolExecutor(jobs) as pool:
            for step in steps:
                self._started[step.name] = pool.submit(self._run, name, step)
            self.outcomes += [self._started[step.name].result() for step in steps]
        self._write()
        return not any(outcome.is_fatal for outcome in self.outcomes)

    def result(self, step: str) -> str:
        """Outcome of a step of a finished stage; empty if there was none of that name."""
        return self._started[step].result().outcome if step in self._started else ""

    def _run(self, stage: str, step: Step) -> Outcome:
        if self.stopped:
            return Outcome(stage, step.name, "left out", 0.0, False)
        # steps start in order: what is waited for has a worker of its own, or is done
        needed = self._started[step.needs].result() if step.needs else None
        if needed is not None and needed.outcome != "passed":
            note = f"{needed.step} {needed.outcome}: {needed.note}".removesuffix(": ")
            outcome = Outcome(stage, step.name, "not run", 0.0, False, note)
        else:
            outcome = self._execute(stage, step)
        print(outcome, flush=True)
        if outcome.is_fatal:
            self.stopped = True
            log = self._log(step)
            if log.exists():
                print(f"the end of {log}:\n{tail(log)}", flush=True)
        return outcome

    def _execute(self, stage: str, step: Step) -> Outcome:
        limit = min(step.seconds, self.end - time.monotonic())
        log = self._log(step)
        log.parent.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        result = "out of time"
        if limit > 0:
            result = run_logged(step.command, self.env | dict(step.env), limit, log)
        seconds = time.monotonic() - start
        note = why(log) if result in ("failed", "not run") else ""
        return Outcome(stage, step.name, result, seconds, result in step.fatal, note)

    def _log(self, step: Step) -> Path:
        return self.folder / "logs" / f"{step.name}.txt"

    def _write(self) -> None:
        with (self.folder / "steps.csv").open("w", newline="") as sink:
            writer = csv.writer(sink, lineterminator="\n")
            writer.writerow(Outcome._fields)
            writer.writerows(o._replace(seconds=round(o.seconds, 1)) for o in self.outcomes)


def run_logged(command: list[str], env: dict[str, str], seconds: float, log: Path) -> str:
    """Run a process with its children as a group of their own; nothing of it outlives the limit."""
    with log.open("w") as sink:
        print("$", *command, file=sink, flush=True)
        process = subprocess.Popen(
            command, env=env, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return {0: "passed", NOT_RUN: "not run"}.get(process.wait(seconds), "failed")
        except subprocess.TimeoutExpired:
            return "out of time"
        finally:
            end_group(process)


def end_group(process: subprocess.Popen) -> None:
    """Kill what is left of a process and its children."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tail(log: Path, num_lines: int = 30) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-num_lines:])


def why(log: Path) -> str:
    """The line of a log that most likely says what was wrong: a compiler's error, else the last."""
    _, *lines = log.read_text(errors="replace").splitlines()  # the command
    lines = [line.strip() for line in lines if line.strip()]
    errors = [line for line in lines if re.search(r"\berror:", line)]
    return (errors or lines[-1:] or [""])[0]
