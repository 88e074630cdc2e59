#!/usr/bin/env bash
# Installs Pomarium on a Mac, with launchd jobs that start when it boots. May be repeated: what is as asked stays.
#
#   deploy/install.sh --head RACK.YAML [--serve] [options] [-- ARGUMENT ...]
#   deploy/install.sh --worker HEAD [options] [-- ARGUMENT ...]
#   deploy/install.sh --uninstall [--dry-run]
#
#   --head RACK.YAML   the head of the rack that the file describes; --serve: and the endpoint, of the file's models
#   --worker HEAD      a Mac of the rack whose head has this address
#   --user             jobs that need no root, and start when this user logs in
#   --address IP       of this Mac in the rack, where the route does not tell
#   --prefix DIR       copy Pomarium to DIR and install it there; else it is installed where it is
#   --power-settings   set what is otherwise only said: wake over the network, no Power Nap, start after a power cut
#   --local-network NETWORK
#                      let every program of this Mac reach the rack's network, such as 10.0.5.0/24, without the permission
#                      that macOS 15 asks for; macOS 15.5 or newer, takes effect when the Mac restarts
#   --uninstall        end and remove the jobs, and the right to put this Mac to sleep; nothing else
#   --dry-run          say each step, change nothing
#   -- ARGUMENT ...    more for `pomarium serve` with --serve, else for `pomarium rack up` or `rack join`
#
# Written for bash 3.2, which macOS has. Not run on a Mac yet. DESTDIR is put in front of /Library and /etc, for tests.
set -euo pipefail

fail() {
    printf 'install.sh: %s\n' "$*" >&2
    exit 1
}

say() { printf '%s\n' "$*"; }

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
readonly here
# shellcheck disable=SC1091
. "$here/deploy/prerequisites.sh"
readonly daemons="${DESTDIR:-}/Library/LaunchDaemons" agents="$HOME/Library/LaunchAgents"
readonly logs="$HOME/Library/Logs/Pomarium"
readonly key_file="${XDG_CONFIG_HOME:-$HOME/.config}/pomarium/rack.key"
readonly parts="cluster worker kernels proto requirements src deploy docs Makefile pyproject.toml README.md LICENSE"
readonly power=(pmset -a womp 1 powernap 0 autorestart 1)
# sudo reads no file there that has a dot in its name. The name says what the file holds, which only root may read.
readonly sudoers="${DESTDIR:-}/etc/sudoers.d"
readonly privacy=com.apple.network.local-network
readonly stop_s=90 # a job is killed 60 s after it was told to end

role='' rack='' head='' serve='' user='' address='' prefix=$here power_settings='' dry='' uninstall='' network=''
arguments=() changed='' told_of_root='' domain=system folder=$daemons rendered='' python=''

usage() { sed -n '2,/^# Written/p' "${BASH_SOURCE[0]}" | sed -e '$d' -e 's/^# \{0,1\}//'; }

take_role() { # ROLE
    [ -z "$role" ] || [ "$role" = "$1" ] || fail "a Mac is the head or a worker of a rack: give --head or --worker."
    role=$1
}

take_value() { # OPTION VALUE ...
    [ $# -gt 1 ] && [ -n "$2" ] || fail "$1 needs a value: see --help."
}

parse() {
    while [ $# -gt 0 ]; do
        case "$1" in
            --head) take_value "$@" && take_role head && rack=$2 && shift ;;
            --worker) take_value "$@" && take_role worker && head=$2 && shift ;;
            --address) take_value "$@" && address=$2 && shift ;;
            --prefix) take_value "$@" && prefix=$2 && shift ;;
            --serve) serve=1 ;;
            --user) user=1 ;;
            --power-settings) power_settings=1 ;;
            --local-network) take_value "$@" && network=$2 && shift ;;
            --uninstall) uninstall=1 ;;
            --dry-run) dry=1 ;;
            --help) usage && exit 0 ;;
            --) shift && arguments=("$@") && break ;;
            *) fail "unknown argument $1: see --help." ;;
        esac
        shift
    done
    [ -z "$user" ] || { domain="gui/$(id -u)" && folder=$agents; }
}

