"""Registers the models with timm once both are imported, in either order, and never imports timm.

timm has no list of plugins that it would read, and importing it takes longer than all of ours.
"""

import importlib
import sys
import warnings
from importlib.abc import MetaPathFinder

OLDEST_TIMM = "1.0.3"


class _AfterTimm(MetaPathFinder):
    """Sees the import of timm coming, lets it happen, then registers.

    It stays until then: `importlib.util.find_spec("timm")`, by which libraries ask whether timm is
    installed, looks for it and does not import it.
    """

    def find_spec(self, name, path=None, target=None):
        if name != "timm":
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                _register()

            spec.loader.exec_module = execute_and_register
        return spec


def _register() -> None:
    """A timm that does not fit costs its own models only: both imports go on."""
    try:
        importlib.import_module(f"{__package__}.for_timm")
    except (ImportError, AttributeError) as error:
        version = getattr(sys.modules.get("timm"), "__version__", "of an unknown version")
        warnings.warn(
            f"revbifpn_kernels: its models are not registered with timm, which must be >= "
            f"{OLDEST_TIMM}, got {version} ({error})",
            stacklevel=2,
        )


def register_with_timm() -> None:
    if "timm" in sys.modules:
        _register()
    elif not any(type(finder).__name__ == _AfterTimm.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTimm())
