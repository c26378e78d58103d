#!/usr/bin/env bash
# GPU tests and a short bench, on a machine that may have nothing but CUDA and a driver.
#   scripts/gpu-check.sh pack BIN FILE       strips what is needed out of BIN (build/cuda/bin) into FILE (.tar.xz), to carry it there
#   scripts/gpu-check.sh run BIN|FILE        every test that wants a GPU, then the attention benches beside PyTorch where it is installed
#   scripts/gpu-check.sh sanitize BIN|FILE   the reduced sets under compute-sanitizer: memcheck, racecheck, synccheck
# Exit status 1 when anything failed. A test that finds no device, or too few, counts as skipped.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
patterns=(test_*_cuda test_*_sm90 test_comm_nccl)
benches=(bench_attn_sm90 bench_attn_decode bench_prefill)
passed=0 failed=0 skipped=0

pack() { # pack BIN FILE
    local stage lib
    stage=$(mktemp -d)
    (cd "$1" && cp "${benches[@]}" sluiced sluice sluice-demo "$stage" && for f in "${patterns[@]}"; do
        for t in $f; do [ -x "$t" ] && cp "$t" "$stage"; done
    done)
    strip "$stage"/*
    lib=$(ldd "$1/test_dev_cuda" | awk '/libcmocka/ { print $3 }')
    if [ -n "$lib" ]; then cp -L "$lib" "$stage/libcmocka.so.0"; fi
    tar -C "$stage" -cJf "$2" .
    rm -rf "$stage"
    du -h "$2"
}

# open_bin BIN|FILE: sets bin to a folder of programs.
open_bin() {
    if [ -d "$1" ]; then
        bin=$(cd "$1" && pwd)
    else
        bin=$(mktemp -d)
        tar -C "$bin" -xJf "$1"
    fi
    export LD_LIBRARY_PATH="$bin:${LD_LIBRARY_PATH:-}"
}

# check NAME COMMAND...: one line of the table; its output is shown when it fails.
check() {
    local name=$1 log status=0 begin=$SECONDS
    shift
    log=$(mktemp)
    timeout "${LIMIT:-180}" "$@" >"$log" 2>&1 || status=$?
    case $status in
    0) passed=$((passed + 1)) ;;
    77) skipped=$((skipped + 1)) ;;
    *)
        failed=$((failed + 1))
        tail -n 40 "$log"
        ;;
    esac
    printf '%-40s %-8s %4d s\n' "$name" "$([ $status -eq 0 ] && echo ok || { [ $status -eq 77 ] && echo skipped || echo "FAILED $status"; })" \
        $((SECONDS - begin))
    rm -f "$log"
}

run() {
    local t f
    for f in "${patterns[@]}"; do
        for t in "$bin"/$f; do
            [ -x "$t" ] && check "$(basename "$t")" "$t"
        done
    done
    [ "$passed" -gt 0 ] || return 0
    "$bin/bench_attn_sm90" dense
    "$bin/bench_attn_sm90" gate
    "$bin/bench_attn_decode" dense
    "$bin/bench_attn_decode" gate
    if python3 -c 'import torch' 2>/dev/null; then
        python3 "$here/bench/peers.py"
    fi
}

sanitize() {
    local tool t
    for tool in memcheck racecheck synccheck; do
        for t in attn_decode_sm90 attn_sm90 kv_store_cuda nn_cuda sampler_cuda; do
            check "$t $tool" compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 1 "$bin/test_$t" quick
        done
    done
}

case ${1:-} in
pack)
    pack "${2:?BIN}" "${3:?FILE}"
    exit
    ;;
run | sanitize)
    open_bin "${2:?BIN or FILE}"
    "$1"
    ;;
*)
    sed -n '2,6s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
