"""`python -m revbifpn_kernels.detect`: see docs/detection.md."""

import functools
import sys

from .recipes.run.command import run_command

main = functools.partial(run_command, "detect", "revbifpn_kernels.recipes.detect.session")

if __name__ == "__main__":
    sys.exit(main())
