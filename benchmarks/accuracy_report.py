# SPDX-License-Identifier: Apache-2.0
"""Tables and plots of the beds that ``accuracy_sweep.py`` has swept so far.

python benchmarks/accuracy_report.py            # writes benchmarks/results/accuracy_*
"""

import argparse
from pathlib import Path

from accuracy.report import report
from serving import ROOT


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--results", type=Path, default=ROOT / ".cache" / "accuracy")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    for source in sorted(args.results.glob("*.jsonl")):
        print(*report(source, args.out), sep="\n")


if __name__ == "__main__":
    main()
