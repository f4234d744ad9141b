#!/usr/bin/env bash
# Builds, tests, checks and times the kernels on a machine with a CUDA GPU, within nine minutes:
#     benchmarks/gpu.sh        (rows, page, figures and a log per step in $OUT, default ./gpu-out)
# Where .git is missing, set BENCH_COMMIT to the short hash of the commit. Installs nothing: python3 must have
# torch, triton, timm, pytest, pytest-xdist, hypothesis, tqdm and matplotlib. Every step has its own time limit, a failed one
# does not stop the next, and what is there when the machine is taken away stays in $OUT.
#     GPU_REHEARSAL=1 benchmarks/gpu.sh        (without a GPU: few cases on a CPU; tests are only collected)
set -u
cd "$(dirname "$0")/.." || exit 2
OUT=$(realpath -m "${OUT:-gpu-out}")
ROWS=$OUT/benchmarks/results
mkdir -p "$ROWS"
LOG=$OUT/gpu.log
: >"$LOG"
export OUT ROWS PYTHONUNBUFFERED=1 PYTHONPATH=$PWD
# In a rehearsal the CPU takes the GPU's place.
DEVICE="cuda"
QUICK=""
CASES="--shapes 32x320x88x88,64x192x80x80,512x48x56x56"
COLLECT=""
HELP=""
if [ -n "${GPU_REHEARSAL:-}" ]; then
    DEVICE="cpu"
    QUICK="--quick"
    CASES="--quick"
    COLLECT="--collect-only"
    HELP="--help"
fi
export COLLECT
failed=()

say() { printf '%s\n' "$@" | tee -a "$LOG"; }

# Interrupted at its limit, as by Ctrl-C: pytest still lists its failures.
step() { # name, seconds expected, seconds allowed, command...
    local name=$1 expected=$2 allowed=$3 started=$SECONDS status log
    log=$OUT/$1.log
    shift 3
    [ -n "$QUICK" ] && allowed=3600
    say "" "===== $name (${expected} s expected, ${allowed} s allowed): $*"
    timeout --signal=INT --kill-after=5 "$allowed" "$@" 2>&1 | tee "$log" | tee -a "$LOG"
    status=${PIPESTATUS[0]}
    if [ "$status" -eq 0 ]; then
        say "----- $name: passed after $((SECONDS - started)) s"
    else
        say "!!!!! $name: FAILED, exit $status after $((SECONDS - started)) s"
        failed+=("$name")
    fi
}

versions() {
    python3 -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
    [ -n "$COLLECT" ] && return
    nvidia-smi && nvcc --version
    python3 -c 'import torch; print(torch.cuda.get_device_name(), torch.cuda.get_device_capability())'
}

# Without PyTorch's caching, each tensor is an allocation whose end the sanitizer knows.
sanitize() { # tool, expression
    local sanitizer=(compute-sanitizer --tool "$1" --error-exitcode 9)
    [ -n "$COLLECT" ] && sanitizer=()
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${sanitizer[@]}" \
        python3 -m pytest -q -x -p no:cacheprovider $COLLECT tests/ops -m "gpu and not slow" -k "$2"
}

# The published figures need no GPU, so they are copied.
report() {
    cp benchmarks/results/published.csv "$ROWS"
    python3 -m benchmarks.results --root "$OUT" --allow-dirty
}
export -f versions sanitize report

NETWORKS="revbifpn_s0 revbifpn_s6 efficientnet_b0 efficientnet_b7 hrnet_w48"
[ -n "$QUICK" ] && NETWORKS="revbifpn_s0"

# Seconds expected on an H100 with 26 cores, and allowed: those sum to less than nine minutes. The most
# important steps run first. Where the expectations come from:
#   build     14 files at 20 s, on 8 cores or more
#   ahead     1000 kernels at 0.42 s and 60 networks on fake tensors at 6 s, on 16 cores or more
#   tests     430 tests, 30 s of compiling on 12 processes, 20 s of imports and collection
#   ops       90 times 0.6 s; without compiled rivals, which take minutes
#   steps     16 s of timing, 24 networks made, warmed and captured at 2 s; S0 in nchw 5 s, 6 at 2 s
#   memory    5 networks, 7 ways, 2 dtypes at 1.5 s
#   the last  20 s of compiling what was not compiled ahead
step versions 5 10 bash -c versions
step build 35 60 python3 setup.py --quiet build_ext --inplace $HELP
step ahead 50 70 python3 -m benchmarks.kernels --ahead $QUICK --targets sm_90
step tests 80 100 python3 -m pytest -v -n 12 --tb=short -p no:cacheprovider $COLLECT tests -m "gpu and not slow"
step ops 60 75 python3 -m benchmarks.bench_ops --device $DEVICE $CASES --output "$ROWS"
step steps 60 75 python3 -m benchmarks.bench_step --device $DEVICE $QUICK --layout channels_last --seconds 16 --compile --output "$ROWS"
step steps-nchw 20 28 python3 -m benchmarks.bench_step --device $DEVICE $QUICK --layout nchw --models revbifpn_s0 --rivals --seconds 5 --compile --output "$ROWS"
step memory 20 30 python3 -m benchmarks.bench_memory --device $DEVICE $QUICK --parts real --models $NETWORKS --output "$ROWS"
step profile 10 15 python3 -m benchmarks.bench_profile --device $DEVICE $QUICK --repeats 3 --output "$ROWS"
step mbconv 16 20 python3 -m benchmarks.bench_mbconv --device $DEVICE --quick --parts stages --seconds 0.2 --no-compile --output "$ROWS"
step memcheck 20 25 bash -c 'sanitize memcheck "(resample or norm_act) and triton and odd and fp32"'
step racecheck 14 18 bash -c 'sanitize racecheck "(resample_add or norm_act) and triton and odd and fp32"'
step report 8 12 bash -c report

if [ ${#failed[@]} -gt 0 ]; then
    say "" "FAILED: ${failed[*]}"
    for name in "${failed[@]}"; do
        say "" "===== end of $name"
        grep -aE '^(FAILED|ERROR)|Error|WRONG|out of memory' "$OUT/$name.log" | tail -n 15 | tee -a "$LOG"
        tail -n 5 "$OUT/$name.log" | tee -a "$LOG"
    done
    exit 1
fi
say "all steps passed in $SECONDS s"
