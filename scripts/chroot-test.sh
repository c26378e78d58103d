#!/usr/bin/env bash
# Proves the README's commands on a bare machine: a fresh minimal Debian or Ubuntu in DIR with make and git, a clone
# of this repository's HEAD, and one command run in the clone.
#   sudo scripts/chroot-test.sh DIR 'make test'
#   SUITE=bookworm MIRROR=URL  choose another release or mirror; the default mirror is this machine's
#   OPTIONS='...' SCRIPT=sid  more options for debootstrap; its script, for a release that it does not know
# Ubuntu 24.04, from a Debian (without --no-check-gpg where Ubuntu's keyring is installed):
#   SUITE=noble SCRIPT=gutsy OPTIONS='--components=main,universe --no-check-gpg' MIRROR=URL scripts/chroot-test.sh DIR 'make test'
# DIR must not exist; it stays for inspection, unmounted. Needs root, debootstrap and git.
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)
dir=${1:?usage: scripts/chroot-test.sh DIR COMMAND}
command=${2:?usage: scripts/chroot-test.sh DIR COMMAND}
suite=${SUITE:-bookworm}

# The first URI of this machine's apt sources that serves the suite.
configured_mirror() {
    apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 'Created-By: Packages' |
        awk -v suite="$suite" '$2 == suite { sub("/$", "", $1); print $1; exit }'
}

[ "$(id -u)" -eq 0 ] || { echo "chroot-test: must be root" >&2; exit 1; }
[ ! -e "$dir" ] || { echo "chroot-test: $dir exists" >&2; exit 1; }
mirror=${MIRROR:-$(configured_mirror)}
[ -n "$mirror" ] || { echo "chroot-test: no mirror for $suite in the apt sources; set MIRROR" >&2; exit 1; }

mounts=()
unmount_all() {
    local i
    for ((i = ${#mounts[@]} - 1; i >= 0; i--)); do
        umount "${mounts[$i]}" || umount -l "${mounts[$i]}"
    done
    mounts=()
}
trap unmount_all EXIT

mount_in() { # mount_in TYPE WHERE
    mount -t "$1" "$1" "$dir/$2"
    mounts+=("$dir/$2")
}

# Proxy and authentication settings of apt, if this machine has any.
copy_apt_settings() {
    local file
    for file in /etc/apt/apt.conf /etc/apt/apt.conf.d/*; do
        if [ -f "$file" ] && grep -qiE 'proxy|Acquire::https?::' "$file"; then
            cp "$file" "$dir/etc/apt/apt.conf.d/"
        fi
    done
    if [ -f /etc/resolv.conf ]; then cp -L /etc/resolv.conf "$dir/etc/resolv.conf"; fi
}

in_chroot() {
    env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb LANG=C.UTF-8 \
        ${http_proxy:+http_proxy="$http_proxy"} ${https_proxy:+https_proxy="$https_proxy"} \
        ${no_proxy:+no_proxy="$no_proxy"} chroot "$dir" /bin/bash -ec "$1" </dev/null
}

begin=$SECONDS
lap() {
    echo "== chroot-test: $1 ($((SECONDS - begin)) s)"
}

read -ra options <<<"${OPTIONS:-}"
made=$(debootstrap --variant=minbase "${options[@]}" "$suite" "$dir" "$mirror" \
    ${SCRIPT:+"/usr/share/debootstrap/scripts/$SCRIPT"}) || { tail -n 3 <<<"$made" >&2; exit 1; }
copy_apt_settings
mount_in proc proc
mkdir -p "$dir/dev/shm" # the other device nodes are debootstrap's
mount_in tmpfs dev/shm
mount_in tmpfs tmp
lap "a bare $suite"
in_chroot 'apt-get -q update >/dev/null && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends make git ca-certificates >/dev/null'
git clone -q --no-local "$repo" "$dir/root/sluice"
lap "make, git and a clone of $(git -C "$dir/root/sluice" rev-parse --short HEAD)"
status=0
in_chroot "cd /root/sluice && $command" || status=$?
lap "'$command' ended with status $status"
exit $status
