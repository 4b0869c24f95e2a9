#!/bin/bash
# Gathers what tells how this machine has fared into one archive, and prints its path. No keys: they are not looked at,
# and a file that holds one nevertheless (a log of a user's function, say) is left out and named.
#
#   collect.sh COMPUTE_DIR
#
# Everything is bounded: the last MOST bytes of each of FILES files, LIMIT seconds for each command.
set -u
umask 077
compute_dir=$1
MOST=4194304
LIMIT=30
FILES=500 # of logs
export LC_ALL=C PATH=/usr/sbin:/usr/bin:/sbin:/bin

for old in /var/tmp/mrcore-collect.*; do # of a call that was interrupted
    case $old in *'*') ;; *) find "$old" -maxdepth 0 -mmin +60 -exec rm -rf {} + ;; esac
done
out=$(mktemp -d /var/tmp/mrcore-collect.XXXXXX) || exit 1
mkdir "$out/logs"

say() { # say FILE COMMAND…: what a command prints, with its errors
    file=$out/$1
    shift
    { echo "\$ $*"; timeout "$LIMIT" "$@" 2>&1 || echo "(exit status $?)"; } | tail -c "$MOST" >>"$file"
}

mrcore() { # as the program's own account
    say mrcore.txt runuser -u mrcore -- /opt/mrcore/current/bin/mrcore "$@"
}

say system.txt uname -a
say system.txt cat /etc/os-release
say system.txt date --iso-8601=seconds
say system.txt timedatectl
say system.txt uptime
say system.txt free -m
say system.txt df -h
say system.txt df -i
say system.txt ps -eo user,pid,ppid,stat,rss,etimes,comm --sort=-rss # no arguments: of other programs they may be secret
say system.txt ps -u mrcore -o pid,ppid,etimes,args --width 300
say network.txt ip address
say network.txt ss -lntp
say network.txt nft list table inet mrcore
say units.txt systemctl list-units --all --no-pager 'mrcore*'
say units.txt systemctl list-timers --all --no-pager 'mrcore*'
say units.txt systemctl status --no-pager --lines=0 'mrcore*'
say units.txt systemctl list-units --failed --no-pager
say journal.txt journalctl --no-pager --lines 20000 --unit 'mrcore*'
say versions.txt ls -l /opt/mrcore /opt/mrcore/releases
say versions.txt /opt/mrcore/current/bin/python -P -m pip list --disable-pip-version-check
say versions.txt screen --version
say settings.txt ls -lR /etc/mrcore
for file in /etc/mrcore/*.yml /etc/mrcore/*.json /etc/mrcore/daemons/*.json /etc/mrcore/nftables.conf \
    /etc/systemd/system/mrcore*; do
    if [ -f "$file" ]; then say settings.txt cat "$file"; fi
done
if [ -f /etc/mrcore/cluster.yml ]; then # the master
    mrcore settings
    mrcore cluster status
    mrcore queue
    mrcore history
    mrcore doctor
fi
as_owner() { # of the logs, who could put anything into their folders: root would follow a link to what is not his
    timeout "$LIMIT" runuser -u mrcore -- "$@"
}

for folder in "$compute_dir/logs" /var/log/mrcore; do
    [ -d "$folder" ] || continue
    as_owner find "$folder" -xdev -type f -mtime -14 -print0 | head -z -n "$FILES" | while IFS= read -r -d '' file; do
        copy=$out/logs$file
        mkdir -p "$(dirname "$copy")"
        case $file in
        *.gz) as_owner gzip -dc -- "$file" 2>/dev/null | tail -c "$MOST" >"${copy%.gz}" ;;
        *) as_owner tail -c "$MOST" -- "$file" >"$copy" ;;
        esac
    done
done

leave_out() { # leave_out WHAT OPTION…: files in which grep finds it
    grep -rlaF "${@:2}" "$out" | while IFS= read -r file; do
        rm -f "$file"
        echo "${file#"$out"/}: left out, it holds $1" >>"$out/left-out.txt"
    done
}
leave_out 'a private key' -e 'PRIVATE KEY'
# Not as an argument, which all accounts see; an empty pattern would be found everywhere.
leave_out "the dashboard's token" -f <(as_owner head -n 1 /var/lib/mrcore/state/dashboard.token 2>/dev/null | grep .)
mkdir "$out/archive" # inside: nobody else may put a file of that name there first
tar -C "$out" --exclude=./archive -czf "$out/archive/logs.tar.gz" . || exit 1
echo "$out/archive/logs.tar.gz"
