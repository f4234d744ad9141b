"""`python -m revbifpn_kernels.detect`: see docs/detection.md."""

import importlib
import sys
from collections.abc import Sequence

from .recipes.run.command import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command("detect", "revbifpn_kernels.recipes.detect.session", arguments)


def __getattr__(name: str):
    """`networks` and `options`, for detectors from Python; they need the extra `detect`."""
    if name in ("networks", "options"):
        return importlib.import_module(f"revbifpn_kernels.recipes.detect.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "__main__":
    sys.exit(main())
