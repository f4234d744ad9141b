#!/usr/bin/env bash
# Builds, tests, checks and times the kernels on a machine with a CUDA GPU, in under nine minutes:
#     benchmarks/gpu.sh        (rows, page and figures in $OUT, default ./gpu-out)
# Without a repository around it, name the commit for the rows: BENCH_COMMIT=$(git rev-parse --short HEAD).
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
sanitize() { # tool, expression
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 \
        python3 -m pytest -q -x -p no:cacheprovider tests/ops -m "not slow" -k "$2"
}
export -f sanitize

report() {
    cp benchmarks/results/published.csv "$ROWS"
    python3 -m benchmarks.results --root "$OUT" --allow-dirty
}
export -f report
ROWS=$OUT/benchmarks/results
mkdir -p "$ROWS"
export OUT ROWS

# The limits sum to less than nine minutes; what decides comes first.
PER_IMAGE="revbifpn_s0 revbifpn_s4 revbifpn_s6 efficientnet_b0 efficientnet_b4 efficientnet_b7 hrnet_w48"
step versions 10 bash -c versions
step build 85 python3 setup.py --quiet build_ext --inplace
step graphs 30 python3 -m pytest -q -p no:cacheprovider tests/engine -k "cuda and graph"
step tests 75 python3 -m pytest -q -n 8 -p no:cacheprovider tests -m "not slow"
step bench-step 115 python3 -m benchmarks.bench_step --device cuda --seconds 25 --output "$ROWS"
step bench-memory 35 python3 -m benchmarks.bench_memory --device cuda --parts real --models $PER_IMAGE --output "$ROWS"
step profile 20 python3 -m benchmarks.bench_profile --device cuda --repeats 3 --output "$ROWS"
step compile 30 python3 -m benchmarks.kernels --ahead --targets sm_90
step bench-ops 45 python3 -m benchmarks.bench_ops --device cuda --output "$ROWS"
step bench-mbconv 30 python3 -m benchmarks.bench_mbconv --device cuda --seconds 0.3 --output "$ROWS"
step memcheck 25 bash -c 'sanitize memcheck "(resample or norm_act) and triton and odd and fp32"'
step racecheck 15 bash -c 'sanitize racecheck "(resample_add or norm_act) and triton and odd and fp32"'
step report 20 bash -c report

if [ ${#failed[@]} -gt 0 ]; then
    echo "FAILED: ${failed[*]}" | tee -a "$LOG"
    exit 1
fi
echo "all steps passed" | tee -a "$LOG"
