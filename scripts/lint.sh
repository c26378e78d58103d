#!/usr/bin/env bash
# Formatting and static analysis of the C sources under version control.
#   scripts/lint.sh BUILD       check: clang-format, cppcheck, clang-tidy (BUILD has compile_commands.json)
#   scripts/lint.sh --format    rewrite the sources in place
#   scripts/lint.sh BUILD format|cppcheck|tidy   one of the checks
set -euo pipefail
cd "$(dirname "$0")/.."

mapfile -t all < <(git ls-files '*.c' '*.h' '*.cu' '*.cuh')
mapfile -t units < <(git ls-files '*.c' ':!tests/*')
jobs=${LINT_JOBS:-$(nproc)}
# States that the path-sensitive checks look at in a function, at most; clang's own bound, 225000, takes twice as long
nodes=${LINT_NODES:-50000}

check_format() {
    clang-format --dry-run -Werror "${all[@]}"
}

check_cppcheck() {
    cppcheck --enable=warning,style,performance,portability --std=c11 --inline-suppr --error-exitcode=1 -q \
        -j "$jobs" -I. --suppressions-list=.cppcheck "${units[@]}"
}

# Only files that this build compiles (a CPU build has no *_cuda.c). Tests are compiled with all
# warnings and run under sanitizers; analysing them as well would double the time.
check_tidy() {
    local known
    known=$(mktemp)
    sed -n 's/^ *"file": "\(.*\)",\{0,1\}$/\1/p' "$1/compile_commands.json" >"$known"
    printf '%s\n' "${units[@]}" | sed "s|^|$PWD/|" | grep -Fxf "$known" |
        xargs -P "$jobs" -n 1 clang-tidy -p "$1" --quiet --extra-arg=-Wno-unknown-warning-option \
            --extra-arg=-Xclang --extra-arg=-analyzer-config --extra-arg=-Xclang --extra-arg=max-nodes="$nodes" 2>/dev/null
    rm -f "$known"
}

if [ "${1:-}" = --format ]; then
    clang-format -i "${all[@]}"
    exit
fi
build=${1:?usage: scripts/lint.sh BUILD [format|cppcheck|tidy]}
case ${2:-all} in
format) check_format ;;
cppcheck) check_cppcheck ;;
tidy) check_tidy "$build" ;;
all)
    check_format
    check_cppcheck
    check_tidy "$build"
    ;;
esac
