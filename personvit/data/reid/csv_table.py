"""CSV files of images: path, pid and, where known, camid and split."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from personvit.data.reid.own import OwnTable
from personvit.data.reid.types import SPLITS
from personvit.errors import DataError

logger = logging.getLogger(__name__)

COLUMNS = ("path", "pid", "camid", "split")
_REQUIRED = COLUMNS[:2]
_SEPARATORS = (",", ";", "\t")
_LOOKED_AT = 1000


def read_csv(file: Path) -> OwnTable:
    """Read a table of images.

    The first line names the columns; others than `COLUMNS` are passed over. UTF-8 with or without the mark that
    editors put in front; separated by commas, semicolons or tabs. Relative paths start from the folder of the file
    and may not climb out of it. Identities and cameras are any text, compared as they are written.

    Raises:
        DataError: not such a table; the message names the line. Also a path given twice, or no image that exists.
    """
    if not file.is_file():
        raise DataError(f"data.root={file}: no such CSV file. It has a line for each image: path,pid,camid,split")
    rows: dict[str, list[str]] = {column: [] for column in COLUMNS}
    root = os.path.abspath(file.parent)
    seen: dict[str, int] = {}
    present: tuple[str, ...] = ()
    for present, line, row in _rows(file):
        _check_row(file, line, row, present)
        row["path"] = _full_path(file, line, row["path"], root)
        if row["path"] in seen:
            raise DataError(
                f"{file}, line {line}: {row['path']} is given already in line {seen[row['path']]}. An image has one "
                f"line: take one of the two out."
            )
        seen[row["path"]] = line
        for column in present:
            rows[column].append(row[column])
    if not rows["path"]:
        raise DataError(f"{file}: no image in it. Write a line for each below the first one: path,pid,camid,split")
    _check_files(file, rows["path"], root)
    lines = list(seen.values())
    cameras, splits = (_optional(file, column, rows[column], lines) for column in ("camid", "split"))
    return OwnTable(str(file), rows["path"], rows["pid"], cameras, splits)


def _optional(file: Path, column: str, values: list[str], lines: list[int]) -> list[str] | None:
    """The values of a column that is there for all images; None: for none of them."""
    if not any(values):
        return None
    if not all(values):
        raise DataError(
            f"{file}, line {lines[values.index('')]}: no {column}, but other lines have one. Fill it in everywhere, or "
            f"leave the column out."
        )
    return values


def _rows(file: Path) -> Iterator[tuple[tuple[str, ...], int, dict[str, str]]]:
    """Known columns, line number and their values, for every row."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            first = stream.readline()
            separator = max(_SEPARATORS, key=first.count)
            header = [cell.strip().lower() for cell in next(csv.reader([first], delimiter=separator), [])]
            places = _places(file, header)
            reader = csv.reader(stream, delimiter=separator, strict=True)
            for cells in reader:
                if not any(cell.strip() for cell in cells):
                    continue
                if len(cells) < len(header):
                    raise DataError(
                        f"{file}, line {reader.line_num + 1}: {len(cells)} values for {len(header)} columns "
                        f"({', '.join(header)}). Is the line cut off?"
                    )
                row = {column: cells[place] for column, place in places.items()}
                yield tuple(places), reader.line_num + 1, row
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}). Check its permissions: ls -l {file}") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: not a text file in UTF-8 (byte {error.start}: {error.object[error.start]:#04x}). Save it as CSV "
            f"UTF-8."
        ) from None
    except csv.Error as error:
        raise DataError(f"{file}: not a readable CSV file ({error}). Is a quotation mark left open?") from None


def _places(file: Path, header: list[str]) -> dict[str, int]:
    missing = [column for column in _REQUIRED if column not in header]
    if missing:
        raise DataError(
            f"{file}, line 1: no column {' and no column '.join(missing)}; found {', '.join(filter(None, header))}. "
            f"The first line names the columns: path,pid,camid,split (the last two may be left out)."
        )
    twice = [column for column in COLUMNS if header.count(column) > 1]
    if twice:
        raise DataError(f"{file}, line 1: column {twice[0]} is named twice. Rename or remove one of them.")
    return {column: header.index(column) for column in COLUMNS if column in header}


def _check_row(file: Path, line: int, row: dict[str, str], present: tuple[str, ...]) -> None:
    for column in present:
        if column != "path":  # a file name may well end in a space
            row[column] = row[column].strip()
    for column in _REQUIRED:
        if not row[column]:
            raise DataError(f"{file}, line {line}: no {column}. Fill it in, or take the line out.")
    if "split" in present:
        row["split"] = row["split"].lower()
        if row["split"] and row["split"] not in SPLITS:
            raise DataError(
                f"{file}, line {line}: split {row['split']!r} is not one of {', '.join(SPLITS)}. A test set is made of "
                f"queries (searched for) and a gallery (searched in): personvit data split makes them."
            )


def _full_path(file: Path, line: int, text: str, root: str) -> str:
    path = os.path.normpath(text)
    if os.path.isabs(path):
        return path
    if path.split(os.sep, 1)[0] == ".." or "\0" in path:
        raise DataError(
            f"{file}, line {line}: {text!r} climbs out of {root}. Move the CSV file to a folder above its images, or "
            f"write absolute paths."
        )
    return os.path.join(root, path)


def _check_files(file: Path, paths: list[str], root: str) -> None:
    """Look at some of the images, evenly over the table: a wrong folder shows at once, and so may a missing part."""
    places = np.unique(np.linspace(0, len(paths) - 1, _LOOKED_AT).astype(np.int64))
    missing = [paths[place] for place in places if not os.path.isfile(paths[place])]
    if not missing:
        return
    told = (
        f"{file}: {len(missing):,} of {len(places):,} images looked at do not exist (first: {missing[0]}). Relative "
        f"paths start from {root}."
    )
    if len(missing) == len(places):
        raise DataError(f"{told} Correct the paths, or move the file into the folder that they start from.")
    logger.warning("%s All are listed by: personvit data check data.name=csv data.root=%s", told, file)
