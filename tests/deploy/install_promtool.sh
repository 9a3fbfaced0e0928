#!/usr/bin/env bash
# Puts promtool and prometheus into DIR: those of this machine, else out of Debian's package, which is unpacked and not
# installed, so that no service starts and nothing else changes. Where neither works it says so, and is no error.
set -euo pipefail
dir=$(realpath "${1:?usage: install_promtool.sh DIR}")

if command -v promtool prometheus >/dev/null; then
    ln -sf "$(command -v promtool)" "$(command -v prometheus)" "$dir/"
    exit 0
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# apt drops its rights for downloads, and must be able to write here all the same.
chmod 755 "$scratch"
if command -v apt-get dpkg >/dev/null && cd "$scratch" && { [ "$(id -u)" != 0 ] || apt-get update -qq; } &&
    apt-get download -qq -o APT::Sandbox::User=root prometheus && dpkg -x prometheus_*.deb unpacked; then
    cp unpacked/usr/bin/promtool unpacked/usr/bin/prometheus "$dir/"
else
    echo "==> promtool is not here and cannot be had from Debian: the tests of rules are LEFT OUT" >&2
fi
