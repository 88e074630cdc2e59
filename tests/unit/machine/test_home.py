"""A home that is no folder, or none at all: one sentence that names the variable to set, and no traceback."""

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from pomarium.cluster.cli.main import EXIT_FAULT, main
from pomarium.cluster.machine.state import fault_of, made, state_folder
from pomarium.cluster.rack import current, key_file
from pomarium.cluster.rack.identity import RackKey
from pomarium.cluster.replica.serve_plan import served_names
from pomarium.worker.errors import CheckpointError, SettingsError
from pomarium.worker.models.gguf import cache
from pomarium.worker.models.resolve import resolve

NOWHERE = ["a file", "/proc", "/dev/null/home"]


@pytest.fixture(params=NOWHERE)
def home(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A HOME in which nothing can be made, for root neither."""
    path = request.param
    if path == "a file":
        path = str(tmp_path / "file")
        Path(path).write_text("")
    monkeypatch.setenv("HOME", path)
    for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    return str(path)


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """No HOME, and no such user."""

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("command", [["serve"], ["batch", "run", "IN", "OUT"]])
def test_a_command_says_what_to_set(
    home: str, command: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "IN").write_text("")
    assert main([str(tmp_path / part) if part in ("IN", "OUT") else part for part in command]) == EXIT_FAULT
    error = capfd.readouterr().err
    assert error.startswith(f"pomarium: {home}/.local/state/pomarium cannot be written (")
    assert "set XDG_STATE_HOME, or HOME, to a folder" in error
    assert error.count("\n") == 1


@pytest.mark.usefixtures("no_home")
@pytest.mark.parametrize("command", [["serve"], ["rack", "status"]])
def test_so_does_one_of_a_user_without_a_home(command: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(command) == EXIT_FAULT
    assert capfd.readouterr().err.startswith("pomarium: HOME is not set")


def test_doctor_names_the_folders(home: str) -> None:
    environ = {"PATH": os.environ["PATH"], "HOME": home}
    done = subprocess.run(
        [sys.executable, "-m", "pomarium.cluster.cli.main", "doctor"], env=environ, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (1, "")
    caches = "Library/Caches" if sys.platform == "darwin" else ".cache"
    for kind, folder in (("state", ".local/state"), ("cache", caches)):
        assert f"FAULT {kind} folder: {home}/{folder}/pomarium: " in done.stdout
        assert f"Set XDG_{kind.upper()}_HOME, or HOME, to a folder that you can write." in done.stdout


def test_racks_and_keys_and_caches_too(home: str, tmp_path: Path) -> None:
    assert current.recorded(os.environ) is None
    current.forget(os.environ)
    assert key_file.stored(os.environ) is None
    with pytest.raises(SettingsError, match="set XDG_CONFIG_HOME, or HOME"):
        key_file.store(RackKey.generate(), os.environ)
    with pytest.raises(CheckpointError, match="set XDG_CACHE_HOME"):
        cache.converted(tmp_path / "x.gguf", "x")
    assert fault_of(state_folder(os.environ))


@pytest.mark.usefixtures("no_home")
def test_paths_of_homes_that_are_not_known() -> None:
    for look in (lambda: resolve("~/model"), lambda: served_names(["~nobody-of-that-name/m"], [])):
        with pytest.raises(SettingsError, match=r"home folder that .* is not known"):
            look()
    with pytest.raises(SettingsError, match="HOME is not set"):
        cache.cache_folder()


def test_a_folder_that_is_not_there_yet_is_well(tmp_path: Path) -> None:
    folder = state_folder({"XDG_STATE_HOME": str(tmp_path / "a" / "b")})
    assert fault_of(folder) is None
    assert list(tmp_path.iterdir()) == []
    assert made(folder).is_dir()
    assert made(folder) == folder
