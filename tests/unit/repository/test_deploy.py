"""What `deploy/` installs on a Mac, run on any system with stand-ins for macOS's commands, which record their calls.

Everything else is real: the script, Python, the rendered property lists, the file system below a temporary folder.
"""

import json
import os
import plistlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from monitoring import DASHBOARD, alarms, dashboard_queries, panels, tool
from ray.serve.schema import ServeDeploySchema

from pomarium.cluster.autoscaling import sleep
from pomarium.cluster.endpoint import builder
from pomarium.cluster.endpoint.builder import EndpointArgs
from pomarium.cluster.replica import serve_plan
from pomarium.cluster.replica.serve_plan import ModelPlan, Scaling, ServePlan
from pomarium.worker.errors import SettingsError

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
TEMPLATES = sorted((DEPLOY / "launchd").glob("*.plist"))
SCRIPTS = sorted(DEPLOY.rglob("*.sh"))

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


# launchd.plist(5) of macOS 15: the keys that a job may have, and the type of each value.
LIMITS = {"Core", "CPU", "Data", "FileSize", "MemoryLock", "NumberOfFiles", "NumberOfProcesses", "ResidentSetSize",
          "Stack"}  # fmt: skip
JOB_KEYS: dict[str, Any] = {
    **dict.fromkeys(
        ["Label", "UserName", "GroupName", "Program", "BundleProgram", "RootDirectory", "WorkingDirectory",
         "StandardInPath", "StandardOutPath", "StandardErrorPath", "ProcessType"], str,
    ),
    **dict.fromkeys(
        ["Disabled", "EnableGlobbing", "EnableTransactions", "EnablePressuredExit", "RunAtLoad", "InitGroups",
         "StartOnMount", "Debug", "WaitForDebugger", "AbandonProcessGroup", "LowPriorityIO",
         "LowPriorityBackgroundIO", "LaunchOnlyOnce", "SessionCreate", "LegacyTimers"], bool,
    ),
    **dict.fromkeys(["TimeOut", "ExitTimeOut", "ThrottleInterval", "StartInterval", "Nice", "Umask"], int),
    **dict.fromkeys(["ProgramArguments", "WatchPaths", "QueueDirectories", "LimitLoadToSessionType"], list),
    **dict.fromkeys(
        ["KeepAlive", "EnvironmentVariables", "StartCalendarInterval", "SoftResourceLimits", "HardResourceLimits",
         "MachServices", "Sockets", "LaunchEvents", "LimitLoadToHardware", "LimitLoadFromHardware",
         "inetdCompatibility"], dict,
    ),
}  # fmt: skip
KEEP_ALIVE = {"SuccessfulExit": bool, "NetworkState": bool, "Crashed": bool, "PathState": dict, "OtherJobEnabled": dict}
PROCESS_TYPES = {"Background", "Standard", "Adaptive", "Interactive"}


def faults_of(job: dict[str, Any]) -> list[str]:
    """What launchd would not understand."""
    found = [f"{key}: no key, or of another type" for key in job if type(job[key]) is not JOB_KEYS.get(key)]
    alive = job.get("KeepAlive", {})
    found += [f"KeepAlive: {key}" for key in alive if type(alive[key]) is not KEEP_ALIVE.get(key)]
    for limits in (job.get("SoftResourceLimits", {}), job.get("HardResourceLimits", {})):
        found += [f"limit {key}" for key, value in limits.items() if key not in LIMITS or type(value) is not int]
    texts = [*job.get("ProgramArguments", []), *job.get("EnvironmentVariables", {}).values()]
    found += [f"{text!r} is no text" for text in texts if not isinstance(text, str)]
    if job.get("ProcessType", "Standard") not in PROCESS_TYPES:
        found.append("ProcessType")
    return found


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_jobs_have_launchd_s_keys_and_types(path: Path) -> None:
    job = plistlib.loads(path.read_bytes())
    assert faults_of(job) == []
    assert job["Label"] == path.stem


