#!/usr/bin/env bash
# GPU tests and a short bench, on a machine that may have nothing but CUDA and a driver.
#   scripts/gpu-check.sh pack BIN FILE       strips what is needed out of BIN (build/cuda/bin) into FILE (.tar.xz), to carry it there
#   scripts/gpu-check.sh run BIN|FILE        every test that wants a GPU, then the attention benches beside PyTorch where it is installed
#   scripts/gpu-check.sh e2e BIN|FILE        the end-to-end tests with the model on one GPU
#   scripts/gpu-check.sh ranks BIN|FILE      two GPUs: communicator, model and daemon over ranks, prefill on one and on two with a model
#                                            of Llama-3.1-8B's shape (CSV in OUT, or build/), the mixed load under compute-sanitizer;
#                                            ONLY="comm model prefill daemon load ways": some of it; TPS=1,2,4: on four as well; CHUNK=N
#   scripts/gpu-check.sh sanitize BIN|FILE   the reduced sets under compute-sanitizer: memcheck, racecheck, synccheck
# Exit status 1 when anything failed. A test that finds no device, or too few, counts as skipped.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
patterns=(test_*_cuda test_*_sm90 test_comm_nccl)
benches=(bench_attn_sm90 bench_attn_decode bench_prefill)
passed=0 failed=0 skipped=0
LOAD_SECONDS=${LOAD_SECONDS:-60} # for 5000 steps of the mixed load

