"""The data card of a generated set: what is in it, and how far mean colour and raw pixels get."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from personvit.data.generated.config import RENDERER_VERSION, GeneratedConfig
from personvit.data.generated.plan import Item

Vectors = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SplitCount:
    """Images, identities and cameras of one folder."""

    split: str
    images: int
    identities: int
    cameras: int
    occluded: int


@dataclass(frozen=True, slots=True)
class Baseline:
    """Retrieval without learning."""

    name: str
    mean_average_precision: float
    rank1: float


@dataclass(frozen=True, slots=True)
class DataCard:
    """Facts about a generated set; `card.json` holds the same fields."""

    key: str
    renderer: int
    config: dict[str, object]
    splits: list[SplitCount]
    heights: dict[str, int]
    """Images per range of native heights in pixels."""
    widths: dict[str, int]
    bytes: int
    baselines: list[Baseline]
    occluded: list[str]
    """Labelled files with something in front of the person."""

    def summary(self) -> str:
        """A table for the terminal."""
        lines = [f"{'split':<20}{'images':>8}{'ids':>8}{'cameras':>9}{'occluded':>10}"]
        lines += [
            f"{row.split:<20}{row.images:>8}{row.identities:>8}{row.cameras:>9}{row.occluded:>10}"
            for row in self.splits
        ]
        lines += [
            f"baseline {row.name:<13} mAP {row.mean_average_precision:6.2%}  rank-1 {row.rank1:6.2%}"
            for row in self.baselines
        ]
        return "\n".join(lines)


def make_card(root: Path, config: GeneratedConfig, plan: list[Item]) -> DataCard:
    """Count what was written and measure the baselines on query against gallery."""
    sizes = []
    total = 0
    for item in plan:
        path = root / item.name
        total += path.stat().st_size
        with Image.open(path) as image:
            sizes.append(image.size)
    pixels = np.array(sizes, np.int64).reshape(-1, 2)
    groups: dict[str, list[Item]] = {}
    for item in sorted(plan, key=lambda entry: entry.name):
        groups.setdefault(item.name.split("/")[0], []).append(item)
    return DataCard(
        key=config.key(),
        renderer=RENDERER_VERSION,
        config=dataclasses.asdict(config),
        splits=[_count(name, items) for name, items in groups.items()],
        heights=_histogram(pixels[:, 1]),
        widths=_histogram(pixels[:, 0]),
        bytes=total,
        baselines=_baselines(root, groups),
        occluded=[
            item.name for name, items in groups.items() if name != "pool" for item in items if item.shot.occluded
        ],
    )


def write_card(root: Path, card: DataCard) -> None:
    """Write `README.md`, then `card.json`."""
    (root / "README.md").write_text(_readme(card), encoding="utf-8")
    (root / "card.json").write_text(json.dumps(dataclasses.asdict(card), indent=1) + "\n", encoding="utf-8")


def mean_colour(image: Image.Image) -> Vectors:
    """Mean red, green and blue, [3] in 0..1."""
    mean: Vectors = np.asarray(image, np.float32).reshape(-1, 3).mean(axis=0) / 255
    return mean


def raw_pixels(image: Image.Image) -> Vectors:
    """The picture at 64 x 32 pixels with mean 0 and variance 1, [6144]."""
    values = np.asarray(image.resize((32, 64), Image.Resampling.BILINEAR, reducing_gap=2.0), np.float32).ravel()
    standard: Vectors = (values - values.mean()) / (values.std() + 1e-6)
    return standard


def average_precision(
    query: Vectors, gallery: Vectors, query_labels: NDArray[np.int64], gallery_labels: NDArray[np.int64]
) -> tuple[float, float]:
    """Find mAP and rank-1 by the Market-1501 protocol: gallery images of the query's person and camera are left out.

    Args:
        query: features, [Q, D].
        gallery: features, [G, D].
        query_labels: pid and camera, [Q, 2].
        gallery_labels: pid and camera, [G, 2]; pid -1 never takes part.

    Returns:
        mAP and rank-1 over the queries that have a match.
    """
    keep = gallery_labels[:, 0] >= 0
    gallery, gallery_labels = gallery[keep], gallery_labels[keep]
    precisions, hits = [], []
    square = (gallery * gallery).sum(axis=1)
    for feature, (pid, camera) in zip(query, query_labels.tolist(), strict=True):
        order = np.argsort(square - 2 * (gallery @ feature), kind="stable")
        same = gallery_labels[order, 0] == pid
        match = same[~(same & (gallery_labels[order, 1] == camera))]
        places = np.flatnonzero(match) + 1
        if places.size:
            precisions.append(float(np.mean(np.arange(1, places.size + 1) / places)))
            hits.append(float(places[0] == 1))
    if not precisions:
        return 0.0, 0.0
    return float(np.mean(precisions)), float(np.mean(hits))


def labels_of(items: list[Item]) -> NDArray[np.int64]:
    """Read pid and camera from the file names, [N, 2]."""
    parsed = []
    for item in items:
        pid, camera, *_ = item.name.split("/")[-1].split("_")
        parsed.append((int(pid), int(camera[1 : camera.index("s")])))
    return np.array(parsed, np.int64).reshape(-1, 2)


def _baselines(root: Path, groups: dict[str, list[Item]]) -> list[Baseline]:
    query, gallery = groups.get("query", []), groups.get("bounding_box_test", [])
    features: dict[str, tuple[list[Vectors], list[Vectors]]] = {"mean colour": ([], []), "raw pixels": ([], [])}
    for side, items in enumerate((query, gallery)):
        for item in items:
            with Image.open(root / item.name) as image:
                image.load()
            features["mean colour"][side].append(mean_colour(image))
            features["raw pixels"][side].append(raw_pixels(image))
    rows = []
    for name, (first, second) in features.items():
        result = average_precision(np.stack(first), np.stack(second), labels_of(query), labels_of(gallery))
        rows.append(Baseline(name, *result))
    return rows


def _count(name: str, items: list[Item]) -> SplitCount:
    return SplitCount(
        split=name,
        images=len(items),
        identities=len({item.shot.pid for item in items}),
        cameras=len({item.shot.camera for item in items}),
        occluded=sum(item.shot.occluded for item in items),
    )


def _histogram(values: NDArray[np.int64], step: int = 32) -> dict[str, int]:
    bins, counts = np.unique(values // step, return_counts=True)
    return {f"{low * step}-{low * step + step - 1}": n for low, n in zip(bins.tolist(), counts.tolist(), strict=True)}


def _readme(card: DataCard) -> str:
    def table(header: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
        lines = [header, ("---",) * len(header), *rows]
        return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in lines)

    splits = table(
        ("folder", "images", "identities", "cameras", "occluded"),
        [(row.split, row.images, row.identities, row.cameras, row.occluded) for row in card.splits],
    )
    baselines = table(
        ("feature", "mAP", "rank-1"),
        [(row.name, f"{row.mean_average_precision:.1%}", f"{row.rank1:.1%}") for row in card.baselines],
    )
    heights = table(("height (px)", "images"), list(card.heights.items()))
    widths = table(("width (px)", "images"), list(card.widths.items()))
    settings = table(("setting", "value"), list(card.config.items()))
    return f"""# Generated persons

Drawn by PersonViT's renderer, version {card.renderer}; no photograph and no real person is involved. The same
settings give the same files. Overview: [contact_sheet.png](contact_sheet.png); everything below as data: `card.json`.

`pool/` is unlabelled and meant for pre-training; its persons and places appear nowhere else. The other folders follow
the layout and names of Market-1501 (`pid_cCAMERAsSEQUENCE_frame_box.jpg`): pid 0000 marks distractors, pid -1 boxes
that missed the person. Identities of the four groups (pool, train, test, distractors) are disjoint.

{splits}

Identities in a gallery include distractors and junk. {card.bytes / 1e6:.1f} MB in all.

## How hard it is

Retrieval by the Market-1501 protocol (query against gallery, same-camera images of the query's person left out)
without any learning. A feature worth using must do far better.

{baselines}

## Sizes

{heights}

{widths}

## Settings

{settings}

What it is not: a substitute for real pictures. Scores on it say whether a program learns, not how well a model will
do on the street.
"""
