#!/bin/sh
# Make .venv and install this package with one of its extras: setup.sh demo|dev|bench
# Quick when there is nothing to do. Safe to run twice at once, and after an interrupted run.
set -eu
cd "$(dirname "$0")/.."
extra=$1
venv=.venv

say() { echo "setup: $*" >&2; }
die() { say "$@"; exit 1; }

if command -v flock >/dev/null 2>&1; then
    exec 9>"$venv.lock"
    flock 9
fi

choose_python() {
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            python=$candidate
            return
        fi
    done
    die "needs Python 3.11 or newer, but ${PYTHON:-python3} is not; name one: PYTHON=python3.12 make ..."
}

make_venv() {
    choose_python
    say "making $venv with $("$python" --version)"
    rm -rf "$venv"
    "$python" -m venv "$venv" >/dev/null 2>&1 && return
    # Debian keeps ensurepip in a package of its own.
    rm -rf "$venv"
    "$python" -m venv --without-pip "$venv" &&
        "$python" -m pip --python "$venv/bin/python" install --quiet pip 2>/dev/null && return
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        say "installing python3-venv"
        export DEBIAN_FRONTEND=noninteractive
        apt-get -qq update && apt-get -qq install -y --no-install-recommends python3-venv >/dev/null
        rm -rf "$venv"
        "$python" -m venv "$venv" && return
    fi
    rm -rf "$venv"
    die "$python cannot make virtual environments; on Debian or Ubuntu: sudo apt install python3-venv"
}

# What is installed is noted last, so a note is never older than what it tells of.
wanted="$(pwd) $(cksum <pyproject.toml)"
installed() { [ "$(cat "$venv/.installed-$1" 2>/dev/null)" = "$wanted" ]; }

version_of() { "$1" -c 'import sys; print(sys.version)' 2>/dev/null; }
usable() {
    # A killed pip may have left half a package; the interpreter may be gone, or another one wanted.
    [ ! -e "$venv/.installing" ] && "$venv/bin/python" -m pip --version >/dev/null 2>&1 &&
        [ "$(version_of "${PYTHON:-$venv/bin/python}")" = "$(version_of "$venv/bin/python")" ]
}

if ! usable; then
    make_venv
elif installed "$extra" || { [ "$extra" = demo ] && installed dev; }; then
    exit 0
fi
say "installing .[$extra]; this takes a while, but only once"
touch "$venv/.installing"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".[$extra]"
echo "$wanted" >"$venv/.installed-$extra"
rm "$venv/.installing"
