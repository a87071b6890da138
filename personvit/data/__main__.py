"""`personvit data generate` writes generated persons; `personvit data check` looks at a set of images."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from personvit.config import EvaluateConfig, load_config
from personvit.data.check import scan
from personvit.data.loaders import reader_count
from personvit.data.reid_sets import open_reid_set
from personvit.data.sources import LAYOUT_FOLDERS, layout_root, open_source
from personvit.errors import ConfigError, DataError
from personvit.runtime.entry import run

_USAGE = """usage: personvit data generate ...   write generated persons (personvit data generate --help)
       personvit data check [--bad FILE] [data.root=... data.name=... data.num_workers=...]
"""
_SHOWN = 20


def main(argv: list[str] | None = None) -> int:
    """Dispatch to `generate` or `check`.

    Raises:
        ConfigError: unknown verb.
        DataError: the source cannot be opened, or none of its images can be read.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_USAGE)
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb == "generate":
        from personvit.data.generated.cli import main as generate  # the renderer is of no use to `check`

        return generate(rest)
    if verb == "check":
        return _check(rest)
    raise ConfigError(f"personvit data {verb}: no such verb. Known: generate, check.")


def _check(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="personvit data check", description="Decode every image of a source.")
    parser.add_argument("--bad", type=Path, metavar="FILE", help="write the paths of unreadable files into FILE")
    parser.add_argument("overrides", nargs="*", metavar="data.key=value")
    arguments = parser.parse_args(argv)
    cfg = load_config(EvaluateConfig, overrides=arguments.overrides).data
    source = open_source(cfg)
    report = scan(source, reader_count(cfg.num_workers))
    sys.stdout.write(report.text() + "\n")
    if report.bad:
        more = f"\n... and {len(report.bad) - _SHOWN} more (--bad FILE writes all)" if len(report.bad) > _SHOWN else ""
        sys.stdout.write("\nunreadable:\n" + "\n".join([*report.bad.values()][:_SHOWN]) + more + "\n")
    if arguments.bad is not None:
        arguments.bad.write_text("".join(f"{line}\n" for line in report.bad), encoding="utf-8")
    if len(report.bad) == report.total:
        raise DataError(f"none of the {report.total} files can be read. Are these images, and wholly copied?")
    if cfg.root is not None and _is_labelled(cfg.name, Path(cfg.root)):
        sys.stdout.write("\n" + open_reid_set(cfg.name, cfg.root).table() + "\n")
    return 0


def _is_labelled(name: str, root: Path) -> bool:
    folder = layout_root(name, root)
    return name in LAYOUT_FOLDERS or (
        name == "auto" and any((folder / part).exists() for part in ("query", "list_query.txt"))
    )


if __name__ == "__main__":
    raise SystemExit(run(main))
