"""`python -m revbifpn_kernels.detect`: see docs/detection.md."""

import sys
from collections.abc import Sequence

from .recipes.run.command import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command("detect", "revbifpn_kernels.recipes.detect.session", arguments)


if __name__ == "__main__":
    sys.exit(main())
