# SPDX-License-Identifier: Apache-2.0
"""Tables and plots from what ``accuracy_sweep.py`` has written.

    python benchmarks/accuracy_report.py     # every bed that was swept

CSV: one row per task, method and budget, with the answers as a string of 0 and 1, by which any two
rows can be compared question by question. Markdown: the same for people, with 95 % intervals
(Wilson) and exact McNemar tests against two methods. PNG, where matplotlib is installed: right
answers over kept tokens.
"""

import csv
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from accuracy.paired import compare, wilson

WHOLE = "uncompressed"
RIVALS = ("bacon", "snapkv")
"""Methods that all others are compared with."""
SAME_KEPT = 2.0
"""Tokens by which cells that are compared may differ; batches of prompts differ a little."""
FEW = 0.05
"""Differences of a smaller p get a star."""


class Key(NamedTuple):
    """What one row of a table is about; budget "" is no compression."""

    task: str
    method: str
    budget: str


class Tally(NamedTuple):
    """All answers of one key, by number of the question.

    Attributes:
        right: whether each is right; without those that were asked nothing.
        kept: prompt tokens that a KV head keeps, mean over the questions.
        logprob, divergence: of the uncompressed model's answers, means; None where not taken.
    """

    right: dict[int, bool]
    kept: float
    logprob: float | None
    divergence: float | None

    @property
    def share(self) -> float:
        return sum(self.right.values()) / len(self.right)


def gather(rows: Iterable[Mapping[str, Any]]) -> dict[Key, Tally]:
    """Batches of questions put together, in the order in which keys appear."""
    parts: dict[Key, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        if "kept" in row:  # where a method cannot keep so little, nothing was asked
            parts[Key(row["task"], row["method"], row["budget"])].append(row)
    return {key: _tally(found) for key, found in parts.items()}


def _tally(rows: Sequence[Mapping[str, Any]]) -> Tally:
    right: dict[int, bool] = {}
    for row in rows:
        first = row["batch"] * len(row["right"])
        right |= {first + n: bool(r) for n, r in enumerate(row["right"]) if r is not None}

    def mean(name: str) -> float | None:
        values = [value for row in rows for value in row.get(name, ())]
        return sum(values) / len(values) if values else None

    kept = sum(row["kept"] for row in rows) / len(rows)
    return Tally(right, kept, mean("logprob"), mean("divergence"))


def paired(ours: Tally, theirs: Tally) -> str:
    """Wins and losses on the questions that both were asked; a star where p is small."""
    common = sorted(ours.right.keys() & theirs.right.keys())
    found = compare([ours.right[n] for n in common], [theirs.right[n] for n in common])
    return f"{found.wins}/{found.losses}" + ("*" if found.p < FEW else "")


def _rival(tallies: Mapping[Key, Tally], key: Key, rival: str) -> Tally | None:
    """What another method answers where it keeps as much; some keep more than their budget says."""
    found = [
        tally
        for other, tally in tallies.items()
        if (other.task, other.method) == (key.task, rival)
        and abs(tally.kept - tallies[key].kept) < SAME_KEPT
    ]
    return found[0] if found else None


def table(tallies: Mapping[Key, Tally], bed: str) -> list[dict[str, Any]]:
    """One row per key."""
    rows = []
    for key, tally in tallies.items():
        low, high = wilson(sum(tally.right.values()), len(tally.right))
        row = {"bed": bed, **key._asdict(), "kept": f"{tally.kept:.1f}", "n": len(tally.right)}
        row |= (
            {"right": f"{tally.share:.3f}", "low": f"{low:.3f}", "high": f"{high:.3f}"}
            if (tally.right)
            else {"right": "", "low": "", "high": ""}
        )
        for rival in RIVALS:
            other = _rival(tallies, key, rival)
            row[f"against {rival}"] = (
                paired(tally, other) if other and tally.right and key.method != rival else ""
            )
        row["logprob"] = "" if tally.logprob is None else f"{tally.logprob:.3f}"
        row["kl"] = "" if tally.divergence is None else f"{tally.divergence:.4f}"
        row["answers"] = "".join(str(int(tally.right[n])) for n in sorted(tally.right))
        rows.append(row)
    return rows


def markdown(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, str]) -> str:
    """Tables of all tasks: methods down, budgets across; no cell is left out."""
    lines = [f"# {facts['bed']}", "", ", ".join(f"{k} {v}" for k, v in facts.items() if v), ""]
    lines += [
        "Right answers in %, 95 % interval, n; in brackets wins/losses against "
        + " and ".join(RIVALS)
        + " where they keep as many tokens, on the same questions, * where McNemar's exact "
        f"p < {FEW}. An empty cell: the method cannot keep so little, or was not asked yet.",
        "",
    ]
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == task]
        budgets = sorted({row["budget"] for row in mine} - {""}, key=lambda b: float(b.rstrip("%")))
        whole = [row for row in mine if row["method"] == WHOLE]
        lines += [f"## {task}", "", *(f"Full cache: {_cell(row)}." for row in whole), ""]
        lines += ["| method | " + " | ".join(f"budget {b}" for b in budgets) + " |"]
        lines += ["|---" * (1 + len(budgets)) + "|"]
        for method in sorted({row["method"] for row in mine} - {WHOLE}):
            cells = {row["budget"]: _cell(row) for row in mine if row["method"] == method}
            lines += [f"| {method} | " + " | ".join(cells.get(b, "") for b in budgets) + " |"]
        lines += [""]
    return "\n".join(lines)


