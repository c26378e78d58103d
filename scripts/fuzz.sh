#!/usr/bin/env bash
# Runs every fuzz target of a build for a while and fails when one of them finds something.
#   scripts/fuzz.sh BUILD SECONDS
# The corpus grows in BUILD/corpus/TARGET; seeds come from tests/data/TARGET; a finding is kept in
# BUILD/findings/TARGET-* together with the log.
set -euo pipefail
cd "$(dirname "$0")/.."
build=${1:?usage: scripts/fuzz.sh BUILD SECONDS}
seconds=${2:?usage: scripts/fuzz.sh BUILD SECONDS}
mkdir -p "$build/findings"

one() {
    local target=$1 name corpus log
    name=$(basename "$target")
    corpus=$build/corpus/$name
    log=$build/findings/$name.log
    mkdir -p "$corpus"
    local dirs=("$corpus")
    [ -d "tests/data/$name" ] && dirs+=("tests/data/$name")
    # A target is bounded in time, memory and input size, so that the run is as well.
    if "$target" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -max_len=65536 \
        -artifact_prefix="$build/findings/$name-" -print_final_stats=1 "${dirs[@]}" >"$log" 2>&1; then
        echo "$name: $(sed -n 's/^stat::number_of_executed_units: *//p' "$log") runs, nothing found"
    else
        echo "$name: FOUND, see $log"
        tail -n 40 "$log"
        return 1
    fi
}
export -f one
export build seconds

targets=$(find "$build/bin" -name 'fuzz_*' -type f -perm -u+x | sort)
[ -n "$targets" ] || { echo "no fuzz targets in $build/bin"; exit 1; }
echo "$targets" | xargs -P "$(nproc)" -I{} bash -c 'one {}'
