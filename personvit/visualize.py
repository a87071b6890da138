"""`personvit visualize`: figures of runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from personvit.runtime.entry import run
from personvit.visualization.curves import plot_run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="personvit visualize", description="Figures of runs.", allow_abbrev=False)
    figures = parser.add_subparsers(dest="figure", required=True, metavar="FIGURE")
    curves = figures.add_parser("curves", help="losses, health and retrieval probe over the steps of a run")
    curves.add_argument("run", metavar="RUN", help="run folder, e.g. runs/pretrain-demo")
    curves.add_argument("--out", metavar="FILE.png", help="default RUN/curves.png")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and draw; returns 0.

    Args:
        argv: arguments without the program name; None: those of this process.
    """
    arguments = _parser().parse_args(argv)
    written = plot_run(arguments.run, arguments.out or Path(arguments.run) / "curves.png")
    sys.stdout.write(f"{written}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
