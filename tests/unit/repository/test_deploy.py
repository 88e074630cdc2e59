"""What `deploy/install.sh` does to a Mac, on any system: with stand-ins for macOS's commands, which record their calls.

Everything else is real: the script, Python, the rendered property lists, the file system below a temporary folder.
"""

import os
import plistlib
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pomarium.cluster.autoscaling import sleep

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"

COMMANDS = {
    "uname": 'case "$1" in -s) echo "${SYSTEM:-Darwin}" ;; *) echo "${MACHINE:-arm64}" ;; esac',
    "sw_vers": 'echo "${MACOS:-15.6.1}"',
    "id": 'case "$1" in -u) echo "${ID:-501}" ;; *) echo ann ;; esac',
    "plutil": 'exec "$REAL_PYTHON" -c "import plistlib, sys; plistlib.load(open(sys.argv[1], \'rb\'))" "${@: -1}"',
    "pmset": "",
    "sudo": '"$@"',
    # Of what sudoers(5) takes, the one form that is written here.
    "visudo": """
[ "$1 $2 $3" = '-c -q -f' ] && [ "$(wc -l <"$4")" -eq 1 ] &&
    grep -Eq '^[a-z][a-z0-9._-]* ALL=\\(root\\) NOPASSWD: (/[a-z]+)+ sleepnow$' "$4" && [ -z "$NO_SUDOERS" ]""",
    # Keeps an array as macOS prints it.
    "defaults": """
file=$LOADED/../$2.$3
case "$1" in
    read) [ -e "$file" ] || exit 1; echo '('; cat "$file"; echo ')' ;;
    write) printf '    "%s"\n' "$5" >>"$file" ;;
esac""",
    # There is no group `wheel` here, and the files cannot be root's.
    "install": 'while [ $# -gt 2 ]; do case "$1" in -o | -g | -m) shift 2 ;; *) break ;; esac; done; cp "$1" "$2"',
    # Keeps what is loaded as files DOMAIN/LABEL; a job that was told to end is gone after $SLOW more looks.
    "launchctl": """
mkdir -p "$LOADED"
case "$1" in
    print)
        file=$LOADED/${2//\\//,}
        if [ -e "$file.ending" ]; then
            left=$(cat "$file.ending")
            if [ "$left" -le 0 ]; then rm "$file" "$file.ending"; else echo $((left - 1)) >"$file.ending"; fi
        fi
        [ -e "$file" ] || { cat "$ABSENT" >&2; exit 113; } ;;
    bootstrap)
        [ -z "$REFUSED" ] || { echo 'Bootstrap failed: 125: Domain does not support specified action' >&2; exit 125; }
        label=${3##*/}
        file=$LOADED/${2//\\//,},${label%.plist}
        [ ! -e "$file" ] || { echo 'Bootstrap failed: 5: Input/output error' >&2; exit 5; }
        cp "$3" "$file" ;;
    bootout) echo "${SLOW:-0}" >"$LOADED/${2//\\//,}.ending" ;;
esac""",
}
# The real one, but for what it says of its architecture.
PYTHON = """#!/bin/bash
case "$*" in *platform.machine*) echo "${PYTHON_MACHINE:-arm64}" ;; *) exec "$REAL_PYTHON" "$@" ;; esac
"""
SETUP = """#!/bin/bash
cd "$(dirname "$0")/.." && [ -e .venv/bin/pomarium ] && exit
echo setting up
mkdir -p .venv/bin
printf '#!/bin/sh\\n%s\\n' "${POMARIUM:-true}" >.venv/bin/pomarium
chmod +x .venv/bin/pomarium
"""


