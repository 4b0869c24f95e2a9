#!/bin/sh
# Runs the tests for make.
#
#   scripts/test.sh                     all: the appliance's on containers, of which `fresh` runs the quick unit tests, and
#                                       the slow ones beside them; without containers all unit tests run here
#   scripts/test.sh ARGUMENT…           only the unit tests that these arguments of pytest choose
#   scripts/test.sh --appliance [STEP…] only the appliance's; see tests/appliance/run.py
#
# What is missing is installed by apt where we may. Without the right to, the rest is run, and at the end it is said what
# was not; the exit status is then 3, and 1 when something failed. With CI=true nothing is left out.
# (make itself ends with 2 in either case; it prints this status as "Error 3".)
set -u
cd "$(dirname "$0")/.."
unit="strace sudo screen sshd=openssh-server zstd bzip2 xz=xz-utils"
slow="chromium promtool=prometheus" # for slow tests only
containers="podman runc conmon iptables mmdebstrap ssh=openssh-client nft=nftables nsenter=util-linux ip=iproute2
/usr/lib/podman/netavark=netavark /usr/lib/podman/aardvark-dns=aardvark-dns
/usr/share/keyrings/debian-archive-keyring.gpg=debian-archive-keyring"
MRCORE_NOT_RUN=$(mktemp)
export MRCORE_NOT_RUN
beside_status=$(mktemp)
trap 'wait; rm -f "$MRCORE_NOT_RUN" "$beside_status"' EXIT
failed=no
fresh_ran=no

prepare() { # 0: all there; 3: not, and we may not install it
    # shellcheck disable=SC2068  # a list of words
    scripts/setup.sh dev,dashboard,appliance,notebook,test,docs $@
    status=$?
    if [ $status = 3 ] && [ "${CI:-}" = true ]; then status=1; fi
    if [ $status != 0 ] && [ $status != 3 ]; then exit 1; fi
    return $status
}

judge() { # pytest's exit status
    if [ "$1" = 2 ]; then exit 130; fi # Ctrl-C
    if [ "$1" != 0 ]; then failed=yes; fi
}

run_unit() {
    case "$*" in *"not slow"*) needed=$unit ;; *) needed="$unit $slow" ;; esac
    prepare $needed # without them the tests that need them are left out, and told
    # worksteal: a worker keeps whole modules, so that what a module shares, such as a cluster, is mostly started once
    .venv/bin/python -m pytest -n 2 --dist worksteal "$@"
    judge $?
    run_as_root "$@"
}

run_as_root() {
    if [ "$(id -u)" != 0 ] && sudo -n true 2>/dev/null; then # what only root can do, with the right to become root
        sudo -n -E .venv/bin/python -m pytest -q -p no:cacheprovider "$@" -m needs_root
        status=$?
        if [ $status != 5 ]; then judge $status; fi # 5: none of those that were chosen
    fi
}

run_appliance() {
    if prepare $containers; then
        PATH=$PATH:/usr/sbin:/sbin .venv/bin/python tests/appliance/run.py "$@"
        status=$?
    else
        .venv/bin/python tests/appliance/run.py inventories || failed=yes
        status=3
        echo "the scenarios on containers: the packages named above are missing" >>"$MRCORE_NOT_RUN"
    fi
    case $status in 0) fresh_ran=yes ;; 3) ;; 130) exit 130 ;; *) failed=yes && fresh_ran=yes ;; esac
}

start_beside() { # the slow unit tests, with their name before each line, as run.py shows its scenarios
    prepare $unit $slow
    { # a shell has what it starts with & ignore Ctrl-C
        env --default-signal=INT PYTHONUNBUFFERED=1 .venv/bin/python -m pytest -n 2 --dist worksteal -m slow 2>&1
        echo $? >"$beside_status"
    } | sed -u 's/^/unit      | /' &
}

if [ "${1:-}" = --appliance ]; then
    shift
    run_appliance "$@"
elif [ $# -gt 0 ]; then
    run_unit "$@"
else
    start_beside
    run_appliance
    wait
    judge "$(cat "$beside_status")"
    if [ $fresh_ran = yes ]; then run_as_root; else run_unit -m "not slow"; fi
fi

if [ -s "$MRCORE_NOT_RUN" ]; then
    echo "NOT RUN:" >&2
    sort -u "$MRCORE_NOT_RUN" | sed 's/^/  /' >&2
fi
if [ $failed = yes ]; then exit 1; fi
if [ -s "$MRCORE_NOT_RUN" ]; then
    if [ "${CI:-}" = true ]; then exit 1; fi
    exit 3
fi