def _cell(row: Mapping[str, Any]) -> str:
    """All that is known of one row, short."""
    parts = []
    if row["right"]:
        share, low, high = (100 * float(row[name]) for name in ("right", "low", "high"))
        parts.append(f"**{share:.1f}** {low:.0f}-{high:.0f}, n {row['n']}")
    against = [row[f"against {rival}"] for rival in RIVALS]
    if any(against):
        parts.append("[" + ", ".join(entry or "-" for entry in against) + "]")
    if row["kl"]:
        parts.append(f"KL {row['kl']}")
    return "; ".join([*parts, f"kept {row['kept']}"])


def plot(rows: Sequence[Mapping[str, Any]], file: Path) -> bool:
    """Right answers over kept tokens, one panel per task; False where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    asked = [row for row in rows if row["right"]]
    tasks = list(dict.fromkeys(row["task"] for row in asked))
    figure, axes = pyplot.subplots(
        1, len(tasks), figsize=(7 * len(tasks), 6), sharey=True, squeeze=False, layout="constrained"
    )
    names = sorted({row["method"] for row in asked} - {WHOLE})
    colours = {name: pyplot.colormaps["tab20"](i % 20) for i, name in enumerate(names)}
    for axis, task in zip(axes[0], tasks, strict=True):
        for number, name in enumerate(names):
            points = sorted(
                (float(r["kept"]), *(100 * float(r[c]) for c in ("right", "low", "high")))
                for r in asked
                if r["task"] == task and r["method"] == name
            )
            if not points:
                continue
            x, y, low, high = zip(*points, strict=True)
            style = ("-", "--", ":", "-.")[number // 20 % 4]
            axis.plot(x, y, style, color=colours[name], marker=".", label=name)
            axis.fill_between(x, low, high, color=colours[name], alpha=0.06)
        for row in asked:
            if row["task"] == task and row["method"] == WHOLE:
                axis.axhline(100 * float(row["right"]), color="black", linewidth=0.8)
        axis.set(title=task, xlabel="prompt tokens kept per KV head", ylim=(-2, 102))
    axes[0][0].set_ylabel("right answers, % (line: full cache; bands: 95 %)")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right", fontsize="small")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
    return True


def report(source: Path, out: Path) -> list[Path]:
    """Write CSV, Markdown and plot of one bed; returns the files."""
    rows = table(gather(json.loads(line) for line in source.read_text().splitlines()), source.stem)
    facts = json.loads(source.with_suffix(".facts.json").read_text())
    files = [out / f"accuracy_{source.stem}{suffix}" for suffix in (".csv", ".md", ".png")]
    with files[0].open("w", newline="") as sink:
        writer = csv.DictWriter(sink, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    files[1].write_text(markdown(rows, facts))
    return files if plot(rows, files[2]) else files[:2]
