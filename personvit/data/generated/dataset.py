"""Writing a generated set to a folder, and keeping one in the cache."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tqdm import tqdm

from personvit.config import DataConfig
from personvit.data.generated.card import DataCard, make_card, write_card
from personvit.data.generated.config import GeneratedConfig
from personvit.data.generated.crop import encode_crop
from personvit.data.generated.plan import Item, make_plan
from personvit.data.generated.sheet import write_contact_sheet
from personvit.errors import DataError

_log = logging.getLogger(__name__)

FOLDERS = ("pool", "bounding_box_train", "query", "bounding_box_test")


def generate(root: Path, config: GeneratedConfig, workers: int | None = None, progress: bool = True) -> DataCard:
    """Render a set of persons into an empty or new folder.

    The files depend on `config` only, not on `workers`.

    Args:
        root: folder to write to.
        config: what to write.
        workers: processes; None: one per available core.
        progress: show a progress bar on stderr.

    Returns:
        The data card, which is also written as `card.json` and `README.md`.

    Raises:
        DataError: `root` is a file, holds something already, or cannot be written.
    """
    _require_empty(root)
    plan = make_plan(config)
    try:
        for folder in FOLDERS:
            (root / folder).mkdir(parents=True, exist_ok=True)
        _render_all(root, config.seed, plan, workers, progress)
        write_contact_sheet(root / "contact_sheet.png", root, plan)
        card = make_card(root, config, plan)
        write_card(root, card)
    except OSError as error:
        raise DataError(
            f"cannot write generated persons to {root}: {error}. Free some space (about 6 kB per image) or choose "
            f"another folder with --out DIR."
        ) from error
    return card


def ensure_generated(data: DataConfig, workers: int | None = None) -> Path:
    """Root of the generated set that a configuration asks for; rendered on first use, then taken from the cache.

    The cache is `$XDG_CACHE_HOME/personvit` (default `~/.cache/personvit`). Processes that ask at the same time wait
    for one of them to render; a set becomes visible only when it is complete.

    Raises:
        DataError: the cache folder cannot be written.
    """
    config = GeneratedConfig.from_data_config(data)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "personvit"
    final = cache / f"generated-{config.key()}"
    if is_complete(final, config):
        return final
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _lock(cache / f"{final.name}.lock"):
            if not is_complete(final, config):
                _render_into_cache(final, config, workers)
    except OSError as error:
        raise DataError(
            f"cannot keep generated persons in {cache}: {error}. Set XDG_CACHE_HOME to a folder you can write to, or "
            f"run `personvit data generate --out DIR` and pass data.root=DIR."
        ) from error
    return final


def is_complete(root: Path, config: GeneratedConfig) -> bool:
    """Whether `root` holds this very set. The card is written last, so its presence means that all else is there."""
    try:
        card = json.loads((root / "card.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(card, dict) and card.get("key") == config.key() and (root / "pool").is_dir()


def _render_into_cache(final: Path, config: GeneratedConfig, workers: int | None) -> None:
    _log.info("rendering %d generated persons into %s (once)", config.pool_images, final)
    temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    try:
        generate(temporary, config, workers)
        if final.exists():
            # Somebody deleted parts of it: what is left is of no use.
            shutil.rmtree(final)
        temporary.rename(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _require_empty(root: Path) -> None:
    if root.is_dir():
        if any(root.iterdir()):
            raise DataError(
                f"{root} is not empty: generated persons are written to a new or empty folder only, so that nothing of "
                f"yours is overwritten. Choose another one with --out DIR, for example --out {root}-2"
            )
    elif root.exists():
        raise DataError(f"{root} is a file, not a folder. Choose a folder with --out DIR.")


def _render_all(root: Path, seed: int, plan: list[Item], workers: int | None, progress: bool) -> None:
    count = min(workers or _cores(), max(1, len(plan) // 16))
    write = partial(_write, str(root), seed)
    with tqdm(total=len(plan), desc="generated persons", unit="img", disable=None if progress else True) as bar:
        if count == 1:
            for item in plan:
                write(item)
                bar.update()
            return
        # fork, where it is safe: the children need numpy and Pillow only, not the program of the caller.
        method = "fork" if sys.platform == "linux" else "spawn"
        with multiprocessing.get_context(method).Pool(count) as pool:
            for _ in pool.imap_unordered(write, plan, chunksize=20):
                bar.update()


def _cores() -> int:
    """Cores that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _write(root: str, seed: int, item: Item) -> None:
    with open(os.path.join(root, item.name), "wb") as file:
        file.write(encode_crop(seed, item.shot))
