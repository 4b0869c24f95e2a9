#!/bin/sh
# Makes one archive of those that came from the machines, proves that it holds no private key, and says what it holds.
#
#   put_together.sh FOLDER ARCHIVE HOST…     FOLDER has HOST.tar.gz of each host that answered; it is removed
set -eu
umask 077
folder=$1
archive=$2
shift 2
name=$(basename "$archive" .tar.gz)
trap 'rm -rf "$folder"' EXIT
mkdir "$folder/$name"
came=
missing=
for host in "$@"; do
    mkdir "$folder/$name/$host"
    if [ -f "$folder/$host.tar.gz" ]; then
        tar -C "$folder/$name/$host" --no-same-owner -xzf "$folder/$host.tar.gz"
        came="$came $host"
    else
        echo "did not answer when the logs were collected" >"$folder/$name/$host/missing.txt"
        missing="$missing $host"
    fi
done
if held=$(grep -rlaF 'PRIVATE KEY' "$folder/$name"); then
    echo "no archive was made, a private key is in: $held" >&2
    exit 1
fi
mkdir -p "$(dirname "$archive")"
tar -C "$folder" -czf "$archive.partial" "$name"
mv "$archive.partial" "$archive"
echo "$archive: $(find "$folder/$name" -type f | wc -l) files of$came"
echo "no private key is in it"
if [ -n "$missing" ]; then echo "not in it, they did not answer:$missing"; fi