check_arguments() {
    if [ -n "$uninstall" ]; then
        [ -z "$role$serve$power_settings$network" ] || fail "--uninstall removes all jobs: leave the other options out."
        return
    fi
    [ -n "$role" ] || fail "say what this Mac is to be: --head RACK.YAML or --worker HEAD; see --help."
    [ -z "$serve" ] || [ "$role" = head ] || fail "--serve goes with --head: the endpoint runs on the rack's head."
    [[ -z "$network" || "$network" =~ ^([0-9]{1,3}\.){3}[0-9]{1,3}/[0-9]{1,2}$ ]] ||
        fail "--local-network $network is no network: give one such as 10.0.5.0/24."
    if [ "$role" = head ]; then
        [ -f "$rack" ] || fail "there is no rack file $rack: write one after deploy/rack.example.yaml."
        rack=$(absolute "$rack")
    fi
}

absolute() { # PATH, of which the folder exists
    local folder
    folder=$(cd "$(dirname "$1")" && pwd -P)
    printf '%s/%s' "${folder%/}" "$(basename "$1")"
}

check_machine() {
    [ "$(uname -s)" = Darwin ] ||
        fail "this is $(uname -s), and launchd is macOS's: use \`pomarium rack up\` and \`join\` here."
    check_macos
    case "${network:+$(sw_vers -productVersion)}" in
        15 | 15.[0-4] | 15.[0-4].*)
            fail "--local-network needs macOS 15.5, and this is $(sw_vers -productVersion): update this Mac."
            ;;
    esac
    [ "$(id -u)" -ne 0 ] ||
        fail "run it as the user that Pomarium is to run as, without sudo: it asks for root where it needs it."
}

