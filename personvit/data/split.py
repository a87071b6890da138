"""`personvit data split`: make training images, queries and gallery of images with identities."""

from __future__ import annotations

import argparse
import csv
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from personvit.data.reid.csv_table import COLUMNS, read_csv
from personvit.data.reid.own import OwnTable, numbered, own_set, read_own_folder
from personvit.errors import ConfigError, DataError


@dataclass(frozen=True)
class Split:
    """A split, and what has to be known of it.

    Attributes:
        table: the images, with a split each.
        train_ids: identities to train on.
        test_ids: identities that are searched for.
        one_camera: of these, those seen by one camera only: scored under protocol keep alone.
        single: identities of one image, in the gallery for others to be told apart from.
    """

    table: OwnTable
    train_ids: int
    test_ids: int
    one_camera: int
    single: int

    def text(self) -> str:
        """Counts, and what they mean for an evaluation."""
        lines = [own_set("csv", self.table).table()]
        if self.single:
            lines.append(
                f"{self.single:,} identities with one image can be neither learned nor found: they are in the gallery, "
                f"as distractors"
            )
        if self.one_camera:
            lines.append(
                f"{self.one_camera:,} of {self.test_ids:,} test identities were seen by one camera only. Their queries "
                f"are scored with --protocol keep (eval.protocol=keep), not under the usual protocol"
            )
        return "\n".join(lines)


def make_split(table: OwnTable, train_share: float = 0.5, seed: int = 0) -> Split:
    """Divide identities between training and test, and the test images into queries and gallery.

    As in Market-1501, an identity is on one side only, and each camera that saw a test identity gives one query. A
    query always leaves a match of another camera in the gallery where the identity has two cameras; an identity of
    one camera gives one query. Identities of one image go to the gallery. The same arguments give the same split.

    Args:
        table: images with identities, in any order; its splits are not looked at.
        train_share: share of the identities (of those with two images or more) that are trained on, in [0, 1).
        seed: of all choices.

    Raises:
        ConfigError: the share is out of range.
        DataError: fewer than two identities have two images.
    """
    if not 0 <= train_share < 1:
        raise ConfigError(f"--train-share {train_share} is out of range: expected 0 (all for testing) up to below 1.")
    pids, names = numbered(table.pids)
    cameras = numbered(table.cameras)[0] if table.cameras is not None else np.zeros_like(pids)
    images = np.split(np.argsort(pids, kind="stable"), np.cumsum(np.bincount(pids))[:-1])
    several = np.array([pid for pid, members in enumerate(images) if len(members) > 1], dtype=np.int64)
    least = 2 if train_share else 1
    if len(several) < least:
        raise DataError(
            f"{table.source}: {len(several)} of {len(names):,} identities have two images or more, and a split takes "
            f"at least {least}. Is the identity of each image right (column pid, or the folder it lies in)?"
        )
    rng = np.random.default_rng(seed)
    order = rng.permutation(several)
    count = min(max(round(train_share * len(several)), 1), len(several) - 1) if train_share else 0
    splits = np.full(len(pids), "gallery", dtype=object)
    for pid in order[:count]:
        splits[images[pid]] = "train"
    one_camera = 0
    for pid in order[count:]:
        members = images[pid]
        splits[_queries(members, cameras[members], rng)] = "query"
        one_camera += len(np.unique(cameras[members])) == 1
    divided = OwnTable(table.source, table.paths, table.pids, table.cameras, splits.tolist())
    return Split(divided, count, len(several) - count, one_camera, len(names) - len(several))


