"""`python -m revbifpn_kernels.train`: see docs/training.md."""

import sys
from collections.abc import Sequence

from .recipes.run.command import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command("train", "revbifpn_kernels.recipes.classify.session", arguments)


if __name__ == "__main__":
    sys.exit(main())