@pytest.mark.parametrize(
    "fault",
    [
        {"KeepAliv": True},
        {"ExitTimeOut": "60"},
        {"RunAtLoad": 1},
        {"ProcessType": "Fast"},
        {"KeepAlive": {"Crashed": 1}},
    ],
)
def test_each_fault_of_a_job_is_found(fault: dict[str, Any]) -> None:
    assert len(faults_of({"Label": "x"} | fault)) == 1


def test_every_template_is_installed_by_some_role() -> None:
    script = (DEPLOY / "install.sh").read_text()
    for path in TEMPLATES:
        name = path.stem.rsplit(".", 1)[1]
        assert f"render {path.stem}" in script or f"{name} " in script, f"{path.name} is never installed"


SERVING = ["head", "serve", "worker"]


@pytest.mark.parametrize("name", SERVING)
def test_jobs_that_serve_start_at_boot_come_back_and_are_not_held_back(name: str) -> None:
    job = plistlib.loads((DEPLOY / f"launchd/org.pomarium.{name}.plist").read_bytes())
    assert job["RunAtLoad"] is True
    assert job["KeepAlive"] == {"SuccessfulExit": False}
    assert job["ProcessType"] == "Interactive"
    assert job["ExitTimeOut"] > 20, "launchd's default kills an endpoint that ends its engines"
    assert len(job["EnvironmentVariables"]["RAY_TMPDIR"]) <= 20


@dataclass
class Job:
    """A job's own command line, with stand-ins for pomarium and caffeinate."""

    process: "subprocess.Popen[bytes]"
    folder: Path

    def wrote(self, name: str, within: float = 10.0) -> str:
        deadline = time.monotonic() + within
        path = self.folder / name
        while not path.exists() or not path.read_text().endswith("\n"):
            assert time.monotonic() < deadline, f"{name} was not called"
            time.sleep(0.02)
        return path.read_text()


@pytest.fixture(params=SERVING)
def job(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Job]:
    pomarium, caffeinate, key = (
        tmp_path / "it is/pomarium",
        tmp_path / "caffeinate",
        tmp_path / ".config/pomarium/api.key",
    )
    pomarium.parent.mkdir()
    # The rack comes up at the second look; then it is a process that ends when it is told to.
    pomarium.write_text(
        f"#!{sys.executable}\n"
        "import os, signal, sys, time\n"
        f"folder = {str(tmp_path)!r}\n"
        "if sys.argv[1:] == ['rack', 'env']:\n"
        "    looked = os.path.exists(folder + '/looked'); open(folder + '/looked', 'w').write('1\\n')\n"
        "    print('export RAY_API_SERVER_ADDRESS=http://jobs RAY_AUTH_TOKEN=secret'); sys.exit(0 if looked else 1)\n"
        "if sys.argv[1:] == ['rack', 'down']:\n"
        "    open(folder + '/cleared', 'w').write('rack down\\n'); sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        "key = os.environ.get('POMARIUM_API_KEY', '-')\n"
        "open(folder + '/pomarium-called', 'w').write(f'{os.getpid()} {key} ' + '|'.join(sys.argv[1:]) + '\\n')\n"
        "while True: time.sleep(0.05)\n"
    )
    (pomarium.parent / "python").write_text(f"#!/bin/sh\necho \"$RAY_AUTH_TOKEN $*\" >'{tmp_path}/cleared'\nexit 1\n")
    caffeinate.write_text(f"#!/bin/sh\necho \"$@\" >'{tmp_path}/caffeinate-called'\n")
    for path in (pomarium, pomarium.parent / "python", caffeinate):
        path.chmod(0o755)
    key.parent.mkdir(parents=True)
    key.write_text("sk-1\n")
    values = {"USER_NAME": "", "HOME": str(tmp_path), "PREFIX": str(ROOT), "LOGS": str(tmp_path),
              "RACK": "/a b/rack.yaml", "HEAD": "10.0.0.1", "INSTALLED": "1"}  # fmt: skip
    template = DEPLOY / f"launchd/org.pomarium.{request.param}.plist"
    filled = [f"{name}={value}" for name, value in values.items()]
    words = [sys.executable, DEPLOY / "launchd/render.py", template, *filled, "--", "$x & y"]
    found = plistlib.loads(subprocess.run(words, check=True, capture_output=True).stdout)
    at = found["ProgramArguments"].index(str(ROOT / ".venv/bin/pomarium"))
    shell, *script = found["ProgramArguments"][:at]
    text = script[-1] if script[0] == "-c" else Path(script[0]).read_text()
    assert "/usr/bin/caffeinate" in text
    text = text.replace("/usr/bin/caffeinate", str(caffeinate)).replace("sleep 5", "sleep 0.1")
    (tmp_path / "script").write_text(text)
    started = ["-c", text] if script[0] == "-c" else [str(tmp_path / "script")]
    process = subprocess.Popen(
        [shell, *started, pomarium, *found["ProgramArguments"][at + 1 :]],
        env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]}, stdout=subprocess.PIPE,
    )  # fmt: skip
    yield Job(process, tmp_path)
    process.kill()
    process.wait()


