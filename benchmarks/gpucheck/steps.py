# SPDX-License-Identifier: Apache-2.0
"""Steps with a limit each under one deadline, and an archive of all that they have written so far.

Knows nothing of what the steps do, and needs nothing but Python. A step is a process: it can fail
or hang without any harm to the others. Whenever this process is stopped, the archive on disk has
everything but the last seconds.
"""

import csv
import io
import os
import re
import signal
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

NOT_RUN = 77
"""Exit status of a step that cannot run here; the last line of its output says why."""

HEADLINE = "== "
"""Begins the lines of a step's output that belong into the summary."""

SUMMARY_LINES, LINE_LENGTH = 40, 150
SHORTEST = 5.0
"""Seconds: with less left until the deadline no step begins."""


class Step(NamedTuple):
    """One process.

    Attributes:
        name: of its log.
        seconds: its limit.
        needs: name of an earlier step; unless it passes, this one does not run.
    """

    name: str
    command: list[str]
    seconds: float
    env: Mapping[str, str] = MappingProxyType({})
    needs: str = ""


class Outcome(NamedTuple):
    """How a step went: "passed", "failed", "out of time", "not run" or "left out", and why."""

    step: str
    outcome: str
    began: float
    seconds: float
    note: str = ""

    def __str__(self) -> str:
        why = f": {self.note}" if self.note else ""
        return f"{self.seconds:4.0f} s  {self.outcome:11}  {self.step}{why}"[:LINE_LENGTH]


@dataclass
class Run:
    """The steps of one run.

    Attributes:
        folder: receives ``steps.csv``, ``summary.txt`` and ``logs/``, and what the steps write.
        start, end: on the monotonic clock; no step goes on after the end.
        outcomes: of the steps that are over.
        stopped: somebody has asked for it.
    """

    folder: Path
    env: Mapping[str, str]
    start: float
    end: float
    outcomes: list[Outcome] = field(default_factory=list)
    stopped: bool = False
    _started: dict[str, Future[Outcome]] = field(default_factory=dict)
    _processes: set[subprocess.Popen] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def together(self, steps: Sequence[Step], jobs: int = 1) -> None:
        """Run steps, ``jobs`` at a time; whatever becomes of one, the next begins."""
        with ThreadPoolExecutor(jobs) as pool:
            for step in steps:
                self._started[step.name] = pool.submit(self._run, step)
        for step in steps:
            self._started[step.name].result()  # raises what is wrong with the runner itself

    def _run(self, step: Step) -> Outcome:
        # steps begin in order: what is waited for has a worker of its own, or is over
        needed = self._started[step.needs].result() if step.needs else None
        began = time.monotonic()
        limit = min(step.seconds, self.end - began)
        if needed is not None and needed.outcome != "passed":
            note = f"{needed.step} {needed.outcome}: {needed.note}".removesuffix(": ")
            result = ("not run", note)
        elif limit < min(SHORTEST, step.seconds):
            result = ("left out", "no time was left")
        else:
            self._say(f"{step.name} begins, {limit:.0f} s at most")
            result = self._execute(step, limit)
        seconds = time.monotonic() - began
        outcome = Outcome(step.name, result[0], began - self.start, seconds, result[1])
        with self._lock:
            self.outcomes.append(outcome)
            self._write()
        self._say(str(outcome))
        return outcome

    def _execute(self, step: Step, limit: float) -> tuple[str, str]:
        log = self.log(step.name)
        log.parent.mkdir(parents=True, exist_ok=True)
        try:
            result = self._run_logged(step, limit, log)
        except OSError as error:  # there is no such program
            return "failed", str(error)
        note = why(log) if result != "passed" else ""
        return result, note

    def _run_logged(self, step: Step, seconds: float, log: Path) -> str:
        """Run the process with its children as a group; nothing of it outlives the limit.

        Raises:
            OSError: the program cannot be started.
        """
        with log.open("w") as sink:
            print("$", *step.command, file=sink, flush=True)
            process = subprocess.Popen(
                step.command,
                env={**self.env, **step.env},
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._processes.add(process)
            if self.stopped:  # while it began
                end_group(process)
            try:
                return {0: "passed", NOT_RUN: "not run"}.get(process.wait(seconds), "failed")
            except subprocess.TimeoutExpired:
                return "out of time"
            finally:
                self._processes.discard(process)
                end_group(process)

    def stop(self) -> None:
        """End what runs; no further step begins. ``together`` then returns soon."""
        self.stopped, self.end = True, 0.0
        for process in list(self._processes):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def log(self, step: str) -> Path:
        return self.folder / "logs" / f"{step}.txt"

    def _say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.start:4.0f} s] {text}", flush=True)

    def _write(self) -> None:
        with (self.folder / "steps.csv").open("w", newline="") as sink:
            writer = csv.writer(sink, lineterminator="\n")
            writer.writerow(Outcome._fields)
            for o in self.outcomes:
                writer.writerow(o._replace(began=round(o.began, 1), seconds=round(o.seconds, 1)))
        (self.folder / "summary.txt").write_text("\n".join(self.summary()) + "\n")

    def summary(self) -> Iterator[str]:
        """At most ``SUMMARY_LINES`` lines: every step, and as many of its headlines as there is
        room for, the first ones of all steps before the second ones.
        """
        headlines = {o.step: self._headlines(o.step) for o in self.outcomes}
        shown = dict.fromkeys(headlines, 0)
        room = SUMMARY_LINES - len(self.outcomes) - 1
        for rank in range(max(map(len, headlines.values()), default=0)):
            for step, lines in headlines.items():
                if rank < len(lines) and room > 0:
                    shown[step] += 1
                    room -= 1
        words = [o.outcome for o in self.outcomes]
        counts = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
        yield f"{len(words)} steps in {time.monotonic() - self.start:.0f} s: {counts}"
        for outcome in self.outcomes:
            yield str(outcome)
            for line in headlines[outcome.step][: shown[outcome.step]]:
                yield f"            {line}"[:LINE_LENGTH]

    def _headlines(self, step: str) -> list[str]:
        log = self.log(step)
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        return [line.removeprefix(HEADLINE) for line in lines if line.startswith(HEADLINE)]


