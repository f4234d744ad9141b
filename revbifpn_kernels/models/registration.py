"""Registers the models with timm once both are imported, in either order, and never imports timm.

timm has no list of plugins that it would read, and importing it takes longer than all of ours.
"""

import importlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder


class _AfterTimm(MetaPathFinder):
    """Sees the import of timm coming, lets it happen, then registers."""

    def find_spec(self, name, path=None, target=None):
        if name != "timm":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = execute_and_register
        return spec


def _register() -> None:
    importlib.import_module(f"{__package__}.for_timm")


def register_with_timm() -> None:
    if "timm" in sys.modules:
        _register()
    elif not any(type(finder).__name__ == _AfterTimm.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTimm())
