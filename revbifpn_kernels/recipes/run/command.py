"""What `python -m revbifpn_kernels.train` and `.detect` have in common."""

import importlib
import sys
from collections.abc import Sequence

from .errors import RunError


def run_command(name: str, session: str, arguments: Sequence[str] | None = None) -> int:
    """Calls `main` of the module `session`; returns its exit status, 1 after an error."""
    try:
        main = importlib.import_module(session).main
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("revbifpn_kernels"):
            raise  # a broken installation, not a missing extra
        extra = f'pip install --no-build-isolation ".[{name}]" in a clone'
        print(f"{name}: needs {error.name}: {extra}", file=sys.stderr)
        return 1
    try:
        return main(arguments)
    except RunError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