@dataclass
class Mac:
    """A home folder, a /Library, commands, and a copy of the checkout with a quick stand-in for set-up."""

    folder: Path

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def checkout(self) -> Path:
        return self.home / "pomarium"

    @property
    def rack(self) -> Path:
        return self.home / "rack.yaml"

    @property
    def daemons(self) -> Path:
        return self.folder / "root/Library/LaunchDaemons"

    @property
    def agents(self) -> Path:
        return self.home / "Library/LaunchAgents"

    def install(self, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        (self.folder / "calls").write_text("")
        environ = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "HOME": str(self.home),
            "DESTDIR": str(self.folder / "root"),
            "CALLS": str(self.folder / "calls"),
            "LOADED": str(self.folder / "loaded"),
            "REAL_PYTHON": sys.executable,
            "ABSENT": str(ROOT / "tests/darwin/launchctl_print_absent.txt"),
            "PYTHON": str(self.folder / "python"),
            "REFUSED": "",
            "NO_SUDOERS": "",
        }
        return subprocess.run(
            ["bash", self.checkout / "deploy/install.sh", *arguments],
            env=environ | variables, cwd=self.home, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    def calls(self, command: str = "") -> list[str]:
        """Of the last run; without `print`, which only looks."""
        lines = (self.folder / "calls").read_text().splitlines()
        return [line for line in lines if line.startswith(command) and " print " not in line]

    def loaded(self) -> list[str]:
        """Jobs that launchd has, as DOMAIN/LABEL."""
        return sorted(path.name.replace(",", "/") for path in (self.folder / "loaded").glob("*"))

    def job(self, folder: Path, name: str) -> dict[str, Any]:
        found: dict[str, Any] = plistlib.loads((folder / f"org.pomarium.{name}.plist").read_bytes())
        return found

    def tree(self) -> dict[str, tuple[int, bytes]]:
        """Every file that an installation may touch: time and content."""
        return {
            str(path): (path.stat().st_mtime_ns, path.read_bytes())
            for path in self.folder.rglob("*")
            if path.is_file() and path != self.folder / "calls"
        }


@pytest.fixture
def mac(tmp_path: Path) -> Mac:
    mac = Mac(tmp_path)
    for layer in ("cluster", "worker", "kernels", "proto", "requirements", "docs"):
        (mac.checkout / layer).mkdir(parents=True)
        (mac.checkout / layer / "one.py").write_text("ONE = 1\n")
    shutil.copytree(ROOT / "src", mac.checkout / "src", symlinks=True)
    for file in ("Makefile", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, mac.checkout / file)
    shutil.copytree(DEPLOY, mac.checkout / "deploy")
    (mac.checkout / "deploy/setup.sh").write_text(SETUP)
    shutil.copy(DEPLOY / "rack.example.yaml", mac.rack)
    mac.daemons.mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    for name, body in COMMANDS.items():
        path = tmp_path / "bin" / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >>"$CALLS"\n{body}\n')
        path.chmod(0o755)
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    return mac


def done(result: "subprocess.CompletedProcess[str]") -> str:
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_a_head_with_its_endpoint(mac: Mac) -> None:
    said = done(mac.install("--head", "rack.yaml", "--serve", "--", "--host", "0.0.0.0"))
    assert mac.loaded() == ["system/org.pomarium.head", "system/org.pomarium.logs", "system/org.pomarium.serve"]
    head, serve = mac.job(mac.daemons, "head"), mac.job(mac.daemons, "serve")
    pomarium = str(mac.checkout / ".venv/bin/pomarium")
    assert head["ProgramArguments"][3:] == [pomarium, "rack", "up", "--rack", str(mac.rack), "--stay"]
    assert serve["ProgramArguments"][2:] == [pomarium, "serve", "--rack", str(mac.rack), "--host", "0.0.0.0"]
    assert head["UserName"] == serve["UserName"] == "ann"
    assert head["EnvironmentVariables"]["HOME"] == str(mac.home)
    assert Path(head["StandardOutPath"]).parent.is_dir()
    started = [line.split()[-1] for line in mac.calls("launchctl bootstrap")]
    assert [Path(path).stem.split(".")[-1] for path in started] == ["logs", "head", "serve"]
    assert "pmset" not in "".join(mac.calls("sudo"))
    assert "sudo pmset -a womp 1 powernap 0 autorestart 1" in said


def test_root_is_announced_and_used_for_launchd_and_sleep_alone(mac: Mac) -> None:
    said = done(mac.install("--worker", "10.0.0.11", "--address", "10.0.5.2", POMARIUM_RACK_KEY="k"))
    assert said.index("Root is needed now") < said.index("starting it")
    assert said.count("Root is needed now") == 1
    assert {line.split()[1] for line in mac.calls("sudo")} == {"install", "launchctl", "mkdir"}
    words = mac.job(mac.daemons, "worker")["ProgramArguments"]
    assert words[4:] == ["rack", "join", "10.0.0.11", "--stay", "--address", "10.0.5.2"]


HEAD = ("--head", "rack.yaml", "--serve")


@pytest.mark.parametrize("arguments", [HEAD, ("--worker", "head.local", "--user"), (*HEAD, "--prefix", "there")])
def test_a_second_run_changes_nothing_and_says_so(mac: Mac, arguments: tuple[str, ...]) -> None:
    done(mac.install(*arguments, POMARIUM_RACK_KEY="k"))
    before = mac.tree()
    said = done(mac.install(*arguments, POMARIUM_RACK_KEY="k"))
    assert "nothing was changed" in said
    assert mac.tree() == before
    assert mac.calls("sudo") == []
    assert mac.calls("launchctl") == []


def test_changed_settings_reload_the_jobs_that_they_concern(mac: Mac) -> None:
    done(mac.install(*HEAD))
    mac.rack.write_text(mac.rack.read_text() + "# more\n")
    said = done(mac.install(*HEAD))
    assert "org.pomarium.logs: as asked" in said
    ended = [line.split(".")[-1] for line in mac.calls("launchctl bootout")]
    started = [line.split(".")[-2] for line in mac.calls("launchctl bootstrap")]
    assert (ended, started) == (["serve", "head"], ["head", "serve"]), "the endpoint needs the head"
    assert len(mac.loaded()) == 3
    done(mac.install(*HEAD, "--", "--port", "9000"))
    assert [line.split(".")[-1] for line in mac.calls("launchctl bootout")] == ["serve"]


def test_changed_code_reloads_the_jobs(mac: Mac) -> None:
    done(mac.install(*HEAD))
    (mac.checkout / "cluster/__pycache__").mkdir()
    (mac.checkout / "cluster/__pycache__/one.pyc").write_text("compiled")
    assert "nothing was changed" in done(mac.install(*HEAD))
    (mac.checkout / "worker/one.py").write_text("ONE = 2\n")
    done(mac.install(*HEAD))
    assert len(mac.calls("launchctl bootstrap")) == 2


def test_a_job_that_takes_its_time_to_end_is_waited_for(mac: Mac) -> None:
    done(mac.install(*HEAD))
    mac.rack.write_text(mac.rack.read_text() + "# more\n")
    done(mac.install(*HEAD, SLOW="2"))
    assert len(mac.loaded()) == 3


def test_jobs_of_a_user_need_no_root(mac: Mac) -> None:
    done(mac.install(*HEAD, "--user"))
    assert mac.calls("sudo") == []
    assert mac.loaded()[0] == "gui/501/org.pomarium.head"
    assert "UserName" not in mac.job(mac.agents, "head")
    assert list(mac.daemons.iterdir()) == []


def test_from_user_to_daemons_and_from_head_to_worker_nothing_of_the_old_stays(mac: Mac) -> None:
    done(mac.install(*HEAD, "--user"))
    done(mac.install(*HEAD))
    assert [name.split("/")[0] for name in mac.loaded()] == ["system"] * 3
    assert list(mac.agents.iterdir()) == []
    done(mac.install("--worker", "10.0.0.1", POMARIUM_RACK_KEY="k"))
    assert mac.loaded() == ["system/org.pomarium.logs", "system/org.pomarium.worker"]
    assert sorted(path.stem.split(".")[-1] for path in mac.daemons.iterdir()) == ["logs", "worker"]


@pytest.mark.parametrize("arguments", [HEAD, (*HEAD, "--prefix", "there"), ("--uninstall",)])
@pytest.mark.parametrize("installed", [False, True])
def test_a_dry_run_says_each_step_and_takes_none(mac: Mac, arguments: tuple[str, ...], installed: bool) -> None:
    if installed:
        done(mac.install("--head", "rack.yaml"))
    before = mac.tree()
    said = done(mac.install(*arguments, "--dry-run"))
    assert mac.tree() == before
    assert mac.calls("sudo") == []
    assert mac.calls("launchctl") == []
    if arguments == HEAD:
        assert f"would run: {mac.checkout}/deploy/setup.sh" in said
        assert "would run: sudo launchctl bootstrap system" in said
    elif installed:
        assert "would run:" in said


def test_uninstall_ends_and_removes_the_jobs_and_keeps_the_rest(mac: Mac) -> None:
    done(mac.install(*HEAD))
    before = {path for path in mac.tree() if "LaunchDaemons" not in path and "loaded" not in path}
    said = done(mac.install("--uninstall"))
    assert (mac.loaded(), list(mac.daemons.iterdir())) == ([], [])
    assert before == set(mac.tree())
    assert "Kept:" in said
    assert [line.split(".")[-1] for line in mac.calls("launchctl bootout")] == ["serve", "head", "logs"]
    assert "there were no jobs" in done(mac.install("--uninstall"))
    assert mac.calls("sudo") == []


def test_a_copy_elsewhere_is_what_runs_and_follows_its_source(mac: Mac) -> None:
    done(mac.install("--head", "rack.yaml", "--prefix", "there"))
    there = mac.home / "there"
    assert mac.job(mac.daemons, "head")["ProgramArguments"][3] == str(there / ".venv/bin/pomarium")
    (mac.checkout / "cluster/one.py").rename(mac.checkout / "cluster/two.py")
    done(mac.install("--head", "rack.yaml", "--prefix", "there"))
    assert [path.name for path in (there / "cluster").iterdir()] == ["two.py"]
    assert (there / "src/pomarium/cluster/two.py").resolve() == there / "cluster/two.py"
    assert "system/org.pomarium.head" in mac.loaded()
    calls = mac.calls()
    assert any("bootout" in line for line in calls), "it ran on while its code changed"


def test_the_key_of_a_worker_is_stored_for_its_owner_alone(mac: Mac) -> None:
    key = mac.home / ".config/pomarium/rack.key"
    refused = mac.install("--worker", "10.0.0.1")
    assert refused.returncode == 1
    assert "does not know the rack's key" in refused.stderr
    done(mac.install("--worker", "10.0.0.1", POMARIUM_RACK_KEY="secret"))
    assert (key.read_text(), key.stat().st_mode & 0o777) == ("secret\n", 0o600)
    assert "secret" not in (mac.daemons / "org.pomarium.worker.plist").read_text()
    done(mac.install("--worker", "10.0.0.1"))


def test_power_settings_are_set_when_asked_for(mac: Mac) -> None:
    done(mac.install("--head", "rack.yaml", "--power-settings"))
    assert "sudo pmset -a womp 1 powernap 0 autorestart 1" in mac.calls("sudo")


def sudoers(mac: Mac) -> Path:
    return mac.folder / "root/etc/sudoers.d/pomarium-sleep-501"


def test_a_worker_may_put_its_mac_to_sleep_and_nothing_else(mac: Mac) -> None:
    worker = ("--worker", "10.0.0.1")
    said = done(mac.install(*worker, POMARIUM_RACK_KEY="k"))
    assert sudoers(mac).read_text() == "ann ALL=(root) NOPASSWD: /usr/bin/pmset sleepnow\n"
    assert sleep.MAC_WAYS[0] == ("sudo", "-n", "/usr/bin/pmset", "sleepnow"), "sudo compares word for word"
    assert any(line.startswith("sudo install -o root -g wheel -m 440 ") for line in mac.calls("sudo"))
    assert said.index("letting ann run") < said.index("org.pomarium.worker: starting it")
    assert "nothing was changed" in done(mac.install(*worker))
    done(mac.install("--head", "rack.yaml"))
    assert not sudoers(mac).exists(), "the head does not sleep"
    done(mac.install(*worker))
    done(mac.install("--uninstall"))
    assert not sudoers(mac).exists()


def test_a_line_that_sudo_would_not_take_is_not_written(mac: Mac) -> None:
    refused = mac.install("--worker", "10.0.0.1", POMARIUM_RACK_KEY="k", NO_SUDOERS="1")
    assert refused.returncode == 1
    assert "sudo does not take the line" in refused.stderr
    assert not sudoers(mac).exists()
    assert mac.loaded() == []


def test_jobs_of_a_user_get_no_right_to_sleep_for_that_takes_root(mac: Mac) -> None:
    done(mac.install("--worker", "10.0.0.1", "--user", POMARIUM_RACK_KEY="k"))
    assert mac.calls("sudo") == []
    assert not sudoers(mac).exists()


def test_the_rack_s_network_is_exempt_when_asked_for_and_once(mac: Mac) -> None:
    keys = ("AllowedEthernetLocalNetworkAddresses", "AllowedWiFiLocalNetworkAddresses")
    said = done(mac.install("--head", "rack.yaml", "--local-network", "10.0.5.0/24"))
    domain = "com.apple.network.local-network"
    written = [f"sudo defaults write {domain} {key} -array-add 10.0.5.0/24" for key in keys]
    assert [line for line in mac.calls("sudo") if "defaults write" in line] == written
    assert "Restart this Mac" in said
    said = done(mac.install("--head", "rack.yaml", "--local-network", "10.0.5.0/24"))
    assert not any("defaults write" in line for line in mac.calls("sudo"))
    assert "Restart this Mac" not in said
    said = done(mac.install("--head", "rack.yaml", "--local-network", "10.0.6.0/24", "--dry-run"))
    assert f"would run: sudo defaults write {domain} {keys[0]} -array-add 10.0.6.0/24" in said


@pytest.mark.parametrize(
    ("arguments", "variables", "sentence"),
    [
        ((*HEAD, "--local-network", "10.0.5.1"), {}, "--local-network 10.0.5.1 is no network"),
        ((*HEAD, "--local-network", "10.0.5.0/24"), {"MACOS": "15.4.1"}, "needs macOS 15.5, and this is 15.4.1"),
        (HEAD, {"SYSTEM": "Linux"}, "this is Linux, and launchd is macOS's"),
        (HEAD, {"MACHINE": "x86_64"}, "no Apple silicon"),
        (HEAD, {"MACOS": "14.7"}, "macOS 14.7 is too old"),
        (HEAD, {"ID": "0"}, "without sudo"),
        (HEAD, {"PYTHON": "false"}, "PYTHON=false is not a Python 3.11 to 3.14"),
        (HEAD, {"PYTHON_MACHINE": "x86_64"}, "a Python for x86-64, which runs under Rosetta: name one for arm64"),
        ((), {}, "say what this Mac is to be"),
        (("--head", "rack.yaml", "--worker", "x"), {}, "--head or --worker"),
        (("--worker", "x", "--serve"), {}, "--serve goes with --head"),
        (("--head",), {}, "--head needs a value"),
        (("--head", "nowhere.yaml"), {}, "there is no rack file nowhere.yaml"),
        (("--hed", "rack.yaml"), {}, "unknown argument --hed"),
        (("--uninstall", "--worker", "x"), {}, "--uninstall removes all jobs"),
        ((*HEAD, "--prefix", "Documents/pomarium"), {}, "which macOS keeps from jobs"),
        ((*HEAD, "--user"), {"REFUSED": "1"}, "need that user to be logged in at the screen"),
        (HEAD, {"REFUSED": "1"}, "launchd did not take org.pomarium.logs"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(
    mac: Mac, arguments: tuple[str, ...], variables: dict[str, str], sentence: str
) -> None:
    result = mac.install(*arguments, **variables)
    assert result.returncode == 1
    assert sentence in result.stderr
    own = [line for line in result.stderr.splitlines() if line.startswith("install.sh:")]
    assert len(own) == 1
    assert mac.loaded() == []


def test_a_faulty_rack_file_changes_nothing_of_launchd(mac: Mac) -> None:
    mac.rack.write_text("macs: []\n")
    result = mac.install(*HEAD, POMARIUM=f'exec "{sys.executable}" -m pomarium.cluster.cli.main "$@"')
    assert result.returncode == 1
    assert "macs" in result.stderr
    assert "the rack file has faults" in result.stderr
    assert mac.calls("launchctl") == []


def test_help_lists_every_option(mac: Mac) -> None:
    said = done(mac.install("--help"))
    options = set(re.findall(r"^ +(--[a-z-]+)\)", (DEPLOY / "install.sh").read_text(), re.MULTILINE))
    assert options - {"--help"} == set(re.findall(r"--[a-z-]+", said)) & options - {"--help"}
    assert len(options) > 8
    assert "set -euo" not in said
