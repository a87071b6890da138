"""Before an evaluation: which queries it can score, and if none, why."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from personvit.data.reid.published import PUBLISHED, TITLES, nearest
from personvit.data.reid.types import ReIDSet

_SHOWN = 5
_LEADING_ZEROS = re.compile(r"(?<!\d)0+(?=\d)")


@dataclass(frozen=True)
class Unscored:
    """Queries that have no true match.

    Attributes:
        missing: [queries] bool: the gallery does not know the identity.
        lonely: [queries] bool: the gallery knows it from the query's own camera only.
    """

    missing: np.ndarray
    lonely: np.ndarray


def unscored(labelled: ReIDSet) -> Unscored:
    """Queries without their identity in the gallery, or with it under their own camera only."""
    pids = np.unique(np.concatenate([labelled.query.pids, labelled.gallery.pids]), return_inverse=True)[1]
    cameras = np.unique(np.concatenate([labelled.query.camids, labelled.gallery.camids]), return_inverse=True)[1]
    pairs = pids * (cameras.max(initial=0) + 1) + cameras  # numbered densely first: large identities cannot overflow
    count = len(labelled.query)
    shot, first = np.unique(pairs[count:], return_index=True)
    views = np.bincount(pids[count:][first], minlength=pids.max(initial=0) + 1)[pids[:count]]
    own = np.isin(pairs[:count], shot)
    return Unscored(missing=views == 0, lonely=(views > 0) & (views == own))


def empty_evaluation(labelled: ReIDSet, keep_same_camera: bool) -> str | None:
    """Why no query of a set can be scored, and what to do; None: some can.

    Args:
        labelled: the set.
        keep_same_camera: gallery images of the query's own camera count as matches (protocol keep).
    """
    query, gallery = labelled.query, labelled.gallery
    if not len(query) or not len(gallery):
        return (
            f"{labelled.root}: {len(query):,} query and {len(gallery):,} gallery images, so there is nothing to "
            f"evaluate. Is the set complete? Own data is split by: personvit data split SOURCE --out split.csv"
        )
    found = unscored(labelled)
    lost = found.missing if keep_same_camera else found.missing | found.lonely
    if not lost.all():
        return None
    if found.missing.all():
        return (
            f"{labelled.root}: none of the {len(np.unique(query.pids)):,} query identities is in the gallery "
            f"({_examples(labelled)}). {_why_missing(labelled)}"
        )
    some = f" The other {int(found.missing.sum()):,} are not in the gallery at all." if found.missing.any() else ""
    which = "Every query identity appears" if not some else f"{int(found.lonely.sum()):,} queries have their identity"
    return (
        f"{labelled.root}: {which} in the gallery under the query's own camera only, and the protocol leaves "
        f"same-camera pairs out, so nothing can be scored.{some} {_why_lonely(labelled)}"
    )


def differing_formats(labelled: ReIDSet) -> str:
    """Says which query identities the gallery seems to write otherwise, as in 1 and 0001; "": none."""
    if not labelled.pid_names:
        return ""
    queries, galleries = np.unique(labelled.query.pids), np.unique(labelled.gallery.pids)
    written = {_plain(labelled.pid_name(int(pid))): int(pid) for pid in galleries}
    pairs = [
        (labelled.pid_name(int(pid)), labelled.pid_name(written[plain]))
        for pid in np.setdiff1d(queries, galleries)
        if (plain := _plain(labelled.pid_name(int(pid)))) in written
    ]
    if not pairs:
        return ""
    return (
        f"identities are written in two ways: {pairs[0][0]!r} among the queries, {pairs[0][1]!r} in the gallery "
        f"({len(pairs):,} such). They are compared as text: write them alike"
    )


def counted(labelled: ReIDSet, pids: np.ndarray, one: str, several: str) -> str:
    """`3 identities (1, 5, 9)`, in the names that the user gave; the first few of them."""
    shown = ", ".join(labelled.pid_name(int(pid)) for pid in pids[:_SHOWN])
    more = ", ..." if len(pids) > _SHOWN else ""
    return f"{len(pids):,} {one if len(pids) == 1 else several} ({shown}{more})"


def _plain(name: str) -> str:
    """The same for 1, 01, ID1 and id_0001."""
    digits = _LEADING_ZEROS.sub("", name.casefold())
    return re.sub(r"[\s_\-]|^(?:id|pid|person)(?=[\s_\-]*\d)|\.0$", "", digits)


def _examples(labelled: ReIDSet) -> str:
    query, gallery = (labelled.pid_name(int(split.pids[0])) for split in (labelled.query, labelled.gallery))
    return f"first query: {query}; first of the gallery: {gallery}"


def _why_missing(labelled: ReIDSet) -> str:
    formats = differing_formats(labelled)
    if formats:
        return f"Cause: {formats}."
    mixed = _sources(labelled)
    if mixed:
        return mixed
    query, gallery = labelled.query.pids, labelled.gallery.pids
    if np.isin(query, labelled.train_pids).all():
        return (
            "Cause: all query identities are those of the training images, so the queries belong to another split than "
            "the gallery. Copy query and gallery from the same archive again."
        )
    where = ", ".join(
        f"{what} {labelled.pid_name(int(pids.min()))} to {labelled.pid_name(int(pids.max()))}"
        for what, pids in (("queries", query), ("gallery", gallery))
    )
    return (
        f"Identities: {where}. Do query and gallery come from the same set? Copy both from the same archive; own data "
        f"is split by: personvit data split SOURCE --out split.csv"
    )


def _sources(labelled: ReIDSet) -> str:
    """Query and gallery of two published sets, told by their counts."""
    counts = labelled.counts
    names = [
        {name for name, published in PUBLISHED.items() if published[number] == counts[number]} for number in (1, 2)
    ]
    if not names[0] or not names[1] or names[0] & names[1]:
        return ""
    query, gallery = (" or ".join(TITLES[name] for name in sorted(found)) for found in names)
    return (
        f"Cause: by their counts the queries are those of {query}, the gallery that of {gallery}. Copy both from the "
        f"same archive."
    )


def _why_lonely(labelled: ReIDSet) -> str:
    cameras = np.unique(np.concatenate([labelled.query.camids, labelled.gallery.camids]))
    if len(cameras) == 1:
        if labelled.name in ("csv", "folder") and not labelled.camera_names:
            origin = "a column camid" if labelled.name == "csv" else "_c1, _c2 ... in the file names"
            return f"Cause: no camera is given ({origin} would). Give it, or count such pairs: --protocol keep"
        return (
            f"Cause: all images are of camera {labelled.camera_name(int(cameras[0]))}. If the set has several, correct "
            f"the camera in the names or lists; if it has one, count such pairs: --protocol keep"
        )
    return (
        "Cause: no identity was seen by two cameras. Are the cameras (_c1, _c2 ... in file names, camid in lists) "
        "right? If persons never cross between cameras, count pairs of one camera: --protocol keep"
    )


def other_set(labelled: ReIDSet) -> str | None:
    """Layout name of the published set whose counts a set has in every split, though it is named otherwise."""
    own, counts = PUBLISHED.get(labelled.name), labelled.counts
    there = [number for number in range(3) if counts[number][1]]
    if own is None or all(counts[number] == own[number] for number in there):
        return None
    match = nearest(counts)
    return match.name if match.name != labelled.name and all(match.fits[number] for number in there) else None
