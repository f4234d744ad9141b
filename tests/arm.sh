#!/usr/bin/env bash
# `make test-arm`: builds the library for Arm64 on a Debian machine with an x86-64 processor, and runs its C++
# operators in the emulator QEMU. Arguments: the Python of .venv, the requirement of torch, pytest's arguments.
# All that it fetches and makes is in build/arm; nothing is installed on the machine.
set -euo pipefail
cd "$(dirname "$0")/.."
host_python=$1 torch=$2 arm=$PWD/build/arm python=$PWD/build/arm/bin/python
shift 2

for tool in aarch64-linux-gnu-g++ qemu-aarch64 apt-get; do
  command -v $tool > /dev/null && continue
  echo "$tool is missing; on Debian: apt-get install g++-aarch64-linux-gnu qemu-user" >&2
  exit 1
done

if [[ ! -e $arm/$torch ]]; then
  # Debian's Python for Arm64 and its libraries; apt works on lists and a cache of its own.
  rm -rf "$arm"
  mkdir -p "$arm"/{apt/{lists,archives}/partial,bin,root/usr/lib}
  ln -s usr/lib "$arm/root/lib" # as since Debian 13, whose packages have no /lib
  touch "$arm/apt/status"
  apt=(apt-get -qq -o APT::Architecture=arm64 -o Dir::State="$arm/apt" -o Dir::State::status="$arm/apt/status"
    -o Dir::Cache="$arm/apt")
  "${apt[@]}" update
  "${apt[@]}" install --yes --download-only --no-install-recommends python3 libpython3-dev libstdc++6
  for package in "$arm"/apt/archives/*.deb; do dpkg -x "$package" "$arm/root"; done

  # A virtual environment whose Python is a script, so that child processes are emulated too.
  printf '#!/bin/sh\nexec qemu-aarch64 -L "%s" -0 "$0" "%s" "$@"\n' "$arm/root" "$arm/root/usr/bin/python3" > "$python"
  chmod +x "$python"
  echo "home = $arm/root/usr/bin" > "$arm/pyvenv.cfg"
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  # pip itself is not emulated. Torch's wheel needs CUDA's libraries, as for x86-64, to be imported.
  "$host_python" -m pip install --quiet --target "$arm/lib/python$version/site-packages" \
    --only-binary=:all: --python-version "$version" --platform manylinux2014_aarch64 \
    $(printf -- '--platform manylinux_2_%s_aarch64 ' {17..39}) \
    "$torch" "setuptools>=77" numpy pytest pytest-xdist hypothesis tqdm
  touch "$arm/$torch"
fi

# A copy, so that the extension for Arm64 never lies beside the sources. It keeps their times: only what
# has changed is compiled again.
mkdir -p "$arm/src"
rm -rf "$arm"/src/{csrc,revbifpn_kernels,tests,benchmarks}
cp -rp setup.py pyproject.toml README.md LICENSE csrc revbifpn_kernels tests benchmarks "$arm/src"
rm -f "$arm"/src/revbifpn_kernels/*.so
(cd "$arm/src" && PATH=$PATH:$(dirname "$host_python") CC=aarch64-linux-gnu-gcc CXX=aarch64-linux-gnu-g++ \
  CPPFLAGS=$(printf -- '-idirafter %s ' "$arm"/root/usr/include{,/python3*}) \
  "$python" setup.py --quiet build_ext --inplace)

# Both multiply and add with one rounding, so the results have the same bits.
here=$(REVBIFPN_ISA=avx2 PYTHONPATH=. "$host_python" tests/cpu_sweep.py)
there=$(PYTHONPATH=$arm/src "$python" "$arm/src/tests/cpu_sweep.py")
printf '%s  AVX2\n%s  Arm64\n' "$here" "$there"
[[ $here == "$there" ]] || { echo "the hashes of all results differ" >&2; exit 1; }

# Left out: what does not depend on the processor (Triton, torch.compile, PyTorch's checks of operators and
# of the formulas of gradients), and the choice among x86-64's instruction sets.
cd "$arm/src"
"$python" -m pytest tests/ops -k "not triton and not compile and not opcheck and not gradcheck and not test_isa" "$@"
