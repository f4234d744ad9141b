#!/usr/bin/env bash
# Builds, tests, checks and times the kernels on a machine with a CUDA GPU, in under nine minutes:
#     benchmarks/gpu.sh        (results in $OUT, default ./gpu-out)
# Uses the machine's own python3 and installs nothing. Every step has its own time limit, a failed one
# does not stop the next, and what is there when the machine is taken away stays in $OUT.
set -u
cd "$(dirname "$0")/.." || exit 2
OUT=$(realpath -m "${OUT:-gpu-out}")
mkdir -p "$OUT"
LOG=$OUT/gpu.log
: >"$LOG"
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD
failed=()

step() { # name, seconds, command...
    local name=$1 seconds=$2 started=$SECONDS status
    shift 2
    printf '\n===== %s: %s\n' "$name" "$*" | tee -a "$LOG"
    timeout --kill-after=5 "$seconds" "$@" 2>&1 | tee -a "$LOG"
    status=${PIPESTATUS[0]}
    printf '\n----- %s: exit %s after %s s\n' "$name" "$status" $((SECONDS - started)) | tee -a "$LOG"
    [ "$status" -eq 0 ] || failed+=("$name")
}

versions() {
    nvidia-smi
    nvcc --version
    python3 -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__, torch.cuda.get_device_name())'
}
export -f versions

# Without PyTorch's caching, each tensor is an allocation whose end the sanitizer knows.
sanitize() {
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
        python3 -m pytest -q -x -p no:cacheprovider tests/test_resample_*.py \
        -k "triton and (odd or strided or channels-last) and fp32"
}
export -f sanitize

step versions 20 bash -c versions
step build 75 python3 setup.py --quiet build_ext --inplace
step compile 35 python3 -m benchmarks.compile_ahead --target sm_90
step bench 115 python3 -m benchmarks.bench_ops --device cuda --output "$OUT"
step bench-stack 90 python3 -m benchmarks.bench_stack --device cuda --output "$OUT"
step figures 25 python3 -m benchmarks.plot "$OUT"/*-torch*.csv --output "$OUT"
step round-trip 20 python3 -m benchmarks.round_trip --output "$OUT"
step tests 90 python3 -m pytest -q -n 4 -p no:cacheprovider
step kernels 30 python3 -m benchmarks.kernels --targets sm_90 --output "$OUT/kernels.csv"
step sanitizer 40 bash -c sanitize

if [ ${#failed[@]} -gt 0 ]; then
    echo "FAILED: ${failed[*]}" | tee -a "$LOG"
    exit 1
fi
echo "all steps passed" | tee -a "$LOG"
