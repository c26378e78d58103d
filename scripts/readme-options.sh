#!/bin/sh
# The README's option reference comes from the programs' own tables.
#   scripts/readme-options.sh BIN            rewrites README.md between the two option marks
#   scripts/readme-options.sh BIN --check    fails when that would change it
set -eu
bin=$1
root=$(dirname "$0")/..
new=$(mktemp)
trap 'rm -f "$new"' EXIT

reference() {
    for program in sluiced sluice-calibrate sluice-demo; do
        printf '#### `%s`\n\n' "$program"
        "$bin/$program" --help-markdown
        echo
    done
    "$bin/sluice" --help-markdown
}

{
    sed '/^<!-- options: begin/q' "$root/README.md"
    echo
    reference
    sed -n '/^<!-- options: end/,$p' "$root/README.md"
} >"$new"

if [ "${2:-}" = --check ]; then
    diff -u "$root/README.md" "$new" || {
        echo "README.md is out of date: run scripts/readme-options.sh $bin" >&2
        exit 1
    }
else
    cat "$new" >"$root/README.md"
fi
