"""`python -m revbifpn_kernels.train`: see docs/training.md."""

import sys
from collections.abc import Sequence

EXTRA = 'pip install "revbifpn_kernels[train]"'


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        from .recipes.classify import options, session
    except ModuleNotFoundError as error:
        print(f"train: needs {error.name}: {EXTRA}", file=sys.stderr)
        return 1
    try:
        return session.main(options.parse(arguments))
    except options.TrainError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
