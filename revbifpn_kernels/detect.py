"""`python -m revbifpn_kernels.detect`: see docs/detection.md."""

import sys
from collections.abc import Sequence

EXTRA = 'pip install "revbifpn_kernels[detect]"'


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        from .recipes.detect import options, session
    except ModuleNotFoundError as error:
        print(f"detect: needs {error.name}: {EXTRA}", file=sys.stderr)
        return 1
    try:
        return session.main(options.parse(arguments))
    except options.TrainError as error:
        text = str(error).removeprefix("detect: ").removeprefix("train: ")
        print(f"detect: {text}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
