#!/usr/bin/env bash
# Accuracy kept on tasks that calibration never saw, by gate and density, on one GPU:
#   bench/accuracy.sh BIN|FILE OUT       BIN: a folder of programs, or the archive of scripts/gpu-check.sh
# Sixteen niah prompts calibrate, by several rules; a daemon for each threshold file, and one with a sliding window, answer the
# same prompts in turn (`sluice eval`). Writes OUT/accuracy.json, .jsonl (every answer) and .txt.
#   CALIBRATE=niah BUDGET_LENGTH=8k TASKS=vt,cwe,fwe,qa LENGTHS=8k,16k,32k SAMPLES=200 LIMIT=470s POLICIES="mean=abs~0.5 ..." SEED=0
# POLICIES are NAME=POLICY, NAME one of the files below (mean quantile rows64 smooth second rel budget), one with -X behind it, which
# is then served with --steer X, or window.
# The swap: CALIBRATE=vt,cwe,fwe,qa CALIBRATE_SAMPLES=4 TASKS=niah.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
out=${2:?OUT}
model=$here/models/needle
work=$(mktemp -d)
if [ -d "$1" ]; then
    bin=$(cd "$1" && pwd)
else
    bin=$work/bin
    mkdir "$bin"
    tar -C "$bin" -xJf "$1"
    export LD_LIBRARY_PATH="$bin:${LD_LIBRARY_PATH:-}"
fi
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$work"
trap 'kill $(jobs -p) 2>/dev/null || true; rm -r "$work"' EXIT

densities=0.75,0.5,0.35,0.25,0.15,0.1

calibrate_on() { # calibrate_on SAMPLES NAME OPTIONS...
    local samples=$1 name=$2
    shift 2
    "$bin/sluice-calibrate" --model "$model" --samples "$samples" --holdout 0 --limit 0 \
        --out "$name.safetensors" "$@" >"$out/calibrate_$name.txt"
}

calibrate() {
    calibrate_on samples.jsonl "$@"
}

serve() { # serve NAME OPTIONS...
    local name=$1
    shift
    "$bin/sluiced" --model "$model" --device "${DEVICE:-cuda}" --listen "unix:$name.sock" --token-budget 16384 \
        --kv-memory 6G "$@" 2>"$name.log" &
}

"$bin/sluice" eval --print samples.jsonl --tokens "$model/tokens.json" --set calibrate --tasks "${CALIBRATE:-niah}" --samples "${CALIBRATE_SAMPLES:-2}" \
    --lengths "${CALIBRATE_LENGTH:-32k}"
policies=
names=
for p in ${POLICIES:-mean=abs~0.5 mean=abs~0.25 quantile=abs~0.15 rows64=abs~0.25 smooth=abs~0.25 second=abs~0.25 budget=abs~0.25 \
    rel=rel~0.2 rel=rel~0.1 rel=rel:-0.001/64 rel=rel=2/64 rel=rel:-0.001 rel=rel=2 rel=rel=3 rel=rel=5 rel=rel=10 window=dense}; do
    names+=" ${p%%=*}"
    policies+=${policies:+,}${p#*=}@unix:${p%%=*}.sock
done
names=$(tr ' ' '\n' <<<"${names# }" | sort -u)

begin=$SECONDS
for name in $(for n in $names; do echo "${n%-*}"; done | sort -u); do
    case $name in
    mean) calibrate mean --density "$densities" ;;
    quantile) calibrate quantile --density "$densities" --aggregate quantile ;;
    rows64) calibrate rows64 --density "$densities" --gate-rows 64 ;;
    smooth) calibrate smooth --density "$densities" --smooth ;;
    second) calibrate second --density "$densities" --second-pass ;;
    rel) calibrate rel --density "$densities" --rel 8 ;;
    budget)
        # A k a head comes from page masses, which the CPU alone computes: shorter prompts, whose last thresholds serve beyond them.
        "$bin/sluice" eval --print short.jsonl --tokens "$model/tokens.json" --set calibrate --tasks "${CALIBRATE:-niah}" \
            --samples "${CALIBRATE_SAMPLES:-2}" --lengths "${BUDGET_LENGTH:-8k}"
        calibrate_on short.jsonl budget --device cpu --budget "$densities"
        ;;
    window) ;;
    *)
        echo "POLICIES: no such file: $name" >&2
        exit 2
        ;;
    esac
done
echo "calibrated on $(wc -l <"samples.jsonl") samples: $((SECONDS - begin)) s"

for name in $names; do
    if [ "$name" = window ]; then
        serve window --window "1:${WINDOW:-66}"
    elif [ "$name" != "${name%-*}" ]; then
        serve "$name" --thresholds "${name%-*}.safetensors" --steer "${name##*-}"
    else
        serve "$name" --thresholds "$name.safetensors"
    fi
done
for name in $names; do
    timeout 60 bash -c "until '$bin/sluice' health --connect 'unix:$name.sock' >/dev/null 2>&1; do sleep .2; done" ||
        { tail -n 5 "$name.log"; exit 1; }
done
"$bin/sluice" eval --connect "unix:${names%%$'\n'*}.sock" --tokens "$model/tokens.json" --tasks "${TASKS:-vt,cwe,fwe,qa}" \
    --lengths "${LENGTHS:-8k,16k,32k}" --samples "${SAMPLES:-200}" --seed "${SEED:-0}" --round "${ROUND:-40}" --concurrency 32 \
    --limit "${LIMIT:-470s}" --policy "$policies" --json "$out/accuracy.json" --out "$out/accuracy.jsonl" >"$out/accuracy.txt"
tail -n "${TAIL:-60}" "$out/accuracy.txt"
