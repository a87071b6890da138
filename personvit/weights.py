"""`personvit weights`: what a weight file holds, and the same weights in another layout."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

import torch

from personvit.models.weight_convert import TARGETS, convert_weights
from personvit.models.weight_info import WeightsInfo
from personvit.models.weight_layouts import WeightParts, read_parts
from personvit.models.weights import build_network
from personvit.runtime.entry import run

_IN_TABLE = (
    "arch", "image_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "mean", "std", "neck_feat",
    "num_ids", "num_cameras", "training", "network",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, inspect or convert; returns 0.

    Args:
        argv: arguments without the program name; None: those of this process.

    Raises:
        CheckpointError: a file that cannot be used, or written.
    """
    given = _parser().parse_args(argv)
    size = None if given.image_size is None else (given.image_size[0], given.image_size[1])
    network = "student" if given.student else None
    if given.action == "inspect":
        parts = read_parts(given.file, network)
        text = _inspect(parts, build_network(parts, size)[1], given.json)
    else:
        done = convert_weights(
            given.file,
            given.to,
            given.out,
            network=network,
            image_size=size,
            backbone_only=given.backbone_only,
        )
        text = f"{done.info.description()}\n{done.table()}"
    sys.stdout.write(text + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="personvit weights",
        description="Weight files of PersonViT, iBOT, DINO, TransReID-SSL, DINOv2, timm and this project.",
        allow_abbrev=False,
    )
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("file", metavar="FILE", help="a file, or hf://owner/name/path/to/file[@revision]")
    shared.add_argument("--student", action="store_true", help="of a training checkpoint; default: the teacher")
    shared.add_argument(
        "--image-size", nargs=2, type=int, metavar=("H", "W"), help="resample the positions; default: as in the file"
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    inspect = actions.add_parser("inspect", parents=[shared], help="layout, architecture, input, what is used of it")
    inspect.add_argument("--json", action="store_true", help="everything that is known, as JSON")
    convert = actions.add_parser("convert", parents=[shared], help="write the weights in another layout")
    convert.add_argument("--to", required=True, choices=TARGETS, help="layout of the new file")
    convert.add_argument("--out", required=True, metavar="FILE", help="the new file; one that exists is never touched")
    convert.add_argument(
        "--backbone-only", action="store_true", help="drop heads, neck, classifier, mask token and camera vectors"
    )
    return parser


def _inspect(parts: WeightParts, info: WeightsInfo, as_json: bool) -> str:
    tensors = {**parts.backbone, **parts.others}
    parameters = sum(value.numel() for value in parts.backbone.values())
    types = sorted({str(value.dtype).removeprefix("torch.") for value in tensors.values()})
    bad = [name for name, value in tensors.items() if not bool(torch.isfinite(value).all())]
    if as_json:
        known = {**dataclasses.asdict(info), "parameters": parameters, "types": types, "non_finite": bad}
        return json.dumps(known, indent=2)
    rows = [("parameters", f"{parameters:,} in the backbone; stored as {', '.join(types)}")]
    if bad:
        rows.append(("NOT FINITE", f"{', '.join(bad[:4])}: from a diverged training"))
    position = [f"{name} {parts.training[name]}" for name in ("epoch", "step") if name in parts.training]
    if arguments := parts.training.get("args"):
        position.append(f"{len(arguments)} arguments (--json shows them)")
    if position:
        rows.append(("training", ", ".join(position)))
    rows += [(name, _short(value)) for name, value in info.metadata.items() if name not in _IN_TABLE]
    return "\n".join([info.table(), *(f"{title:<13} {text}" for title, text in rows)])


def _short(value: Any) -> str:
    if value is None:
        return "not stated"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}... (--json shows all)"


if __name__ == "__main__":
    raise SystemExit(run(main))
