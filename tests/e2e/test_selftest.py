"""`pomarium selftest` as a user runs it: here, and on machines with a fault each, in real processes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import selftest_faults

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

SECTIONS = ["machine", "device", "kernels, each compiled by itself", "embedded model, the worker alone"]
GPU_SECTIONS = ["kernels against float64", "times"]
SERVING = ["embedded model, vLLM's engine", "embedded model, over HTTP"]
COPIES, WRITES = "cache writes, bfloat16, 2 heads of 128 and 128", "cache writes, float32, 5 heads of 512 and 512"
COMMAND = [sys.executable, "-m", "pomarium.cluster.cli.main", "selftest"]


def selftest(*arguments: str, before: tuple[str, ...] = (), **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "VLLM_"))}
    return subprocess.run(
        [*before, *COMMAND, *arguments],
        env=clean | environ,
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
    )


def whole(report: str, *sections: str) -> None:
    """All sections are there, each with rows, and the end that says where to paste it."""
    lines = report.splitlines()
    assert lines[0] == "```text"
    assert lines[-2] == "```", report
    assert "issue tracker" in lines[-1]
    assert re.match("selftest: (passed|FAILED)", lines[-3])
    for title in (*SECTIONS, *sections):
        assert lines[lines.index(title) + 1].startswith("  "), title
    assert "Traceback" not in report


def row(report: str, name: str) -> tuple[str, str]:
    """(verdict, text) of the first row of this name."""
    for line in report.splitlines():
        if match := re.fullmatch(rf"  (.{{7}}) {re.escape(name)} +(.*)", line):
            return match[1].strip(), match[2]
    raise AssertionError(f"no row {name}:\n{report}")


def test_this_machine_computes_and_serves(tmp_path: Path) -> None:
    done = selftest(XDG_STATE_HOME=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    whole(done.stdout, *SERVING)
    assert "selftest: passed" in done.stdout
    assert row(done.stdout, "all kernels") == ("not run", "there is no GPU here, attention runs as MLX operations")
    for name in ("model", "engine"):
        verdict, text = row(done.stdout, name)
        assert verdict == "ok", text
        assert text.startswith("120 of 120 tokens equal to mlx-lm's, on"), text
    assert row(done.stdout, "wired") == ("", "no")
    assert "' Paris" in row(done.stdout, "completion")[1]
    assert [row(done.stdout, name)[0] for name in ("pomarium serve", "completion", "streamed chat", "stop")] == [
        "ok"
    ] * 4


@pytest.mark.usefixtures("compiler")
def test_a_compile_error_is_a_row(tmp_path: Path) -> None:
    done = selftest("--no-serving", **selftest_faults.preload(tmp_path, "compile_error"))
    assert done.returncode == 1, done.stderr
    whole(done.stdout, *GPU_SECTIONS)
    verdict, text = row(done.stdout, "copy_blocks")
    assert verdict == "FAILED"
    assert text.startswith("does not compile with T=")
    assert "W_THERE_IS_NOT" in done.stdout
    assert row(done.stdout, "reshape_and_cache")[0] == "ok"
    assert row(done.stdout, COPIES) == ("not run", "copy_blocks does not compile")
    assert row(done.stdout, WRITES)[0] == "ok"
    assert row(done.stdout, "model")[0] == "ok"


@pytest.mark.usefixtures("compiler")
def test_a_wrong_kernel_is_a_row(tmp_path: Path) -> None:
    done = selftest("--no-serving", **selftest_faults.preload(tmp_path, "wrong_kernel"))
    assert done.returncode == 1, done.stderr
    whole(done.stdout, *GPU_SECTIONS)
    assert row(done.stdout, "copy_blocks")[0] == "ok", "it compiles"
    verdict, text = row(done.stdout, COPIES)
    assert verdict == "WRONG"
    assert re.match(r"error \d\.\de[+-]\d\d, bound 0", text)
    assert row(done.stdout, WRITES)[0] == "ok"
    assert done.stdout.splitlines()[-3].startswith("selftest: FAILED (1 of")
    assert row(done.stdout, "mla_decode")[1].endswith("latents)"), "timed all the same"


@pytest.mark.usefixtures("compiler")
def test_a_driver_that_aborts_is_a_row_and_the_others_go_on(tmp_path: Path) -> None:
    done = selftest("--no-serving", **selftest_faults.preload(tmp_path, "abort"))
    assert done.returncode == 1, done.stderr
    whole(done.stdout, *GPU_SECTIONS)
    assert row(done.stdout, "copy_blocks") == ("FAILED", "its process was ended by SIGABRT")
    assert "uncaught exception of type NSException" in done.stdout
    assert row(done.stdout, "reshape_and_cache")[0] == "ok"
    assert row(done.stdout, "copy")[0] == "FAILED", "times that fail"
    assert row(done.stdout, "model")[0] == "ok"


def test_no_metal_device_is_a_sentence_and_the_rest_runs_on_the_cpu(tmp_path: Path) -> None:
    done = selftest("--no-serving", **selftest_faults.preload(tmp_path, "no_metal"))
    assert done.returncode == 1, done.stderr
    whole(done.stdout)
    verdict, text = row(done.stdout, "device")
    assert verdict == "FAILED"
    assert text.startswith("Metal does not work on this machine ([metal::load_device] No Metal device available): set")
    assert row(done.stdout, "model")[0] == "ok"
    assert done.stdout.count("FAILED") == 2, "the row and the summary"


@pytest.mark.parametrize("command", ["serve", "doctor", "env"])
def test_other_commands_say_the_same_without_metal(tmp_path: Path, command: str) -> None:
    environ = os.environ | selftest_faults.preload(tmp_path, "no_metal") | {"XDG_STATE_HOME": str(tmp_path)}
    done = subprocess.run(
        [*COMMAND[:-1], command], env=environ, capture_output=True, text=True, timeout=380, check=False
    )
    assert done.returncode == 1
    assert "Metal does not work on this machine" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


FULL_DISK = """
set -e
for folder in /tmp /var/tmp /dev/shm; do
    mount -t tmpfs -o size=64k tmpfs $folder
    head -c 100000 /dev/zero > $folder/filler 2> /dev/null || true
done
cd /tmp
exec "$@"
"""


def test_a_full_disk(tmp_path: Path) -> None:
    """No folder can be written in which caches, logs or temporary files could be."""
    before = ("unshare", *(() if os.geteuid() == 0 else ("--user", "--map-root-user")), "--mount")
    if subprocess.run([*before, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespace can be made here")
    folders = {"HOME": "/tmp", "XDG_CACHE_HOME": "/tmp/c", "XDG_STATE_HOME": "/tmp/s", "TMPDIR": "/tmp"}
    done = selftest(before=(*before, "bash", "-c", FULL_DISK, "full_disk"), **folders)
    assert done.returncode == 1, done.stderr
    whole(done.stdout, *SERVING)
    assert row(done.stdout, "device")[0] == "ok"
    for name in ("model", "engine"):
        assert row(done.stdout, name)[0] == "FAILED"
    assert row(done.stdout, "pomarium serve")[0] == "FAILED"
    assert done.stdout.count("The disk of /tmp") == 3, done.stdout


@pytest.fixture
def compiler() -> None:
    from emulator.build import NoCompilerError
    from emulator.build import compiler as found

    try:
        found()
    except NoCompilerError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"the emulator cannot compile kernels: {error}")