pack() { # pack BIN FILE
    local stage lib
    stage=$(mktemp -d)
    (cd "$1" && cp "${benches[@]}" sluiced sluice sluice-demo sluice-calibrate "$stage" && for f in "${patterns[@]}"; do
        for t in $f; do [ -x "$t" ] && cp "$t" "$stage"; done
    done)
    strip "$stage"/*
    lib=$(ldd "$1/test_dev_cuda" | awk '/libcmocka/ { print $3 }')
    if [ -n "$lib" ]; then cp -L "$lib" "$stage/libcmocka.so.0"; fi
    # Most of them hold the same kernels: a window that reaches from one to the next takes them once.
    tar -C "$stage" -c . | xz -T2 --lzma2=preset=4,dict=192MiB >"$2"
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
    timeout -k 5 "${LIMIT:-180}" "$@" >"$log" 2>&1 || status=$?
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
    [ -z "${NOTES:-}" ] || grep -E '^# |signal [0-9]+:|steps,' "$log" || true
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

e2e() {
    local name
    export SLUICE_BIN=$bin SLUICE_ROOT=$here SLUICE_TEST_DEVICE=cuda SLUICE_TEST_TP=1 PYTHONDONTWRITEBYTECODE=1
    for name in bad_input serving load eval calibrate; do
        check "e2e_$name" python3 "$here/tests/e2e/test_$name.py"
    done
}

# What NCCL and Python need that is not where the loader and the tests look.
find_libraries() {
    local nccl='import nvidia.nccl; print(":" + list(nvidia.nccl.__path__)[0] + "/lib")'
    ldconfig -p | grep -q libnccl.so.2 || LD_LIBRARY_PATH+=$(python3 -c "$nccl" 2>/dev/null || true)
    export SLUICE_BIN=$bin SLUICE_ROOT=$here SLUICE_TEST_DEVICE=cuda SLUICE_TEST_TP=2 PYTHONDONTWRITEBYTECODE=1
}

# A folder with a configuration alone, and a file of thresholds between two.
make_model() { # make_model FOLDER VOCAB HIDDEN INTERMEDIATE LAYERS HEADS KV_HEADS HEAD_DIM FROM TO
    cat >"$1/config.json" <<EOF
{"model_type": "llama", "vocab_size": $2, "hidden_size": $3, "intermediate_size": $4, "num_hidden_layers": $5,
 "num_attention_heads": $6, "num_key_value_heads": $7, "head_dim": $8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-05,
 "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
 "original_max_position_embeddings": 8192}, "tie_word_embeddings": false, "bos_token_id": 1, "eos_token_id": 2,
 "hidden_act": "silu", "torch_dtype": "bfloat16"}
EOF
    python3 "$here/bench/uniform_thresholds.py" "$1" "$1/t.safetensors" "$9" "${10}"
}

# prefill NAME OPTIONS...: into OUT/prefill_NAME.csv, with what it was made on.
prefill() {
    local csv=$out/prefill_$1.csv name="prefill $1"
    shift
    {
        nvidia-smi --query-gpu=count,name,driver_version --format=csv,noheader | head -n 1 | sed 's/^/# /'
        echo "# git ${GIT:-$(git -C "$here" describe --always --dirty 2>/dev/null)}; bench_prefill --random-weights --device cuda $*"
    } >"$csv"
    # shellcheck disable=SC2016
    check "$name" bash -c 'exec "$@" >>"$0"' "$csv" stdbuf -oL "$bin/bench_prefill" --random-weights --model "$model" --device cuda "$@"
}

ranks_comm() {
    LIMIT=120 check comm_nccl "$bin/test_comm_nccl" ${COMM_TESTS:+"$COMM_TESTS"}
}

ranks_model() {
    LIMIT=15 check attn_ranks_cuda "$bin/test_attn_ranks_cuda"
    LIMIT=90 check model_ranks_cuda "$bin/test_model_ranks_cuda"
}

ranks_prefill() {
    LIMIT=120 prefill scaling --tp "${TPS:-1,2}" --prompt "${PROMPTS:-8192,32768,131072}" --quick --thresholds "$model/t.safetensors" \
        --force-thresholds --density 0.25 --chunk "${CHUNK:-8192}"
}

ranks_daemon() {
    # shellcheck disable=SC2086
    LIMIT=60 check daemon_over_ranks env SLUICE_TEST_PATIENCE=25 python3 "$here/tests/e2e/test_ranks.py" ${DAEMON_TESTS:-}
}

ranks_load() {
    LIMIT=$((LOAD_SECONDS + 30)) check load_sanitized env SLUICE_LOAD_MODEL="$tiny" SLUICE_LOAD_STEPS=5000 \
        SLUICE_LOAD_SECONDS="$LOAD_SECONDS" SLUICE_TEST_PATIENCE=$((LOAD_SECONDS + 20)) \
        SLUICE_TEST_WRAP="compute-sanitizer --target-processes all --report-api-errors no --error-exitcode 9" \
        python3 "$here/tests/e2e/test_load.py"
}

ranks_ways() {
    for way in nccl serial; do
        LIMIT=18 prefill $way --tp 2 --prompt 8192,32768 --quick --sums $way
    done
}

ranks() {
    out=${OUT:-$here/build} NOTES=1
    find_libraries
    nvidia-smi --query-gpu=name,memory.used --format=csv,noheader
    model=$(mktemp -d) tiny=$(mktemp -d)
    make_model "$model" 128256 4096 14336 32 32 8 128 10 4 # Llama-3.1-8B's shape
    make_model "$tiny" 512 256 512 2 4 2 64 0.6 0
    for part in ${ONLY:-comm model prefill daemon load ways}; do
        "ranks_$part"
    done
    rm -r "$model" "$tiny"
    grep -h '^[0-9t]' "$out"/prefill_*.csv || true
}

sanitize() {
    local tool t set
    for tool in memcheck racecheck synccheck; do
        for t in attn_decode_sm90 attn_rel_cuda attn_sm90 kv_store_cuda nn_cuda sampler_cuda select_cuda; do
            set=quick
            if [ "$t $tool" = "attn_sm90 racecheck" ]; then set="least turns"; fi
            for set in $set; do
                check "$t $tool $set" compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 1 "$bin/test_$t" "$set"
            done
        done
    done
}

case ${1:-} in
pack)
    pack "${2:?BIN}" "${3:?FILE}"
    exit
    ;;
run | e2e | ranks | sanitize)
    open_bin "${2:?BIN or FILE}"
    "$1"
    ;;
*)
    sed -n '2,10s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
