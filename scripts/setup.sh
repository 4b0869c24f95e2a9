#!/bin/sh
# Makes .venv in the project: a virtual environment with mrcore and its development tools, in the versions of lock/*.txt.
#
#   scripts/setup.sh [EXTRAS [COMMAND…]]
#
# EXTRAS of pyproject.toml, comma-separated, default dev. COMMANDs are programs that must be there, each installed from
# the Debian package of its name when it is not; COMMAND=PACKAGE when the package is called otherwise. Exit status 3:
# such programs are missing, and we have no right to install them.
#
# Every make target calls this; when nothing has changed it is done in a few milliseconds. PYTHON=… chooses the
# interpreter. The stamp .venv/.ready-EXTRAS is written last and removed first, so a venv without any stamp is one
# that was interrupted half-way: it is made anew.
set -eu

cd "$(dirname "$0")/.."
extras=${1:-dev}
if [ $# -gt 0 ]; then shift; fi
stamp=.venv/.ready-$extras
wanted="$(cat pyproject.toml lock/*.txt | cksum)
$PWD" # a venv knows its own place: one that was moved or copied does not work
unset PYTHONHOME PYTHONPATH
path= IFS=: # without .venv itself, which the user's shell may have activated, and which is perhaps about to go
for folder in $PATH; do case $folder in "$PWD"/.venv/*) ;; *) path=$path:$folder ;; esac; done
unset IFS
PATH=${path#:}
export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1

say() { echo "set-up: $*" >&2; }

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() { # prints the first interpreter that will do
    for name in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        path=$(command -v "$name") || continue
        case $path in "$PWD"/.venv/* | .venv/*) continue ;; esac
        if is_new_enough "$path"; then
            echo "$path"
            return
        fi
    done
    return 1
}

no_rights=1 # the exit status when we may not install
install_packages() { # by apt, with what rights there are
    line="apt-get install --yes --no-install-recommends $*"
    if ! command -v apt-get >/dev/null; then
        say "missing: $*. There is no apt-get here: install this with your system's package manager."
        exit 1
    elif [ "$(id -u)" = 0 ]; then
        rights=
    elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
        rights="sudo -n"
    else
        say "missing: $*. Installing needs root: run this once, then the same make command again:"
        echo "    sudo $line" >&2
        exit $no_rights
    fi
    say "missing: $*. Running: ${rights:+$rights }$line"
    $rights apt-get update -qq || say "apt-get update failed; going on with the package lists that are here"
    # shellcheck disable=SC2086  # both are lists of words
    $rights env DEBIAN_FRONTEND=noninteractive $line >&2
}

require_python() { # sets $python to an interpreter that can make a venv with pip in it
    if ! python=$(find_python); then
        if [ -n "${PYTHON:-}" ]; then
            say "PYTHON=$PYTHON is no Python 3.11 or newer"
            exit 1
        fi
        install_packages python3 python3-venv
        if ! python=$(find_python); then
            say "this system's python3 is older than 3.11: install a newer one and call make PYTHON=/path/to/python3"
            exit 1
        fi
    fi
    if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        install_packages "python$version-venv"
        if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
            say "$python still cannot make a venv (no module ensurepip): choose another with make PYTHON=…"
            exit 1
        fi
    fi
}

# Two make commands at a time: the second waits here, then finds all done.
if command -v flock >/dev/null; then
    exec 9<pyproject.toml
    flock 9
fi

is_there() ( # also where only root's PATH leads; a path may be that of any file
    PATH=$PATH:/usr/sbin:/sbin
    [ -e "$1" ] && [ "${1#/}" != "$1" ] || command -v "$1" >/dev/null
)
missing=
for each in "$@"; do
    if ! is_there "${each%%=*}"; then missing="$missing ${each#*=}"; fi
done
if [ -n "$missing" ]; then
    no_rights=3
    # shellcheck disable=SC2086  # a list of words
    install_packages $missing
    no_rights=1
fi

works() { .venv/bin/python -c 'import mrcore, pip' 2>/dev/null; }

if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && works; then
    exit 0
fi

whole=no
for each in .venv/.ready-*; do # same place, other pyproject.toml or other extras: can be brought up to date
    if [ -f "$each" ] && [ "$(sed 1d "$each")" = "$PWD" ] && works; then whole=yes; fi
done
if [ $whole = no ]; then
    require_python
    if [ -e .venv ]; then say "the .venv that is here is unfinished, moved or broken: making it anew"; fi
    rm -rf .venv
    say "making .venv with $("$python" --version 2>&1)"
    "$python" -m venv .venv
fi
rm -f .venv/.ready-*
say "installing mrcore and what it needs ($extras) into .venv; the first time takes about a minute"
locked="-r lock/base.txt"
for each in $(echo "$extras" | tr ',' ' '); do locked="$locked -r lock/$each.txt"; done
install() { .venv/bin/python -m pip install --quiet --quiet "$@"; }
# What builds packages comes first and is used as it is: pip would fetch another one for each that it has to build.
# shellcheck disable=SC2086  # a list of words
if ! { install --require-hashes -r lock/build.txt && install --require-hashes --no-build-isolation $locked &&
    install --no-deps --no-build-isolation -e .; }; then
    say "pip could not install everything (see above): is there a network, or a package index configured for pip?"
    exit 1
fi
for each in $(echo "$extras" | tr ',' ' ') "$extras"; do
    echo "$wanted" >".venv/.ready-$each"
done
say "done"
