"""`python -m revbifpn_kernels.train`: see docs/training.md."""

import functools
import sys

from .recipes.run.command import run_command

main = functools.partial(run_command, "train", "revbifpn_kernels.recipes.classify.session")

if __name__ == "__main__":
    sys.exit(main())