check_place() { # WHAT PATH
    case "$2" in
        "$HOME"/Documents/* | "$HOME"/Desktop/* | "$HOME"/Downloads/*)
            fail "$1 is in $2, which macOS keeps from jobs: move it elsewhere in your home folder."
            ;;
    esac
}

run() { # COMMAND ...
    changed=1
    if [ -n "$dry" ]; then
        say "would run: $*"
    else
        "$@"
    fi
}

tell_of_root() {
    if [ -z "$told_of_root" ]; then
        told_of_root=1
        say "Root is needed now, for what this Mac keeps for all of its users; sudo may ask for your password."
    fi
}

as_root() { # COMMAND ...
    tell_of_root
    run sudo "$@"
}

in_domain() { # DOMAIN COMMAND ...: as whoever may change it
    local of=$1
    shift
    case "$of" in
        system) as_root "$@" ;;
        *) run "$@" ;;
    esac
}

is_loaded() { launchctl print "$1/$2" >/dev/null 2>&1; } # DOMAIN LABEL

unload() { # DOMAIN LABEL
    is_loaded "$1" "$2" || return 0
    say "$2: ending it"
    in_domain "$1" launchctl bootout "$1/$2" || true # it may be ending already
    [ -z "$dry" ] || return 0
    local waited=0
    while is_loaded "$1" "$2"; do
        [ "$waited" -lt "$stop_s" ] || fail "$2 does not end: look at $logs, restart this Mac and run this again."
        sleep 1
        waited=$((waited + 1))
    done
}

load() { # LABEL
    say "$1: starting it"
    in_domain "$domain" launchctl enable "$domain/$1"
    in_domain "$domain" launchctl bootstrap "$domain" "$folder/$1.plist" || {
        [ "$domain" = system ] ||
            fail "launchd did not take $1: a user's jobs need that user to be logged in at the screen; without --user" \
                "they do not."
        fail "launchd did not take $1: its reason is above."
    }
}

put() { # LABEL
    say "$1: writing $folder/$1.plist"
    case "$domain" in
        system) as_root install -o root -g wheel -m 644 "$rendered/$1.plist" "$folder/$1.plist" ;;
        *)
            run mkdir -p "$folder"
            run install -m 644 "$rendered/$1.plist" "$folder/$1.plist"
            ;;
    esac
}

remove() { # DOMAIN FOLDER LABEL
    unload "$1" "$3"
    [ -e "$2/$3.plist" ] || return 0
    say "$3: removing $2/$3.plist"
    in_domain "$1" rm -f "$2/$3.plist"
}

remove_all_but() { # LABEL ..., of the chosen domain
    local label
    for label in serve head worker logs; do # the endpoint first, for it needs the head
        label=org.pomarium.$label
        case "$domain $* " in
            system*" $label "*) remove "gui/$(id -u)" "$agents" "$label" ;;
            gui*" $label "*) remove system "$daemons" "$label" ;;
            *)
                remove "gui/$(id -u)" "$agents" "$label"
                remove system "$daemons" "$label"
                ;;
        esac
    done
}

sources() { # PREFIX: a checksum of the code that runs
    (cd "$1" && find cluster worker kernels proto requirements pyproject.toml -type f \
        ! -path '*/__pycache__/*' ! -name '*.egg-info' | LC_ALL=C sort | tr '\n' '\0' | xargs -0 cksum | cksum)
}

is_current_copy() { # PART
    diff -rq -x __pycache__ -x '*.egg-info' "$here/$1" "$prefix/$1" >/dev/null 2>&1
}

stop_jobs() {
    local label
    for label in serve head worker; do unload "$domain" "org.pomarium.$label"; done
}

copy() {
    local part
    [ "$prefix" != "$here" ] || return 0
    for part in $parts; do
        is_current_copy "$part" && continue
        # What runs from there would read the new code beside the old that it has in memory.
        [ ! -e "$prefix/$part" ] || stop_jobs
        say "copying $part to $prefix"
        run rm -rf "${prefix:?}/$part"
        run cp -R "$here/$part" "$prefix/$part"
    done
}

choose_prefix() {
    case "$prefix" in
        /*) ;;
        *) prefix=$PWD/$prefix ;;
    esac
    check_place Pomarium "$prefix"
    [ -d "$prefix" ] || run mkdir -p "$prefix"
    [ ! -d "$prefix" ] || prefix=$(cd "$prefix" && pwd -P)
}

set_up() {
    if [ -n "$dry" ]; then
        say "would run: $prefix/deploy/setup.sh"
    else
        "$prefix/deploy/setup.sh" || fail "set-up did not succeed: see above; nothing of launchd was changed."
    fi
}

check_rack() {
    [ -n "$rack" ] || return 0
    check_place "the rack file" "$rack"
    if [ -x "$prefix/.venv/bin/pomarium" ]; then
        "$prefix/.venv/bin/pomarium" rack check "$rack" || fail "the rack file has faults: see above."
    fi
}

store_key() { # a worker has nobody to ask for the key
    [ "$role" = worker ] || return 0
    if [ -n "${POMARIUM_RACK_KEY:-}" ] && [ "$POMARIUM_RACK_KEY" != "$(cat "$key_file" 2>/dev/null || true)" ]; then
        say "writing the rack's key to $key_file"
        changed=1
        [ -n "$dry" ] || (umask 077 && mkdir -p "${key_file%/*}" && printf '%s\n' "$POMARIUM_RACK_KEY" >"$key_file")
    elif [ ! -s "$key_file" ]; then
        fail "this Mac does not know the rack's key: copy $key_file from the head, or set POMARIUM_RACK_KEY to what it" \
            "holds, and run this again."
    fi
}

render() { # LABEL [ARGUMENT ...]
    local label=$1 account=''
    shift
    [ -n "$user" ] || account=$(id -un)
    "$python" "$here/deploy/launchd/render.py" "$here/deploy/launchd/$label.plist" \
        "USER_NAME=$account" "HOME=$HOME" "PREFIX=$prefix" "LOGS=$logs" "RACK=$rack" "HEAD=$head" \
        "INSTALLED=$installed" -- "$@" >"$rendered/$label.plist"
    plutil -lint -s "$rendered/$label.plist" || fail "the job $label is no property list: this is a fault of Pomarium."
}

render_all() { # the jobs asked for, in the order of their start
    local installed at more
    at=() more=(${arguments[@]+"${arguments[@]}"})
    installed="$(sources "$here"), $(if [ -n "$rack" ]; then cksum <"$rack"; fi)"
    [ -z "$address" ] || at=(--address "$address")
    render org.pomarium.logs
    if [ -n "$serve" ]; then
        render org.pomarium.head ${at[@]+"${at[@]}"}
        render org.pomarium.serve ${more[@]+"${more[@]}"}
        labels="org.pomarium.logs org.pomarium.head org.pomarium.serve"
    else
        render "org.pomarium.$role" ${at[@]+"${at[@]}"} ${more[@]+"${more[@]}"}
        labels="org.pomarium.logs org.pomarium.$role"
    fi
}

is_as_asked() { # LABEL
    cmp -s "$rendered/$1.plist" "$folder/$1.plist" && is_loaded "$domain" "$1"
}

install_jobs() {
    local label stale='' backwards=''
    for label in $labels; do
        if is_as_asked "$label"; then
            say "$label: as asked"
        else
            stale="$stale $label" backwards="$label $backwards"
        fi
    done
    for label in $backwards; do unload "$domain" "$label"; done # the endpoint before the head that it needs
    for label in $stale; do
        cmp -s "$rendered/$label.plist" "$folder/$label.plist" || put "$label"
        load "$label"
    done
}

sleep_right() { printf '%s/pomarium-sleep-%s' "$sudoers" "$(id -u)"; }

allow_sleep() { # pmset lets root and who sits at the screen put a Mac to sleep, and the worker's job is neither
    local file
    file=$(sleep_right)
    if [ "$role" != worker ] || [ -n "$user" ]; then
        take_sleep_right
        return
    fi
    [ ! -e "$file" ] || return 0
    printf '%s ALL=(root) NOPASSWD: /usr/bin/pmset sleepnow\n' "$(id -un)" >"$rendered/sudoers"
    visudo -c -q -f "$rendered/sudoers" ||
        fail "sudo does not take the line that lets $(id -un) run \`pmset sleepnow\`: $(cat "$rendered/sudoers")"
    say "$file: letting $(id -un) run \`sudo pmset sleepnow\`, and nothing else, without a password"
    [ -d "$sudoers" ] || as_root mkdir -p "$sudoers"
    as_root install -o root -g wheel -m 440 "$rendered/sudoers" "$file"
}

take_sleep_right() {
    [ -e "$(sleep_right)" ] || return 0
    say "$(sleep_right): removing it"
    as_root rm -f "$(sleep_right)"
}

allow_network() { # Apple, TN3179: addresses of these networks count as local for no program
    local key there
    [ -n "$network" ] || return 0
    [ -n "$dry" ] || tell_of_root
    for key in AllowedEthernetLocalNetworkAddresses AllowedWiFiLocalNetworkAddresses; do
        there=''
        [ -n "$dry" ] || there=$(sudo defaults read "$privacy" "$key" 2>/dev/null) || there=''
        case "$there" in
            *"\"$network\""*) say "$key: has $network" ;;
            *)
                as_root defaults write "$privacy" "$key" -array-add "$network"
                restart=1
                ;;
        esac
    done
    [ -z "$restart" ] || say "Restart this Mac: until then macOS may keep Pomarium off $network."
}

set_power() {
    if [ -n "$power_settings" ]; then
        as_root "${power[@]}"
    else
        say "To let this Mac be woken over the network and start after a power cut: sudo ${power[*]}"
    fi
}

main() {
    parse "$@"
    check_arguments
    check_machine
    if [ -n "$uninstall" ]; then
        remove_all_but
        take_sleep_right
        [ -n "$changed" ] || say "there were no jobs of Pomarium's here"
        say "Kept: Pomarium itself, the rack's key ($key_file), batches and logs (~/.local/state/pomarium, $logs)."
        return
    fi
    python=$(find_python)
    choose_prefix
    store_key
    copy
    set_up
    check_rack
    rendered=$(mktemp -d)
    trap 'rm -rf "$rendered"' EXIT
    render_all
    [ -d "$logs" ] || run mkdir -p "$logs"
    # shellcheck disable=SC2086 # labels are words
    remove_all_but $labels
    allow_sleep
    install_jobs
    allow_network
    [ -n "$changed" ] || say "nothing was changed: all is as asked"
    set_power
    [ -n "$dry" ] || say "Logs: $logs. State: $prefix/.venv/bin/pomarium rack status"
}

labels='' restart=''
main "$@"
