"""Prints, as NAME=VALUE lines for CMakeLists.txt, where the running Python keeps torch and pip's CUDA packages."""

from __future__ import annotations

from pathlib import Path

import torch

root = Path(torch.__file__).parent
major = (torch.version.cuda or "").partition(".")[0]
pip_cuda = root.parent / "nvidia" / f"cu{major}"
for name, value in {
    "version": torch.__version__,
    "cuda": torch.version.cuda or "",
    "include": root / "include",
    "lib": root / "lib",
    "pip_cuda": pip_cuda if major and pip_cuda.is_dir() else "",
}.items():
    print(f"{name}={value}")  # noqa: T201