def _queries(members: np.ndarray, cameras: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One image of each camera of an identity.

    A camera with one image gives up its only one. So where fewer than two cameras have images to spare, one of the
    cameras with a single image gives no query: its image stays in the gallery, as a match for the others.

    Args:
        members: [n] int64 image numbers of the identity, n > 1.
        cameras: [n] int64.
        rng: source of the choices.
    """
    seen = np.unique(cameras)
    chosen = {int(camera): int(rng.choice(members[cameras == camera])) for camera in seen}
    single = [int(camera) for camera in seen if (cameras == camera).sum() == 1]
    if single and len(seen) - len(single) < 2:
        del chosen[int(rng.choice(single))]
    return np.array(list(chosen.values()), dtype=np.int64)


def read_source(source: Path) -> OwnTable:
    """The images of a CSV file without splits, or of a folder with a folder for each identity.

    Raises:
        DataError: as of its reader, or there is a split already.
    """
    if source.is_dir():
        table = read_own_folder(source)
    elif source.exists():
        table = read_csv(source)
    else:
        raise DataError(f"{source}: no such file or folder. Give a CSV file, or a folder with a folder per identity.")
    if table.splits is not None:
        what = "its folders train/, query/ or gallery/" if source.is_dir() else "its column split"
        raise DataError(
            f"{source}: is split already, by {what}. Use it as it is "
            f"(data.name={'folder' if source.is_dir() else 'csv'} data.root={source}), or take that away to split it "
            "anew."
        )
    return table


def write_split(split: Split, out: Path) -> None:
    """Write a split as CSV. Paths below the folder of the file are relative to it, others absolute.

    Raises:
        DataError: the file exists, cannot be written, or a path is not UTF-8.
    """
    table = split.table
    columns = [column for column in COLUMNS if column != "camid" or table.cameras is not None]
    values = {
        "path": _relative_paths(table.paths, os.path.realpath(out.parent)),
        "pid": table.pids,
        "camid": table.cameras or [],
        "split": table.splits or [],
    }
    try:
        stream = out.open("x", encoding="utf-8", newline="")
    except FileExistsError:
        raise DataError(_taken(out)) from None
    except OSError as error:
        raise DataError(_unwritable(out, error)) from None
    try:
        with stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(zip(*(values[column] for column in columns), strict=True))
    except (OSError, UnicodeEncodeError) as error:
        out.unlink()  # half a split is worse than none
        if isinstance(error, OSError):
            raise DataError(_unwritable(out, error)) from None
        raise DataError(f"{error.object!a}: this name is not UTF-8 and cannot be listed. Rename it (convmv).") from None


def _relative_paths(paths: list[str], base: str) -> list[str]:
    """Paths below `base` (resolved) relative to it, the others absolute; links to folders are resolved, files not."""
    inside = base.rstrip(os.sep) + os.sep
    folders: dict[str, str] = {}
    found = []
    for path in paths:
        folder, name = os.path.split(os.path.abspath(path))
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        real = os.path.join(folders[folder], name)
        found.append(real.removeprefix(inside) if real.startswith(inside) else os.path.join(folder, name))
    return found


def _unwritable(out: Path, error: OSError) -> str:
    return f"--out {out}: cannot be written ({error.strerror}). Choose another file."


def _taken(out: Path) -> str:
    return f"--out {out}: exists already and is not overwritten. Name another file, or remove it first."


def main(argv: list[str]) -> int:
    """`personvit data split SOURCE --out FILE.csv`; returns 0."""
    parser = argparse.ArgumentParser(
        prog="personvit data split",
        description="Divide images with identities into training images, queries and gallery; no image is moved.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "source", type=Path, metavar="SOURCE", help="CSV file (path,pid,camid), or DIR/<identity>/*.jpg"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="new CSV file: path,pid,camid,split")
    parser.add_argument("--train-share", type=float, default=0.5, help="share of the identities to train on (0.5)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives another split (0)")
    arguments = parser.parse_args(argv)
    if arguments.out.exists():
        raise DataError(_taken(arguments.out))
    if not arguments.out.parent.is_dir():
        raise DataError(f"--out {arguments.out}: no folder {arguments.out.parent}. Make it first: mkdir -p")
    if arguments.seed < 0:
        raise ConfigError(f"--seed {arguments.seed} is out of range: expected 0 or more.")
    split = make_split(read_source(arguments.source.expanduser()), arguments.train_share, arguments.seed)
    write_split(split, arguments.out)
    sys.stdout.write(
        f"{split.text()}\nwritten to {arguments.out}; next: personvit finetune data.name=csv "
        f"data.root={arguments.out}\n"
    )
    return 0
