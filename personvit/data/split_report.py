"""Which published set a labelled one is, by its counts, and what in its split keeps an evaluation from meaning much."""

from __future__ import annotations

from pathlib import PurePath

import numpy as np

from personvit.data.reid_sets import PUBLISHED, ReIDSet

_TITLES = {
    "market1501": "Market-1501",
    "msmt17": "MSMT17",
    "dukemtmcreid": "DukeMTMC-reID",
    "occluded_duke": "Occluded-Duke",
}
_VARIANTS = {
    "MSMT17 without its validation list": ((1041, 30248), (3060, 11659), (3060, 82161)),
    "CUHK03-NP, labeled boxes": ((767, 7368), (700, 1400), (700, 5328)),
    "CUHK03-NP, detected boxes": ((767, 7365), (700, 1400), (700, 5332)),
}
"""Counts, as in `PUBLISHED`, of what has no layout name of its own."""

_SPLITS = ("train", "query", "gallery")
_SHOWN = 5


def identified(labelled: ReIDSet) -> tuple[str, str]:
    """Layout name and a line that says which published set this is, judged by the counts of its splits.

    The layout name is the set's own where the counts fit no other layout.
    """
    counts = [(len(np.unique(s.pids)), len(s)) for s in (labelled.train, labelled.query, labelled.gallery)]
    known = {**{title: PUBLISHED[name] for name, title in _TITLES.items()}, **_VARIANTS}
    fits = {title: [counts[k] == published[k] for k in range(3)] for title, published in known.items()}
    title = max(fits, key=lambda name: sum(fits[name]))
    name = next((key for key, text in _TITLES.items() if text == title), labelled.name)
    if sum(fits[title]) < 2:
        return labelled.name, "by its counts: none of the published sets"
    if all(fits[title]):
        return name, f"by its counts: {title}{_version(title, labelled)}"
    other = fits[title].index(False)
    ids, images = known[title][other]
    return name, (
        f"by its counts: {title}{_version(title, labelled)}, but {_SPLITS[other]} has {counts[other][0]:,} identities "
        f"in {counts[other][1]:,} images instead of {ids:,} in {images:,}. Is the copy complete?"
    )


def _version(title: str, labelled: ReIDSet) -> str:
    """MSMT17 was published twice with the same counts; the second time with masked faces and other folder names."""
    if not title.startswith("MSMT17"):
        return ""
    folders = PurePath(labelled.gallery.paths[0]).relative_to(labelled.root).parts
    return ", version 2 (masked faces)" if folders[0] == "mask_test_v2" else ", version 1 (by its folder names)"


def split_problems(labelled: ReIDSet) -> list[str]:
    """What makes an evaluation fail, or its figures too good, a line each."""
    query, gallery = labelled.query, labelled.gallery
    problems = []
    missing = np.setdiff1d(query.pids, gallery.pids)
    if len(missing):
        count = int(np.isin(query.pids, missing).sum())
        problems.append(
            f"{_counted(missing, 'query identity', 'query identities')} not in the gallery; their {count:,} queries "
            f"are not scored"
        )
    lonely = _under_own_camera_only(labelled)
    if lonely.any():
        problems.append(
            f"{int(lonely.sum()):,} queries have their identity in the gallery under their own camera only, which the "
            f"protocol leaves out ({_counted(np.unique(query.pids[lonely]), 'identity', 'identities')}); with one "
            f"camera, evaluate with --protocol keep"
        )
    shared = np.intersect1d(np.array(labelled.train_pids, dtype=np.int64), query.pids)
    if len(shared):
        problems.append(
            f"{_counted(shared, 'identity', 'identities')} in both train and query: figures of a model trained on this "
            f"set will be too good"
        )
    return problems


def _under_own_camera_only(labelled: ReIDSet) -> np.ndarray:
    """[queries] bool: the gallery knows the identity, but from no other camera."""
    query, gallery = labelled.query, labelled.gallery
    cameras = int(max(query.camids.max(initial=0), gallery.camids.max(initial=0))) + 1
    shot = np.unique(gallery.pids * cameras + gallery.camids)
    pids, views = np.unique(shot // cameras, return_counts=True)
    place = np.minimum(np.searchsorted(pids, query.pids), max(len(pids) - 1, 0))
    known = pids[place] == query.pids if len(pids) else np.zeros(len(query), dtype=bool)
    own = np.isin(query.pids * cameras + query.camids, shot)
    return np.asarray(known & (views[place] == own))


def _counted(pids: np.ndarray, one: str, several: str) -> str:
    shown = ", ".join(map(str, pids[:_SHOWN].tolist()))
    more = ", ..." if len(pids) > _SHOWN else ""
    return f"{len(pids):,} {one if len(pids) == 1 else several} ({shown}{more})"
