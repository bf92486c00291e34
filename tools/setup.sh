#!/bin/bash
# Makes a Debian machine and this checkout ready: packages, userfaultfd, virtual environment.
# What is there already costs nothing, so every make target calls this first.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(
    python3 python3-venv            # the project
    qemu-system-misc qemu-utils     # qemu-system-s390x; qemu-img
    mmdebstrap debian-archive-keyring e2fsprogs cpio   # building guest images
    gcc libc6-dev linux-libc-dev libxxhash-dev                   # the shim, comparing pages
    xfsprogs                        # a test's second file system
)

say() { printf '==> %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        return 1
    fi
}

installed() { [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

install_missing() {
    local package missing=()
    for package in "$@"; do
        installed "$package" || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    command -v apt-get >/dev/null || die "this is no Debian; provide what Debian calls: ${missing[*]}"
    [ "$(id -u)" -eq 0 ] || command -v sudo >/dev/null ||
        die "needs root once: apt-get install --no-install-recommends ${missing[*]}"
    say "installing Debian packages: ${missing[*]}"
    as_root apt-get update ||
        die "apt-get update failed; see above"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}" ||
        die "apt-get install failed; see above"
}

# The kernel lets only root use userfaultfd for faults of system calls, unless /dev/userfaultfd may be opened. An entry
# in the device's access list gives that to this one user until the next boot, and changes nothing for anybody else.
allow_userfaultfd() {
    local device=/dev/userfaultfd
    [ "$(id -u)" -ne 0 ] || return 0
    [ -c "$device" ] || return 0          # `hvaqemu doctor` says what to do
    if [ -r "$device" ] && [ -w "$device" ]; then return 0; fi
    [ "$(cat /proc/sys/vm/unprivileged_userfaultfd 2>/dev/null || echo 0)" = 0 ] || return 0
    command -v sudo >/dev/null || return 0
    install_missing acl
    say "letting $(id -un) open $device until the next boot (sudo setfacl)"
    sudo setfacl -m "u:$(id -un):rw" "$device" || say "that failed; 'hvaqemu doctor' says what else to do"
}

make_venv() {
    local python=/usr/bin/python3 stamp=.venv/.installed key
    # Content decides, not time stamps: a fresh clone and a changed branch must both be seen.
    key="$(pwd) $("$python" --version) $(sha256sum pyproject.toml constraints.txt | sha256sum)"
    [ -x .venv/bin/hvaqemu ] && [ "$(cat "$stamp" 2>/dev/null)" = "$key" ] && return 0
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "$python is older than 3.11"
    say "installing Python packages into .venv"
    rm -f "$stamp"
    "$python" -m venv .venv || die "python3 -m venv failed; see above"
    .venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]' ||
        die "pip install failed; see above"
    printf '%s\n' "$key" >"$stamp"
}

install_missing "${packages[@]}"
allow_userfaultfd
make_venv
