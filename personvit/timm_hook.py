"""Our models in timm's registry as soon as both packages are imported, in either order; neither imports the other."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_TRIGGER = "timm.models"
_MODELS = "personvit.models.timm_models"


class _Watcher(MetaPathFinder):
    """Finds nothing itself: lets the other finders look for timm.models, and has our models follow its execution."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TRIGGER:
            return None
        specs = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register()

        # On this loader alone: it belongs to this one module.
        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Register now if timm is there already, otherwise when it comes. Imports nothing heavy by itself."""
    if _TRIGGER in sys.modules:
        _register()
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


def _register() -> None:
    try:
        importlib.import_module(_MODELS)
    except Exception as error:  # nobody's `import timm` should fail because of us
        warnings.warn(f"personvit's models are not known to timm: {error}", RuntimeWarning, stacklevel=2)
