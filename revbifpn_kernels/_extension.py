"""Loads the C++ kernels, or stops with the exact command that repairs the installation."""

from pathlib import Path

import torch

OLDEST_TORCH = (2, 11)


def require_supported_torch(version: str) -> None:
    """Raise ImportError if `version` ("2.12.0+cu130") is older than the oldest torch supported."""
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise ImportError(
            f"revbifpn_kernels needs torch >= {oldest}, found torch {version}. Repair it with:\n"
            f'    pip install "torch>={oldest}"'
        )


require_supported_torch(torch.__version__)

try:
    from . import _C  # noqa: F401  (importing it registers the C++ kernels)
except ImportError as error:
    folder = Path(__file__).parent
    raise ImportError(
        "revbifpn_kernels: the compiled extension revbifpn_kernels._C cannot be loaded from "
        f"{folder} ({error}).\n"
        "Build it in place, from the repository's root, so that it can be imported there:\n"
        "    pip install --no-build-isolation --editable .\n"
        "or install a copy and leave the repository, whose sources hide it:\n"
        "    pip install --no-build-isolation ."
    ) from error