class Archive:
    """Packs a folder again and again while the block runs, and once more at its end.

    A reader never sees half an archive. Where everything would be too large, the smallest files go
    in first and ``left_out.txt`` names the rest.

    Args:
        folder: what is packed, under its own name.
        file: the archive, ``.tar.gz``.
        most_bytes: of the archive.
        every: seconds.
    """

    def __init__(self, folder: Path, file: Path, most_bytes: int, every: float = 15.0) -> None:
        self.folder, self.file = folder, file
        self.most_bytes, self.every = most_bytes, every
        self._over = threading.Event()
        self._saver = threading.Thread(target=self._save_regularly, daemon=True)

    def __enter__(self) -> "Archive":
        self.save()
        self._saver.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._saver.join()
        self.save()

    def _save_regularly(self) -> None:
        while not self._over.wait(self.every):
            self.save()

    def save(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_name(f".{self.file.name}.part")
        files = sorted(
            (path for path in self.folder.rglob("*") if path.is_file()),
            key=lambda path: path.stat().st_size,
        )
        left_out: list[str] = []

        def add(name: str, content: bytes) -> None:
            entry = tarfile.TarInfo(f"{self.folder.name}/{name}")
            entry.size, entry.mtime = len(content), int(time.time())
            archive.addfile(entry, io.BytesIO(content))

        with part.open("wb") as sink, tarfile.open(fileobj=sink, mode="w:gz") as archive:
            for path in files:
                name = str(path.relative_to(self.folder))
                content = path.read_bytes()  # at once: steps go on writing
                if sink.tell() + len(content) > self.most_bytes:
                    left_out.append(name)
                else:
                    add(name, content)
            if left_out:
                add("left_out.txt", "\n".join(left_out).encode())
        os.replace(part, self.file)


def end_group(process: subprocess.Popen) -> None:
    """Kill what is left of a process and its children."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def why(log: Path) -> str:
    """The line of a log that most likely says what was wrong: a compiler's error, else the last."""
    _, *lines = log.read_text(errors="replace").splitlines()  # the command
    lines = [line.strip() for line in lines if line.strip()]
    errors = [line for line in lines if re.search(r"\berror:", line)]
    return (errors or lines[-1:] or [""])[0]
