#!/usr/bin/env bash
# Puts prometheus, promtool and nginx into DIR: those of this machine, else out of Debian's packages, which are unpacked and
# not installed, so that no service starts and nothing else changes. Where neither works it says so, and is no error.
set -euo pipefail
dir=$(realpath "${1:?usage: install_binaries.sh DIR}")

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch"

has_list=
unpack() { # PACKAGE BINARY...: from the package, with apt's lists brought up to date once
    local package=$1
    command -v apt-get dpkg >/dev/null || return
    if [[ -z "$has_list" && $(id -u) == 0 ]]; then
        apt-get update -qq || return
        has_list=1
    fi
    apt-get download -qq -o APT::Sandbox::User=root "$package" && dpkg -x "${package}"_*.deb unpacked && install "${@:2}" "$dir/"
}

if command -v promtool prometheus >/dev/null; then
    ln -sf "$(command -v promtool)" "$(command -v prometheus)" "$dir/"
elif ! unpack prometheus unpacked/usr/bin/{promtool,prometheus}; then
    echo "==> prometheus is not here and cannot be had from Debian: the tests of rules are LEFT OUT" >&2
fi
if command -v nginx >/dev/null; then
    ln -sf "$(command -v nginx)" "$dir/"
elif ! unpack nginx unpacked/usr/sbin/nginx || ! "$dir/nginx" -v; then
    rm -f "$dir/nginx"
    echo "==> nginx is not here and cannot be had from Debian: the test of the reverse proxy is LEFT OUT" >&2
fi