def test_launchd_s_process_becomes_pomarium_and_caffeinate_watches_it(job: Job) -> None:
    """So the signal that ends a job reaches pomarium, and its exit code launchd; a wrapper would stand between."""
    pid, key, words = job.wrote("pomarium-called").strip().split(" ", 2)
    assert int(pid) == job.process.pid
    assert words.split("|")[-1] == "$x & y"
    caffeinate = job.wrote("caffeinate-called").split()
    assert caffeinate[-2:] == ["-w", pid]
    serves = words.startswith("serve")
    assert key == ("sk-1" if serves else "-")
    assert ("-s" in caffeinate) is not words.startswith("rack|join"), "a worker has to sleep when it is told to"
    assert (job.folder / "looked").exists() is serves, "the endpoint waits for the rack"
    shutdown = "secret -m ray.serve.scripts shutdown -y --address http://jobs\n"
    assert job.wrote("cleared") == (shutdown if serves else "rack down\n"), "what a killed one left is in the way"
    job.process.send_signal(signal.SIGTERM)
    assert job.process.wait(10) == 0
    assert job.process.stdout is not None
    assert b"secret" not in job.process.stdout.read(), "a token in a log"


def rotate(*folders: Path, most_bytes: int = 1000) -> None:
    environ = os.environ | {"POMARIUM_LOG_BYTES": str(most_bytes)}
    subprocess.run([DEPLOY / "rotate_logs.sh", *folders], env=environ, check=True, timeout=30)


def test_a_log_is_bounded_while_it_is_written(tmp_path: Path) -> None:
    log = tmp_path / "head.log"
    with log.open("a") as writer:
        for number in range(8):
            writer.write(f"{number}" * 1100 + "\n")
            writer.flush()
            rotate(tmp_path)
            assert log.stat().st_size == 0
        writer.write("after\n")
    rotate(tmp_path)
    assert log.read_text() == "after\n"
    copies = sorted(path.name for path in tmp_path.glob("*.gz"))
    assert copies == [f"head.log.{number}.gz" for number in range(1, 6)]
    newest = subprocess.run(["gzip", "-dc", tmp_path / "head.log.1.gz"], capture_output=True, text=True, check=True)
    assert newest.stdout == "7" * 1100 + "\n"


