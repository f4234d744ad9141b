"""What an installation must satisfy, and the exact command that repairs one that does not."""

MINIMUM_TORCH = (2, 11)

MISSING_EXTENSION = (
    "revbifpn_kernels: the compiled extension revbifpn_kernels._C cannot be loaded ({reason}). "
    "Build it from the repository's root:\n"
    "    pip install --no-build-isolation .\n"
    "or, to work on the sources in place:\n"
    "    pip install --no-build-isolation --editable ."
)


def require_supported_torch(version: str) -> None:
    """Raise ImportError if `version` ("2.12.0+cu130") is older than the oldest torch supported."""
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) < MINIMUM_TORCH:
        oldest = ".".join(map(str, MINIMUM_TORCH))
        raise ImportError(
            f"revbifpn_kernels needs torch >= {oldest}, found torch {version}. Repair it with:\n"
            f'    pip install "torch>={oldest}" && pip install --no-build-isolation --force-reinstall '
            "--no-deps ."
        )
