"""Build csrc/ into revbifpn_kernels._C; everything else about the package is in pyproject.toml.

Environment: DEBUG=1 compiles with -O0 -g; SANITIZE=address,undefined adds -fsanitize=... and keeps
one instruction set; MAX_JOBS limits the compilers that run at once.
"""

import os
import platform
import sys
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

# One binary serves Python >= 3.10 and torch >= 2.11: only their stable interfaces are used.
PYTHON_ABI, PYTHON_TAG = "0x030A0000", "cp310"
TORCH_ABI = "0x020B000000000000"

# Multiply-adds of the compiler's own choice would make results depend on the instruction set; the
# kernels ask for theirs. What trapping maths and errno forbid is the vectorising of loops; neither
# is ever looked at.
COMPILE_FLAGS = [
    "-std=c++20",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-psabi",  # vectors are arguments of inlined functions only
    f"-DPy_LIMITED_API={PYTHON_ABI}",
    f"-DTORCH_TARGET_VERSION={TORCH_ABI}",
]


def build_flags() -> tuple[list[str], list[str]]:
    """The compiler's and the linker's flags."""
    compile_flags, link_flags = list(COMPILE_FLAGS), []
    if os.environ.get("DEBUG") == "1":
        compile_flags += ["-O0", "-g"]
    else:
        compile_flags += ["-O3"]
        link_flags += ["-Wl,-s"] if sys.platform == "linux" else []
    if sanitizers := os.environ.get("SANITIZE"):
        # At -O3 the checks in unrolled vector code take minutes to compile; the last -O counts.
        compile_flags += [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer", "-g1", "-O1"]
        link_flags = [f"-fsanitize={sanitizers}"]
        # One instruction set is a third of the work, and AVX2 has all that the others have.
        if platform.machine() == "x86_64":
            compile_flags.append("-DREVBIFPN_ONLY_AVX2")
    if platform.machine() in ("x86_64", "aarch64"):
        # A vector that fits no register would be taken apart, in part into scalars.
        compile_flags.append("-Werror=vector-operation-performance")
    return compile_flags, link_flags


compile_flags, link_flags = build_flags()
setup(
    ext_modules=[
        CppExtension(
            "revbifpn_kernels._C",
            sorted(str(path) for path in Path("csrc").rglob("*.cpp")),
            depends=sorted(str(path) for path in Path("csrc").rglob("*.h")),
            extra_compile_args={"cxx": compile_flags},
            extra_link_args=link_flags,
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": PYTHON_TAG}},
)
