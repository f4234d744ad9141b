"""Benchmarks of the operators and networks; each module is a command."""

import os
import tempfile
from pathlib import Path

# Read once, when PyTorch is imported: its kernels get the instruction set that ours are limited to.
if os.environ.get("REVBIFPN_ISA") == "avx2":
    os.environ |= {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        # A cached kernel with vectors of another width than ATen's crashes.
        "TORCHINDUCTOR_CACHE_DIR": str(Path(tempfile.gettempdir(), "torchinductor_avx2")),
    }
