# SPDX-License-Identifier: Apache-2.0
"""Processes with a time limit and a log each, and a table of how they went."""

import csv
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple


class Step(NamedTuple):
    """One process.

    Attributes:
        name: of its log.
        seconds: its time limit.
        fatal: outcomes that end the run.
    """

    name: str
    command: list[str]
    seconds: float
    env: Mapping[str, str] = MappingProxyType({})
    fatal: tuple[str, ...] = ("failed", "out of time")


class Outcome(NamedTuple):
    """How a step went: "passed", "failed", "out of time" or "left out"."""

    stage: str
    step: str
    outcome: str
    seconds: float
    is_fatal: bool


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

    def stage(self, name: str, steps: Sequence[Step], jobs: int = 1) -> bool:
        """Run steps, ``jobs`` at a time; after a fatal one no further step starts.

        Returns:
            Whether no step was fatal so far.
        """
        with ThreadPoolExecutor(jobs) as pool:
            for outcome in pool.map(lambda step: self._run(name, step), steps):
                self.outcomes.append(outcome)
        self._write()
        return not any(outcome.is_fatal for outcome in self.outcomes)

    def _run(self, stage: str, step: Step) -> Outcome:
        if self.stopped:
            return Outcome(stage, step.name, "left out", 0.0, False)
        limit = min(step.seconds, self.end - time.monotonic())
        log = self.folder / "logs" / f"{step.name}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        result = "out of time"
        if limit > 0:
            result = run_logged(step.command, self.env | dict(step.env), limit, log)
        seconds = time.monotonic() - start
        outcome = Outcome(stage, step.name, result, seconds, result in step.fatal)
        print(f"{outcome.seconds:6.1f} s  {outcome.outcome:11}  {stage}: {step.name}", flush=True)
        if outcome.is_fatal:
            self.stopped = True
            if log.exists():
                print(f"the end of {log}:\n{tail(log)}", flush=True)
        return outcome

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
            return "failed" if process.wait(seconds) else "passed"
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