def test_old_logs_go_but_never_the_one_that_may_be_in_use(tmp_path: Path) -> None:
    names = ["serve-20250101-000000-1.log", "serve-20250201-000000-2.log", "batch-20250101-000000-3.log", "head.log",
             "head.log.1.gz", "rack.json", "serve-20260101-000000-4.log"]  # fmt: skip
    for name in names:
        (tmp_path / name).write_text("x")
        os.utime(tmp_path / name, (time.time() - 40 * 86400,) * 2)
    (tmp_path / "serve-20250101-000000-9.log").write_text("new")
    rotate(tmp_path, tmp_path / "nowhere")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"serve-20250101-000000-9.log", "batch-20250101-000000-3.log", "head.log", "rack.json",
                    "serve-20260101-000000-4.log"}  # fmt: skip


def shellcheck() -> str:
    beside = Path(sys.executable).parent / "shellcheck"
    found = str(beside) if beside.exists() else shutil.which("shellcheck")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("shellcheck is not installed: `make install-dev`")
        pytest.skip("shellcheck is not installed")
    return found


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_satisfy_shellcheck(path: Path) -> None:
    result = subprocess.run([shellcheck(), "--shell=bash", path], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


NEWER_THAN_3_2 = re.compile(
    r"declare -A|local -[An]|mapfile|readarray|\$\{\w+(?:\^|,)|\|&|&>>|wait -n|coproc|printf -v \w+\[|\$\{\w+@|EPOCH"
)


@pytest.mark.parametrize("name", ["install.sh", "rotate_logs.sh", "setup.sh", "launchd/serve.sh"])
def test_scripts_for_macos_keep_to_bash_3_2(name: str) -> None:
    text = (DEPLOY / name).read_text()
    assert NEWER_THAN_3_2.findall(text) == []
    bare = re.findall(r'(?<!\+)"\$\{(?:arguments|at|more)\[@\]\}"', text)
    assert bare == [], "bash 3.2 takes an empty array for an unset variable"


OPERATIONS = (ROOT / "docs/operations.md").read_text()


def test_every_alarm_is_explained() -> None:
    explained = set(re.findall(r"^\| `(\w+)` \|", OPERATIONS, re.MULTILINE))
    assert explained == set(alarms())


def test_prometheus_takes_our_files() -> None:
    promtool = tool("promtool")
    for kind, name in (("config", "prometheus.yml"), ("rules", "alerts.yml")):
        result = subprocess.run([promtool, "check", kind, DEPLOY / name], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr


def test_each_panel_says_what_it_shows_and_in_which_unit() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    assert dashboard["schemaVersion"] >= 38, "Grafana 10"
    source = {"type": "prometheus", "uid": "${DS_PROMETHEUS}"}
    places = set()
    for panel in panels():
        assert panel["description"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"] == source
        for target in panel["targets"]:
            assert target["datasource"] == source
            assert "{{" in target["legendFormat"] or panel["type"] == "stat", panel["title"]
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        places.add((place["x"], place["y"]))
    assert len(places) == len(panels()), "two panels in one place"
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    assert [variable["name"] for variable in dashboard["templating"]["list"]] == ["DS_PROMETHEUS", "model"]


SHOWN = ("request_success", "generation_tokens", "time_to_first_token", "inter_token", "kv_cache_usage", "prefix_cache",
         "pomarium_macs", "step_seconds", "handing_seconds", "waited_seconds")  # fmt: skip


@pytest.mark.parametrize("series", SHOWN)
def test_the_dashboard_shows_what_an_operator_asks_for(series: str) -> None:
    assert any(series in query for query in dashboard_queries().values())


def endpoint_args(**changes: Any) -> EndpointArgs:
    (application,) = yaml.safe_load((DEPLOY / "serve.example.yaml").read_text())["applications"]
    return builder.parse(application["args"] | changes)


def test_serve_s_example_is_the_endpoint_of_the_embedded_model() -> None:
    plan = builder.plan_of(endpoint_args(), {})
    assert plan == ServePlan((ModelPlan("smollm2", "smollm2", stages=None),))
    document = yaml.safe_load((DEPLOY / "serve.example.yaml").read_text())
    assert document["http_options"] == {"host": plan.host, "port": plan.port}
    ServeDeploySchema.model_validate(document)
    assert document["applications"][0]["name"] == serve_plan.APP_NAME


def test_every_argument_of_the_file_reaches_the_plan(tmp_path: Path) -> None:
    model = {"source": "/models/a.gguf", "stages": 2, "replicas": 3, "share_macs": True, "max_model_len": 512,
             "streams": 4, "engine_args": ["--max-num-seqs", 8]}  # fmt: skip
    rack = DEPLOY / "rack.example.yaml"
    args = endpoint_args(models=[model], api_key_variable="K", host="0.0.0.0", port=81, rack=str(rack))
    plan = builder.plan_of(args, {"K": "sk"})
    (found,) = plan.models
    assert (plan.host, plan.port, plan.api_keys) == ("0.0.0.0", 81, frozenset({"sk"}))
    assert (found.name, found.source, found.stages, found.replicas) == ("a", "/models/a.gguf", 2, 3)
    assert (found.share_macs, found.streams, found.engine_args) == (True, 4, {"max_num_seqs": 8, "max_model_len": 512})
    assert found.network is not None
    assert found.scaling is None


def test_keys_come_from_a_file_and_no_secret_from_the_runtime_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.touch(0o600)
    file.write_text("sk-1\nsk-2\n")
    args = endpoint_args(models=[{"source": "a"}], api_key_file=str(file), api_key_variable="K")
    assert builder.plan_of(args, {"K": "sk"}).api_keys == {"sk", "sk-1", "sk-2"}
    builder.refuse_secrets({"HF_HOME": "/h"})
    with pytest.raises(SettingsError, match=r"runtime_env.env_vars: HF_TOKEN would stand in Ray's logs") as refusal:
        builder.refuse_secrets({"HF_HOME": "/h", "HF_TOKEN": "hf_secret"})
    assert "hf_secret" not in str(refusal.value)


def test_replicas_may_follow_the_load() -> None:
    args = endpoint_args(models=[{"source": "a", "replicas": {"min": 0, "max": 2, "keep": "5m", "load": 4}}])
    (found,) = builder.plan_of(args, {}).models
    assert (found.replicas, found.scaling) == (0, Scaling(0, 2, load=4.0, keep_s=300.0))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"models": []}, "args.models: [] is refused"),
        ({"modles": []}, "args.modles: this argument is unknown."),
        ({"models": [{"name": "a"}]}, "args.models[1].source: this argument is missing."),
        ({"models": [{"source": "a", "stages": "all"}]}, "args.models[1].stages: 'all' is neither `auto` nor a number"),
        ({"models": [{"source": "a", "stages": 0}]}, "args.models[1].stages: 0 is refused"),
        ({"models": [{"source": "a", "replicas": 0}]}, "args.models[1].replicas.max: 0 is refused"),
        ({"models": [{"source": "a", "replicas": {"min": 3, "max": 2}}]}, "the replicas of 'a' have a `min`"),
        ({"models": [{"source": "a"}, {"source": "x/a", "name": "a"}]}, "two models are called 'a'"),
        ({"models": [{"source": "a", "engine_args": ["--no-such"]}]}, "--no-such"),
        ({"models": [{"source": "a", "engine_args": ["--worker-cls", "x"]}]}, "Pomarium brings the worker"),
        ({"port": 0}, "args.port: 0 is refused"),
        ({"api_key_variable": "K"}, "args.api_key_variable: K is not set"),
        ({"api_key_file": "/no/keys"}, "The API key file /no/keys cannot be read"),
        ({"rack": "/no/rack.yaml"}, "The rack file /no/rack.yaml cannot be read"),
    ],
)
def test_a_faulty_argument_is_refused_in_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingsError) as refusal:
        builder.plan_of(endpoint_args(**changes), {})
    assert sentence in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1
