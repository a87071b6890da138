"""The images of a labelled set as an image source, for those who only look at the pictures."""

from __future__ import annotations

import os
from collections.abc import Iterable

from personvit.data.path_sources import PathTable, _PathSource


class FileSource(_PathSource):
    """Images at full paths.

    Args:
        paths: full paths, in the order of the source.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        super().__init__("", PathTable(os.fsencode(path) for path in paths))
