"""`personvit <verb> ...`, the same as `python -m personvit <verb> ...` and `python -m personvit.<verb> ...`."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from pathlib import Path

from personvit import __version__
from personvit.errors import ConfigError
from personvit.runtime.entry import run

_VERBS = {
    "pretrain": "pre-train a ViT on person crops (no data given: on generated persons)",
    "finetune": "fine-tune a backbone on a labelled ReID set",
    "evaluate": "mAP, rank-k and mINP of a backbone on a labelled ReID set",
    "embed": "features of images",
    "index": "build a searchable gallery",
    "search": "find a person in a gallery",
    "calibrate": "choose a distance threshold",
    "export": "write a backbone for other runtimes",
    "visualize": "figures of a run or a model",
    "weights": "what a weight file holds; convert it to another layout",
    "data": "generate persons, check a data set, pack it into tar shards, split labelled images",
    "demo": "pre-train and fine-tune on generated persons, evaluate, draw the result",
    "env": "what is on, what is off, why, and how to switch it on",
}


def verbs() -> dict[str, str]:
    """Verbs of this version and what each does."""
    return {verb: text for verb, text in _VERBS.items() if _module_of(verb) is not None}


def _module_of(verb: str) -> str | None:
    """Module that holds the verb's `main`: personvit.VERB, or its `__main__` where the name is a package (data)."""
    name = f"personvit.{verb}"
    spec = importlib.util.find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        return None if spec is None else name
    has_main = any((Path(folder) / "__main__.py").is_file() for folder in spec.submodule_search_locations)
    return f"{name}.__main__" if has_main else None


def _help() -> str:
    lines = [f"  {verb:<10} {text}" for verb, text in verbs().items()]
    return "\n".join([f"personvit {__version__}", "usage: personvit VERB [--help] [arguments]", "", *lines])


def _dispatch(argv: list[str] | None) -> int:
    arguments = argv or []
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(_help() + "\n")
        return 0
    if arguments[0] == "--version":
        sys.stdout.write(__version__ + "\n")
        return 0
    verb, known = arguments[0], verbs()
    name = _module_of(verb) if verb in known else None
    if name is None:
        near = difflib.get_close_matches(verb, known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{verb!r} is not a verb of personvit.{hint} Verbs: {', '.join(known)}")
    return int(importlib.import_module(name).main(arguments[1:]))


def main(argv: list[str] | None = None) -> int:
    """Run a verb; errors end in one line and their own exit code."""
    return run(_dispatch, argv)


if __name__ == "__main__":
    raise SystemExit(main())
