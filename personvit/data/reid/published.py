"""What is known of the published sets: their counts, cameras, titles, and versions that share a layout."""

from __future__ import annotations

from dataclasses import dataclass

Counts = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""(identities, images) of train, query and gallery."""

PUBLISHED: dict[str, Counts] = {
    "market1501": ((751, 12936), (750, 3368), (751, 15913)),
    "msmt17": ((1041, 32621), (3060, 11659), (3060, 82161)),
    "dukemtmcreid": ((702, 16522), (702, 2228), (1110, 17661)),
    "occluded_duke": ((702, 15618), (519, 2210), (1110, 17661)),
    "cuhk03_labeled": ((767, 7368), (700, 1400), (700, 5328)),
    "cuhk03_detected": ((767, 7365), (700, 1400), (700, 5332)),
    "occluded_reid": ((0, 0), (200, 1000), (200, 1000)),
    "partial_reid": ((0, 0), (60, 300), (60, 300)),
}
"""Counts as published; distractors (pid 0 of Market-1501) count as one identity. Junk boxes (pid -1) do not count."""

MSMT17_TRAIN_ONLY: Counts = ((1041, 30248), (3060, 11659), (3060, 82161))
"""MSMT17 with the validation list left out."""

CAMERAS = {
    "market1501": 6,
    "msmt17": 15,
    "dukemtmcreid": 8,
    "occluded_duke": 8,
    "cuhk03_labeled": 2,
    "cuhk03_detected": 2,
    "occluded_reid": 2,
    "partial_reid": 2,
}
"""Cameras; those of Occluded-REID and Partial-REID are virtual: one for the queries, one for the gallery."""

TITLES = {
    "market1501": "Market-1501",
    "msmt17": "MSMT17",
    "dukemtmcreid": "DukeMTMC-reID",
    "occluded_duke": "Occluded-Duke",
    "cuhk03_labeled": "CUHK03-NP, labeled boxes",
    "cuhk03_detected": "CUHK03-NP, detected boxes",
    "occluded_reid": "Occluded-REID",
    "partial_reid": "Partial-REID",
}


@dataclass(frozen=True)
class Match:
    """The published set that some counts come nearest to.

    Attributes:
        name: layout name.
        title: its name in the literature, with the version where the counts tell it.
        counts: as published.
        fits: of train, query and gallery: whether the counts are the published ones.
    """

    name: str
    title: str
    counts: Counts
    fits: tuple[bool, bool, bool]


def nearest(counts: Counts) -> Match:
    """The published set with the most splits of exactly these counts; the first one listed wins a draw."""
    known = [(name, TITLES[name], published) for name, published in PUBLISHED.items()]
    known.append(("msmt17", "MSMT17 without its validation list", MSMT17_TRAIN_ONLY))
    return max((_match(counts, *entry) for entry in known), key=lambda match: sum(match.fits))


def _match(counts: Counts, name: str, title: str, published: Counts) -> Match:
    train, query, gallery = (found == known for found, known in zip(counts, published, strict=True))
    return Match(name, title, published, (train, query, gallery))
