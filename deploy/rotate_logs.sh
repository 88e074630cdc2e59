#!/usr/bin/env bash
# Bounds the logs in each FOLDER: one that has grown large is copied, compressed and emptied; old ones go.
#
#   deploy/rotate_logs.sh FOLDER ...
#
# A log is emptied in place, since whoever writes it keeps it open for as long as it runs, which may be months: after a
# renaming, as by newsyslog, all that follows would go to the renamed file and be lost with it. launchd and pomarium
# open their logs for appending, so they go on at the new end. What is written between copy and emptying is lost.
set -euo pipefail

readonly most_bytes=${POMARIUM_LOG_BYTES:-10485760} # of one log; 10 MiB
readonly kept=5                                     # compressed copies of it
readonly days=30                                    # until copies, and logs of commands that have ended, are deleted

shift_copies() { # LOG: LOG.1.gz becomes LOG.2.gz, and so on
    local number=$kept
    while [ "$number" -gt 1 ]; do
        [ ! -e "$1.$((number - 1)).gz" ] || mv -f "$1.$((number - 1)).gz" "$1.$number.gz"
        number=$((number - 1))
    done
}

rotate() { # LOG
    [ "$(wc -c <"$1")" -gt "$most_bytes" ] || return 0
    shift_copies "$1"
    gzip -c "$1" >"$1.1.gz"
    : >"$1"
}

is_latest() { # LOG named COMMAND-DATE-TIME-PROCESS.log: of its command, which may still be running
    local name=${1##*/}
    set -- "${1%/*}/${name%%-[0-9]*}"-[0-9]*.log "$1"
    while [ $# -gt 2 ]; do shift; done
    [ "$1" = "$2" ]
}

delete_old() { # FOLDER
    local log
    find "$1" -maxdepth 1 -type f -name '*.log.*.gz' -mtime "+$days" -delete
    for log in "$1"/*-[0-9]*.log; do
        if [ -f "$log" ] && [ -n "$(find "$log" -mtime "+$days")" ] && ! is_latest "$log"; then
            rm -f "$log"
        fi
    done
}

for folder; do
    [ -d "$folder" ] || continue
    for log in "$folder"/*.log; do
        [ ! -f "$log" ] || rotate "$log"
    done
    delete_old "$folder"
done
