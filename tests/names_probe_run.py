"""Whether our folders `proto` and `kernels` hide anybody's packages: a probe to run, and what it must find.

write(folder) --run(interpreter's arguments)--> findings --check
"""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

SITE_PACKAGES = sysconfig.get_path("purelib")

PROBE = """
import importlib, json, sys

def probe():
    import proto
    from transformers.utils.import_utils import is_kernels_available

    errors = importlib.import_module("pomarium.worker.errors")
    plugin = importlib.import_module("pomarium.cluster.engine.plugin")
    return {
        "proto": proto.__file__,
        "message": proto.Message.__module__,
        "kernels": is_kernels_available(),
        "errors": errors.__file__,
        "plugin": plugin.__file__,
    }

if __name__ == "__main__":
    print(json.dumps(probe()))
"""


def write(folder: Path) -> Path:
    """A folder with the module `names_probe`; tests/ itself has a folder `kernels`, so the probe cannot lie there."""
    (folder / "names_probe.py").write_text(PROBE)
    return folder


def run(*arguments: str, cwd: Path, path: list[str], **environment: str) -> dict[str, object]:
    """The probe's findings from a fresh interpreter: `arguments` to Python, `path` as PYTHONPATH."""
    result = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)} | environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found


def check(found: dict[str, object], source: Path) -> None:
    """No name was hijacked, and pomarium came from `source`."""
    assert str(found["proto"]).startswith(SITE_PACKAGES)
    assert found["message"] == "proto.message"
    assert found["kernels"] is False
    assert Path(str(found["errors"])).resolve() == (source / "worker/errors.py").resolve()
    assert Path(str(found["plugin"])).resolve() == (source / "cluster/engine/plugin.py").resolve()
