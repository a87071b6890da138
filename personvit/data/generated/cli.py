"""`personvit data generate`: write a set of generated persons to a folder."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from personvit.data.generated.config import GeneratedConfig
from personvit.data.generated.dataset import generate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    defaults = GeneratedConfig()
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new or empty folder to write to")
    parser.add_argument("--images", type=int, default=defaults.pool_images, help="images of the unlabelled pool")
    parser.add_argument("--train-ids", type=int, default=defaults.train_ids, help="identities of bounding_box_train")
    parser.add_argument("--test-ids", type=int, default=defaults.test_ids, help="identities of query and gallery")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="another seed gives other persons and places")
    parser.add_argument("--workers", type=int, default=None, help="processes (default: one per core)")


def main(argv: list[str] | None = None) -> int:
    """Parse the flags and render."""
    parser = argparse.ArgumentParser(prog="personvit data generate", description="Draw a set of persons.")
    add_arguments(parser)
    return run(parser.parse_args(argv))


def run(args: argparse.Namespace) -> int:
    """Render the set and print its card."""
    config = GeneratedConfig(pool_images=args.images, train_ids=args.train_ids, test_ids=args.test_ids, seed=args.seed)
    start = time.perf_counter()
    card = generate(args.out, config, args.workers)
    seconds = time.perf_counter() - start
    images = sum(row.images for row in card.splits)
    print(card.summary())  # noqa: T201
    print(f"{images} images in {seconds:.1f} s ({images / seconds:.0f} images/s)")  # noqa: T201
    print(f"data card: {args.out / 'README.md'}\ncontact sheet: {args.out / 'contact_sheet.png'}")  # noqa: T201
    return 0
