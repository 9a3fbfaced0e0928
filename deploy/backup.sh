#!/usr/bin/env bash
# A copy of a server's data folder (journal, node key, uploaded files, stored responses) that stands by itself, made while the
# server runs or not:
#
#   backup.sh /var/lib/gptoss /backups/gptoss-2026-05-01
#
# Sealed segments never change, so they are copied as they are. The open one may be caught in the middle of a write: that
# tail is cut from the copy, as the server would cut it after a crash. GPTOSS is the command to check with.
set -euo pipefail

if [[ $# -ne 2 ]]; then
    echo "usage: backup.sh DATA_DIR TARGET_DIR" >&2
    exit 2
fi
data=$1
target=$2
gptoss=${GPTOSS:-gptoss}

if [[ ! -d "$data/journal" ]]; then
    echo "backup.sh: $data holds no journal" >&2
    exit 2
fi
if [[ -e "$target" ]]; then
    echo "backup.sh: $target is there already" >&2
    exit 2
fi

umask 077
scratch="$target.part"
trap 'rm -rf "$scratch"' EXIT

parts=("$data/journal")
for part in "$data/node.key" "$data/files"; do
    if [[ -e "$part" ]]; then parts+=("$part"); fi
done

# Retention may unlink a segment, or a client a file, between the listing and the copy; then the next listing is without it.
for attempt in 1 2 3; do
    rm -rf "$scratch"
    mkdir -p "$scratch"
    if cp -a --reflink=auto "${parts[@]}" "$scratch/"; then
        break
    elif [[ $attempt -eq 3 ]]; then
        echo "backup.sh: $data could not be copied" >&2
        exit 1
    fi
done
# A database is copied through itself, or the copy might hold half of a change.
copy_database() {
    rm -f "$2" "$2"-*
    python3 -c 'import sqlite3, sys; sqlite3.connect(sys.argv[1]).backup(sqlite3.connect(sys.argv[2]))' "$1" "$2"
}
if [[ -e "$data/responses.sqlite" ]]; then copy_database "$data/responses.sqlite" "$scratch/responses.sqlite"; fi
for index in "$scratch"/journal/index-*.sqlite3; do
    # Made again from the segments where it is missing.
    if [[ -e "$index" ]] && ! copy_database "$data/journal/${index##*/}" "$index"; then rm -f "$index" "$index"-*; fi
done

if ! "$gptoss" journal verify --data-dir "$scratch"; then
    "$gptoss" journal repair --data-dir "$scratch"
    rm -rf "$scratch"/journal.backup-*
fi
"$gptoss" journal verify --data-dir "$scratch" >/dev/null
mv "$scratch" "$target"
echo "wrote $target"
