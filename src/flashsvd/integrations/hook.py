"""Registers our checkpoint format with transformers, without importing transformers (or torch) to do so.

`import flashsvd` must stay cheap, yet from then on `from_pretrained` must know our format. So if transformers' table
of formats is loaded already, we register at once; if not, we register right after it is first imported.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

TABLE = "transformers.quantizers.auto"


def install() -> None:
    """Register now or as soon as the table is imported. Calling it again changes nothing."""
    if TABLE in sys.modules:
        _register()
    elif not any(isinstance(finder, _RegisterAfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfterImport())


def _register() -> None:
    importlib.import_module("flashsvd.integrations.quantizer")


class _RegisterAfterImport(importlib.abc.MetaPathFinder):
    """Finds the table as the usual finder would, with a loader that registers us once the table has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_then_register(module: ModuleType) -> None:
            run(module)
            _register()

        spec.loader.exec_module = run_then_register  # type: ignore[method-assign]  # this one instance only
        return spec
