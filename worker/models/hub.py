"""Models of Hugging Face: what of one is missing on this machine, and its download. Imports neither mlx-lm nor torch.

    ORG/NAME --missing--> bytes to come --download--> a folder in Hugging Face's cache

huggingface_hub keeps the files that came whole before a download was interrupted, and shows a bar on stderr. Its
constants are read at each call, for its own defaults are those of its import.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pomarium.worker.errors import CheckpointError
from pomarium.worker.models import look_up

PATTERNS = (
    "*.json", "model*.safetensors", "*.py", "tokenizer.model", "*.tiktoken", "tiktoken.model", "*.txt", "*.jsonl",
    "*.jinja",
)  # fmt: skip
"""The files of a model that are read: mlx-lm's DEFAULT_ALLOW_PATTERNS, without its import."""

INDEX, WEIGHTS, ONE_FILE = "model.safetensors.index.json", "model*.safetensors", "model.safetensors"

PART, LOCKS = ".incomplete", ".locks"
"""huggingface_hub's names: the end of a file that is not whole yet, and the cache's folder of locks."""


def cache() -> Path:
    """The folder of Hugging Face's cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def root_of(name: str) -> Path:
    """Where the cache has, or would have, a model."""
    return cache() / f"models--{name.replace('/', '--')}"


def snapshot(root: Path) -> Path | None:
    """The folder of a cached model's main revision; None if there is none."""
    main = root / "refs" / "main"
    folder = root / "snapshots" / main.read_text().strip() if main.is_file() else None
    return folder if folder is not None and folder.is_dir() else None


def is_whole(folder: Path) -> bool:
    """Whether a model's config.json and all its weights are in `folder`."""
    if not (folder / look_up.CONFIG).is_file():
        return False
    index = folder / INDEX
    if not index.is_file():
        return any(folder.glob(WEIGHTS))
    try:
        shards = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    if ONE_FILE not in shards and (folder / ONE_FILE).is_file():  # the index tells of other files (checkpoint.py)
        return True
    return all((folder / str(shard)).is_file() for shard in shards)


def remove_parts(name: str) -> None:
    """Take away the parts of a model's files that no process is writing: huggingface_hub goes on with none of them.

    One that is being written is known by its blob's lock, which ends with the process that holds it.
    """
    from filelock import FileLock, Timeout

    root = root_of(name)
    for part in root.glob(f"blobs/*{PART}"):
        blob = part.name.removesuffix(PART).rpartition(".")[0]  # <blob>.<8 hex digits>.incomplete
        lock = FileLock(cache() / LOCKS / root.name / f"{blob}.lock", timeout=0, mode=0o664)
        with suppress(Timeout, NotImplementedError), lock:  # a file system without locks keeps its parts
            part.unlink(missing_ok=True)


def missing(name: str) -> int:
    """Bytes of a model that are still to be fetched. Raises CheckpointError as `download`."""
    from huggingface_hub import snapshot_download
    from tqdm.auto import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

    with _faults(name):
        files = snapshot_download(
            name, allow_patterns=list(PATTERNS), cache_dir=cache(), dry_run=True, tqdm_class=Silent
        )
    return sum(file.file_size or 0 for file in files if file.will_download)


def download(name: str) -> Path:
    """The model's folder, absolute; what is not there yet is fetched.

    Raises:
        CheckpointError: there is no such model, or it cannot be fetched.
    """
    from huggingface_hub import snapshot_download

    with _faults(name):
        found = snapshot_download(name, allow_patterns=list(PATTERNS), cache_dir=cache())
    return Path(found).resolve()


@contextmanager
def _faults(name: str) -> Iterator[None]:
    from huggingface_hub.errors import (
        DryRunError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        yield
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise look_up.absent(name) from error
    except (LocalEntryNotFoundError, DryRunError) as error:
        raise look_up.unreachable(name) from error
    except (OSError, ValueError, RuntimeError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise CheckpointError(f"the model {name!r} could not be fetched from Hugging Face: {line}.") from error
