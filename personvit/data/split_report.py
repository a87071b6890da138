"""Which published set a labelled one is, by its counts, and what in its split keeps an evaluation from meaning much."""

from __future__ import annotations

import os

import numpy as np

from personvit.data.reid.preflight import counted, differing_formats, unscored
from personvit.data.reid.published import nearest
from personvit.data.reid.types import SPLITS, ReIDSet, cameras_outside


def identified(labelled: ReIDSet) -> tuple[str, str]:
    """Layout name and a line that says which published set this is, judged by the counts of its splits.

    The layout name is the set's own where the counts fit no other layout.
    """
    counts, match = labelled.counts, nearest(labelled.counts)
    if sum(match.fits) < 2:
        return labelled.name, "by its counts: none of the published sets"
    title = match.title
    if match.name == "msmt17" and labelled.version:
        title += f", {labelled.version}"  # both versions have the same counts; folder names tell them apart
    if all(match.fits):
        return match.name, f"by its counts: {title}"
    other = match.fits.index(False)
    ids, images = match.counts[other]
    return match.name, (
        f"by its counts: {title}, but {SPLITS[other]} has {counts[other][0]:,} identities in {counts[other][1]:,} "
        f"images instead of {ids:,} in {images:,}. Is the copy complete?"
    )


def split_problems(labelled: ReIDSet) -> list[str]:
    """What makes an evaluation fail, or its figures too good, a line each."""
    query = labelled.query
    problems = []
    found = unscored(labelled)
    missing = np.unique(query.pids[found.missing])
    if len(missing):
        problems.append(
            f"{counted(labelled, missing, 'query identity', 'query identities')} not in the gallery; their "
            f"{int(found.missing.sum()):,} queries are not scored"
        )
    if formats := differing_formats(labelled):
        problems.append(formats)
    lonely = np.unique(query.pids[found.lonely])
    if len(lonely):
        problems.append(
            f"{int(found.lonely.sum()):,} queries have their identity in the gallery under their own camera only, "
            f"which the protocol leaves out ({counted(labelled, lonely, 'identity', 'identities')}); with one camera, "
            f"evaluate with --protocol keep"
        )
    shared = np.intersect1d(np.array(labelled.train_pids, dtype=np.int64), query.pids)
    if len(shared):
        problems.append(
            f"{counted(labelled, shared, 'identity', 'identities')} in both train and query: figures of a model "
            f"trained on this set will be too good"
        )
    return [*problems, *filter(None, (_same_names(labelled), cameras_outside(labelled)))]


def _same_names(labelled: ReIDSet) -> str:
    """Market-family names hold the frame, so one name in two folders is one picture."""
    if labelled.name in ("csv", "folder", "occluded_reid", "partial_reid", "msmt17"):
        return ""
    names = [{os.path.basename(path) for path in split.paths} for split in labelled.splits]
    for first, second in ((1, 2), (0, 1), (0, 2)):
        shared = names[first] & names[second]
        if shared:
            return (
                f"{len(shared):,} file names in both {SPLITS[first]} and {SPLITS[second]} (first: {min(shared)}): is "
                f"this the same picture twice? Take one of the two out"
            )
    return ""
