"""vLLM without its compiled parts: the Python tree of its source package, installed as a distribution of its own.

The worker computes with MLX and calls none of vLLM's kernels, so a Mac, for which the package index has no wheel of
vLLM, needs neither a compiler nor a release page.

    FILE (vllm==VERSION --hash=...) --download: pip--> source package --wheel: no build--> wheel --pip--> site-packages

    python pure_vllm.py FILE          of the environment that is to have it; needs its pip, and nothing else

pip finds, checks (sha256) and installs, so its settings hold: indexes, proxies, find-links, caches. It cannot take the
package in one go: vLLM's setup.py appends "+cpu" to the version, which pip rejects as inconsistent, and imports torch,
cmake's and Rust's helpers to say so. pip therefore downloads with a build backend that answers with the metadata which
the package carries (PKG-INFO; PEP 517, PEP 643), and the wheel (PEP 427) is put together here. It comes from a local
folder, so pip's cache of wheels, which other projects read, never has it.

May be interrupted and repeated: pip writes RECORD last.
"""

import base64
import email
import hashlib
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

LOCAL = "cpu.pure"
"""Local version label. vLLM looks for "cpu" in its version and then leaves other devices' paths alone; "pure" tells
this installation from one with kernels."""

_BACKEND = """\
import email, pathlib

def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    text = pathlib.Path("PKG-INFO").read_bytes()
    known = email.message_from_bytes(text)
    info = pathlib.Path(metadata_directory, f"{known['Name']}-{known['Version']}.dist-info")
    info.mkdir()
    (info / "METADATA").write_bytes(text)
    return info.name
"""
_WHEEL = "Wheel-Version: 1.0\nGenerator: pomarium\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
_CPU_REQUIREMENTS = ("requirements/common.txt", "requirements/cpu.txt")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class PackageError(Exception):
    """The source package is not what this was written for; says in what."""


def is_pure(version: str) -> bool:
    """Whether `version` of the distribution `vllm` has none of vLLM's own kernels."""
    return version.partition("+")[2] == LOCAL


def install(requirements: Path) -> None:
    """Installs what `requirements` pins into the running interpreter's environment, over any other `vllm` there.

    Raises:
        subprocess.CalledProcessError: pip failed; it has said why.
        PackageError: see there.
    """
    with tempfile.TemporaryDirectory(prefix="pomarium-vllm-") as scratch:
        package = download(requirements, Path(scratch))
        wheel = build_wheel(package, Path(scratch))
        name, version = wheel.name.split("-")[:2]
        arguments = ["--no-deps", "--no-compile", "--no-index", "--find-links", scratch]
        _pip("install", *arguments, f"{name}=={version}")


def download(requirements: Path, folder: Path) -> Path:
    """The source package, once its checksum was found right, in `folder`."""
    backend = folder / "backend" / "setuptools"
    backend.mkdir(parents=True)
    (backend / "__init__.py").touch()
    (backend / "build_meta.py").write_text(_BACKEND)
    arguments = ["--no-deps", "--no-build-isolation", "--no-binary", "vllm", "--require-hashes", "--dest", str(folder)]
    _pip("download", *arguments, "--requirement", str(requirements), PYTHONPATH=str(backend.parent))
    (package,) = folder.glob("vllm-*.tar.gz")
    return package


def _pip(command: str, *arguments: str, **environment: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", command, *arguments],
        env={**os.environ, "PIP_USER": "0", "PYTHONPATH": "", **environment},
        check=True,
    )


def build_wheel(package: Path, folder: Path) -> Path:
    """The wheel of the source package's `vllm` tree, in `folder`.

    Raises:
        PackageError: see there.
    """
    texts, tree = _read(package)
    version = f"{email.message_from_string(texts['PKG-INFO'])['Version']}+{LOCAL}"
    info = f"vllm-{version}.dist-info"
    files = tree | {
        f"{info}/METADATA": metadata(texts["PKG-INFO"], version, [texts[name] for name in _CPU_REQUIREMENTS]).encode(),
        f"{info}/WHEEL": _WHEEL.encode(),
        f"{info}/entry_points.txt": texts["vllm.egg-info/entry_points.txt"].encode(),
        f"{info}/licenses/LICENSE": texts["LICENSE"].encode(),
    }
    files[f"{info}/RECORD"] = record(files, f"{info}/RECORD").encode()
    wheel = folder / f"vllm-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:  # stored: it lives for seconds
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return wheel


def _read(package: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """Texts that describe the package, and its `vllm` tree, both by path within it. pip has unpacked it before, which
    it does not if a path leads out of it."""
    wanted = ("PKG-INFO", "LICENSE", "vllm.egg-info/entry_points.txt", *_CPU_REQUIREMENTS)
    texts, tree = {}, {}
    with tarfile.open(package) as archive:
        for member in archive:
            path = PurePosixPath(*PurePosixPath(member.name).parts[1:])
            content = archive.extractfile(member) if member.isfile() else None
            if content is None:
                continue
            if str(path) in wanted:
                texts[str(path)] = content.read().decode()
            elif path.parts[:1] == ("vllm",):
                tree[str(path)] = content.read()
    missing = [name for name in wanted if name not in texts]
    if missing or "vllm/__init__.py" not in tree:
        raise PackageError(f"{package.name} has no {missing[0] if missing else 'vllm/__init__.py'}: it is no vLLM.")
    return texts, tree


def metadata(pkg_info: str, version: str, cpu_requirements: list[str]) -> str:
    """`pkg_info` of `version`, asking for no more than vLLM's CPU build does.

    The source package was made for CUDA, so it asks for CUDA's packages too; those of `cpu_requirements` (the texts of
    pip's requirement files) are what remains.
    """
    asked = {_canonical(line) for text in cpu_requirements for line in text.splitlines()}
    head, blank, body = pkg_info.partition("\n\n")
    lines = [
        f"Version: {version}" if line.startswith("Version: ") else line
        for line in head.splitlines()
        if not line.startswith("Requires-Dist: ") or "extra ==" in line or _canonical(line.split(": ", 1)[1]) in asked
    ]
    return "\n".join(lines) + blank + body


def _canonical(requirement: str) -> str:
    """The name that a requirement begins with, as PEP 503 compares names; "" for a line that has none."""
    name = _NAME.match(requirement)
    return re.sub(r"[-_.]+", "-", name[0]).lower() if name else ""


def record(files: Mapping[str, bytes], own: str) -> str:
    """RECORD (PEP 376) of `files`, itself at `own`."""
    out = io.StringIO()
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        out.write(f'"{name}",sha256={digest},{len(content)}\n')
    out.write(f'"{own}",,\n')
    return out.getvalue()


def main(arguments: list[str]) -> int:
    """0 once installed; 1 after one sentence, or pip's own words."""
    try:
        install(Path(arguments[0]))
    except subprocess.CalledProcessError as e:
        print(f"pip ended with status {e.returncode}: see above.", file=sys.stderr)
        return 1
    except PackageError as e:
        print(e, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
