# shellcheck shell=bash
# What set-up and install.sh ask of a machine, for both to ask the same. To be sourced by bash 3.2 (macOS) and up, after
# `fail` was defined, which ends the script with one sentence.

readonly oldest_macos=15
readonly pythons="a Python 3.11 to 3.14"
readonly get_python="\`brew install python@3.13\`, \`uv python install 3.13\` or python.org's installer"

check_macos() { # of whoever asks on Darwin
    local version
    if [ "$(uname -m)" != arm64 ]; then
        [ "$(sysctl -n sysctl.proc_translated 2>/dev/null)" != 1 ] ||
            fail "this terminal runs under Rosetta, as x86-64: open a native one (Finder, Get Info, without 'Open using" \
                "Rosetta') and run this again."
        fail "this Mac is no Apple silicon ($(uname -m)), which MLX needs."
    fi
    version=$(sw_vers -productVersion)
    [ "${version%%.*}" -ge "$oldest_macos" ] ||
        fail "macOS $version is too old: update this Mac to macOS $oldest_macos or newer."
}

# On a Mac without Xcode's command-line tools these are there all the same, and open a window that offers to install them.
is_apples_stub() { # COMMAND
    [ "$(uname -s)" = Darwin ] || return 1
    case "$(command -v "$1")" in
        /usr/bin/*) ! xcode-select -p >/dev/null 2>&1 ;;
        *) return 1 ;;
    esac
}

is_recent_python() { # COMMAND; a free-threaded one has no wheels of what we need
    ! is_apples_stub "$1" && "$1" -c 'import sys, sysconfig
sys.exit(not (3, 11) <= sys.version_info < (3, 15) or bool(sysconfig.get_config_var("Py_GIL_DISABLED")))' >/dev/null 2>&1
}

is_native_python() { # COMMAND: on Apple silicon one for x86-64 runs, too, under Rosetta, and has no wheels of MLX
    [ "$(uname -s)" != Darwin ] || [ "$("$1" -c 'import platform; print(platform.machine())' 2>/dev/null)" = arm64 ]
}

find_python() { # prints the command's path
    local candidate translated=''
    if [ -n "${PYTHON:-}" ]; then
        command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON is not a command: name $pythons."
        is_recent_python "$PYTHON" || fail "PYTHON=$PYTHON is not $pythons: name one that is."
        is_native_python "$PYTHON" ||
            fail "PYTHON=$PYTHON is a Python for x86-64, which runs under Rosetta: name one for arm64 ($get_python)."
        command -v "$PYTHON"
        return
    fi
    for candidate in python3 python3.11 python3.12 python3.13 python3.14; do
        command -v "$candidate" >/dev/null || continue
        is_recent_python "$candidate" || continue
        if is_native_python "$candidate"; then
            command -v "$candidate"
            return
        fi
        translated=$(command -v "$candidate")
    done
    [ -z "$translated" ] ||
        fail "$translated is a Python for x86-64, which runs under Rosetta: get one for arm64 ($get_python)."
    [ "$(uname -s)" = Darwin ] || fail "no Python 3.11 to 3.14 was found on PATH: install one, or name it with" \
        "PYTHON=/path/to/python3."
    fail "no Python 3.11 to 3.14 was found on PATH (macOS brings 3.9): $get_python; then, if it is not on PATH, name it:" \
        "PYTHON=/path/to/python3, with uv PYTHON=\"\$(uv python find 3.13)\"."
}

check_build_tools() { # for vLLM's CPU backend on a Mac: clang++ builds it, git fetches oneDNN, cmake and ninja come by pip
    local tool
    xcode-select -p >/dev/null 2>&1 ||
        fail "Xcode's command-line tools are missing, and vLLM's CPU backend is built with them: run" \
            "'xcode-select --install' and then this again."
    for tool in git clang++; do
        "$tool" --version >/dev/null 2>&1 || fail "$tool does not run, and vLLM's CPU backend is built with it: run" \
            "'xcode-select --install' and then this again."
    done
}
