"""Jobs of `deploy/launchd` have keys that launchd knows, and their command lines start, wait and end as they should."""

import os
import plistlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
TEMPLATES = sorted((DEPLOY / "launchd").glob("*.plist"))

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
