"""Registers the models with timm once both are imported, in either order, without importing timm.

timm reads no list of plugins, and importing it takes longer than importing this package.
"""

import importlib
import sys
import warnings
from importlib.abc import MetaPathFinder

OLDEST_TIMM = "1.0.3"


class _AfterTimm(MetaPathFinder):
    """Registers the models right after timm's own code has run.

    It stays in `sys.meta_path` until then: libraries ask by `importlib.util.find_spec("timm")`
    whether timm is installed, and do not import it.
    """

    def find_spec(self, name, path=None, target=None):
        if name != "timm":
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next(filter(None, specs), None)
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
    """Register; warn if this timm does not fit, so that both imports go on."""
    try:
        importlib.import_module(f"{__package__}.timm_models")
    except (ImportError, AttributeError) as error:
        version = getattr(sys.modules.get("timm"), "__version__", "of an unknown version")
        warnings.warn(
            "revbifpn_kernels: its models are not registered with timm, which must be >= "
            f"{OLDEST_TIMM}, got {version} ({error})",
            stacklevel=2,
        )


def register_with_timm() -> None:
    if "timm" in sys.modules:
        _register()
    elif not any(type(finder).__name__ == _AfterTimm.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTimm())
