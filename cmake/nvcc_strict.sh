#!/usr/bin/env bash
# Runs the compiler given as arguments and fails if ptxas says that it serialised tensor-core products
# or spilled registers: it reports both as mere information, and either costs a kernel its speed.
# C7519 (warpgroup.arrive injected) costs nothing and passes, unprinted.
set -uo pipefail
"$@" 2>&1 | awk '
    /\(C7519\)/ { next }
    { print }
    /\(C75[0-9][0-9]\)|spilled to local memory/ { slow = 1 }
    END { exit slow }'
status=("${PIPESTATUS[@]}")
[ "${status[0]}" -eq 0 ] && [ "${status[1]}" -eq 0 ]
