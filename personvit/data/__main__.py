"""`personvit data`: generate persons, check a set of images, split a labelled one, pack one into shards."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from pathlib import Path

from personvit.config import DataConfig, EvaluateConfig, load_config
from personvit.data.check import SourceReport, scan
from personvit.data.parallel import worker_count
from personvit.data.path_sources import FileSource
from personvit.data.reid.csv_table import read_csv
from personvit.data.reid.own import own_set
from personvit.data.reid_sets import ReIDSet, is_labelled, read_reid_set
from personvit.data.sources import ImageSource, open_source
from personvit.data.split_report import identified, split_problems
from personvit.errors import ConfigError, DataError
from personvit.runtime.entry import run

_USAGE = """usage: personvit data generate ...   write generated persons (personvit data generate --help)
       personvit data check [PATH] [--bad FILE] [data.root=... data.name=... data.num_workers=...]
       personvit data split SOURCE --out FILE.csv [--train-share 0.5] [--seed 0]
       personvit data pack OUT [PATH] [--shard-mib 256] [--no-verify] [--workers N] [data.root=... data.name=...]
       personvit data pack --check OUT
"""
_SHOWN = 20
_OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_0-9]+)*=")


def main(argv: list[str] | None = None) -> int:
    """Dispatch to `generate`, `check`, `split` or `pack`.

    Raises:
        ConfigError: unknown verb.
        DataError: the source cannot be opened, none of its images can be read, or packed shards are damaged.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_USAGE)
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb == "generate":
        from personvit.data.generated.cli import main as generate  # the renderer is of no use to the other verbs

        return generate(rest)
    if verb == "check":
        return _check(rest)
    if verb == "split":
        from personvit.data.split import main as split

        return split(rest)
    if verb == "pack":
        return _pack(rest)
    raise ConfigError(f"personvit data {verb}: no such verb. Known: generate, check, split, pack.")


def _check(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="personvit data check", description="Decode every image of a source.")
    parser.add_argument("--bad", type=Path, metavar="FILE", help="write the paths of unreadable files into a new FILE")
    parser.add_argument("overrides", nargs="*", metavar="PATH|data.key=value")
    arguments = parser.parse_args(argv)
    cfg = _data_config(arguments.overrides)
    if arguments.bad is not None and arguments.bad.exists():
        raise DataError(f"--bad {arguments.bad}: exists already and is not overwritten. Name another file.")
    source, labelled = _opened(cfg)
    report = scan(source, worker_count(cfg.num_workers))
    sys.stdout.write(report.text() + "\n")
    _write_bad(report, arguments.bad)
    if len(report.bad) == report.total:
        raise DataError(f"none of the {report.total} files can be read. Are these images, and wholly copied?")
    if labelled is not None:
        sys.stdout.write(f"\n{labelled.table()}\n")
        if labelled.name not in ("csv", "folder"):
            sys.stdout.write(f"{identified(labelled)[1]}\n")
        sys.stdout.writelines(f"problem: {problem}\n" for problem in split_problems(labelled))
    return 0


def _opened(cfg: DataConfig) -> tuple[ImageSource, ReIDSet | None]:
    """The images to look at, and the labelled set that they are of, with its labels read before the long scan."""
    root = Path(cfg.root).expanduser() if cfg.root is not None else None
    if root is None or not is_labelled(cfg.name, root):
        return open_source(cfg), None
    if cfg.name == "csv" or root.suffix.lower() == ".csv":
        table = read_csv(root)
        labelled = own_set("csv", table) if table.splits is not None else None
        return FileSource(table.paths), labelled
    labelled = read_reid_set(cfg.name, root)
    return FileSource(path for split in labelled.splits for path in split.paths), labelled


def _write_bad(report: SourceReport, file: Path | None) -> None:
    if report.bad:
        more = f"\n... and {len(report.bad) - _SHOWN} more (--bad FILE writes all)" if len(report.bad) > _SHOWN else ""
        sys.stdout.write("\nunreadable:\n" + "\n".join([*report.bad.values()][:_SHOWN]) + more + "\n")
    if file is not None:
        with file.open("x", encoding="utf-8", errors="surrogateescape") as stream:
            stream.writelines(f"{line}\n" for line in report.bad)


def _pack(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="personvit data pack", description="Write any source as tar shards.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder: new, empty, or of an interrupted pack")
    parser.add_argument("overrides", nargs="*", metavar="PATH|data.key=value")
    parser.add_argument("--shard-mib", type=int, default=256, metavar="N", help="MiB of a shard (default: 256)")
    parser.add_argument("--workers", type=int, default=-1, metavar="N", help="processes (default: one for each core)")
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="decode every image, leave out the unreadable ones",
    )
    parser.add_argument("--check", action="store_true", help="compare OUT with its checksums, write nothing")
    arguments = parser.parse_args(argv)
    if arguments.shard_mib < 1 or arguments.workers < -1:
        raise ConfigError("--shard-mib must be 1 or more, --workers -1 (choose), 0 or more.")
    workers = worker_count(arguments.workers)
    from personvit.data.manifest import check_shards
    from personvit.data.pack import pack  # needs file locks of POSIX: not for those who only check

    if arguments.check:
        manifest, problems = check_shards(arguments.out, workers)
        if problems:
            sys.stdout.write("".join(f"{problem}\n" for problem in problems))
            raise DataError(
                f"{arguments.out}: {len(problems)} problems in {len(manifest.shards)} shards. Write the damaged ones "
                f"again with the command that packed them: personvit data pack {arguments.out} data.root=..."
            )
    else:
        source = open_source(_data_config(arguments.overrides))
        manifest = pack(source, arguments.out, arguments.shard_mib, workers, arguments.verify)
    records = sum(shard.records for shard in manifest.shards)
    size = sum(shard.bytes for shard in manifest.shards)
    left_out = sum(len(shard.bad) for shard in manifest.shards)
    sys.stdout.write(
        f"{arguments.out}: {records:,} images in {len(manifest.shards):,} shards, {size / 2**20:,.1f} MiB, checksums "
        f"{'fit' if arguments.check else 'in manifest.json'}; {left_out:,} images left out"
        f"{' (bad_images.txt)' if left_out else ''}\n"
    )
    return 0


def _data_config(words: list[str]) -> DataConfig:
    """Overrides, with a bare path standing for data.root."""
    paths = [word for word in words if _OVERRIDE.match(word) is None]
    if len(paths) > 1:
        raise ConfigError(f"{' '.join(paths)}: one PATH at most (or data.root=...). Names with spaces need quotes.")
    overrides = [word for word in words if word not in paths]
    cfg = load_config(EvaluateConfig, overrides=overrides).data
    return dataclasses.replace(cfg, root=paths[0]) if paths else cfg


if __name__ == "__main__":
    raise SystemExit(run(main))
