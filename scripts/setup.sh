#!/bin/sh
# Installs what is missing to build, test or lint Sluice on Debian 12 / Ubuntu 24.04 or later.
#   scripts/setup.sh [build] [test] [lint]      (no word: build)
# Does nothing, and needs no rights, when everything is there. On other systems it checks for the
# libraries and names what to install.
set -eu

# "a|b": the first of these names that the distribution has.
build_packages="gcc libc6-dev make cmake ninja-build pkg-config libuv1-dev libmsgpack-c-dev|libmsgpack-dev
  libjansson-dev libopenblas-dev libxxhash-dev libmicrohttpd-dev"
test_packages="libcmocka-dev python3 python3-msgpack"
lint_packages="clang libclang-rt-dev clang-format clang-tidy cppcheck"

# The same for systems without apt: programs and pkg-config modules.
build_programs="cc make cmake pkg-config"
build_modules="libuv msgpack-c|msgpack jansson openblas libxxhash libmicrohttpd"
test_programs="python3"
test_modules="cmocka"
lint_programs="clang clang-format clang-tidy cppcheck"

say() {
    echo "setup: $*" >&2
}

installed() {
    [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

# The names of "a|b" on separate words.
names() {
    echo "$1" | tr '|' ' '
}

any_installed() {
    for name in $(names "$1"); do
        if installed "$name"; then return 0; fi
    done
    return 1
}

missing_packages() {
    for package in "$@"; do
        any_installed "$package" || echo "$package"
    done
}

# After apt-get update: the first name with a candidate, else the last name, for apt to complain of.
available_name() {
    for name in $(names "$1"); do
        if apt-cache show "$name" >/dev/null 2>&1; then break; fi
    done
    echo "$name"
}

install_with_apt() {
    # shellcheck disable=SC2086 # words are meant to split
    missing=$(missing_packages $*)
    [ -n "$missing" ] || return 0
    as_root=
    if [ "$(id -u)" -ne 0 ]; then
        if ! command -v sudo >/dev/null; then
            say "missing packages, and neither root nor sudo to install them:" $missing
            exit 1
        fi
        as_root="sudo -n"
        [ -t 0 ] && as_root=sudo
    fi
    say "installing" $missing
    apt="$as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3"
    $apt update >/dev/null
    chosen=
    for package in $missing; do
        chosen="$chosen $(available_name "$package")"
    done
    $apt install -y --no-install-recommends $chosen </dev/null >"$log" 2>&1 || {
        tail -n 30 "$log" >&2
        say "apt-get could not install:$chosen"
        exit 1
    }
}

any_module() {
    for name in $(names "$1"); do
        if pkg-config --exists "$name" 2>/dev/null; then return 0; fi
    done
    return 1
}

# Other systems: everything there, or a list.
check_only() {
    lacking=
    for program in $1; do
        command -v "$program" >/dev/null || lacking="$lacking $program"
    done
    for module in $2; do
        any_module "$module" || lacking="$lacking $module"
    done
    [ -n "$lacking" ] || return 0
    say "this is not a Debian or Ubuntu system (no apt-get); please install:$lacking"
    say "the Debian names are:" $3
    exit 1
}

packages= programs= modules=
for word in "${@:-build}"; do
    case $word in
    build) packages="$packages $build_packages" programs="$programs $build_programs" modules="$modules $build_modules" ;;
    test) packages="$packages $test_packages" programs="$programs $test_programs" modules="$modules $test_modules" ;;
    lint) packages="$packages $lint_packages" programs="$programs $lint_programs" ;;
    *)
        say "unknown word '$word': use build, test or lint"
        exit 2
        ;;
    esac
done

if command -v apt-get >/dev/null && command -v dpkg-query >/dev/null; then
    log=$(mktemp)
    trap 'rm -f "$log"' EXIT
    install_with_apt $packages
else
    check_only "$programs" "$modules" "$packages"
fi
