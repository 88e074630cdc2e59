"""What a user calls a model -> a directory on disk that mlx-lm and vLLM read.

None, "smollm2", "embedded" -> the embedded model
a folder                    -> itself
a .gguf file                -> converted once into the cache folder
"organisation/name"         -> downloaded from Hugging Face or ModelScope, whichever is set: never the other
"""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

from pomarium.worker.errors import CheckpointError
from pomarium.worker.models import embedded, hub, look_up
from pomarium.worker.models.gguf.cache import converted
from pomarium.worker.models.look_up import ACCEPTED


def resolve(name: str | None, *, use_modelscope: bool = False, modelscope_cache: Path | None = None) -> Path:
    """The model's directory, absolute.

    Args:
        use_modelscope: ids are ModelScope's instead of Hugging Face's.
        modelscope_cache: absolute folder of the local ModelScope models; None for ModelScope's own default.

    Raises:
        CheckpointError: there is no such model, or it cannot be fetched or converted.
        SettingsError: a home folder that is needed is not known.
        UnsupportedError: a GGUF file of a kind that is not converted.
    """
    if name is None or name in look_up.EMBEDDED:
        return embedded.path()
    if not name:
        raise CheckpointError(f"The model's name is empty: a model is {ACCEPTED}.")
    path = look_up.path_of(name)
    if path.is_dir():
        return path.resolve()
    if path.suffix.lower() == ".gguf":
        return _from_gguf(path)
    if path.exists():
        raise CheckpointError(f"{name} is a file but no .gguf file: a model is {ACCEPTED}.")
    if not look_up.HUB_ID.fullmatch(name):
        raise CheckpointError(f"There is no model {name!r}{look_up.meant(name)}: a model is {ACCEPTED}.")
    if use_modelscope:
        return _from_modelscope(name, modelscope_cache)
    return hub.download(name)


def _from_gguf(path: Path) -> Path:
    if not path.is_file():
        raise CheckpointError(f"the GGUF file {path} does not exist.")
    stem = re.sub(r"[^\w.\-]", "_", path.stem)[:80]  # before links are followed: a hub's lead to names that are hashes
    path = path.resolve()
    facts = path.stat()
    identity = f"{path}\0{facts.st_size}\0{facts.st_mtime_ns}"
    return converted(path, f"{stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}")


def _from_modelscope(name: str, cache: Path | None) -> Path:
    try:
        return Path(_modelscope_download()(name, cache_dir=None if cache is None else str(cache))).resolve()
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"the model {name!r} could not be fetched from ModelScope: {_line(error)}.") from error


def _modelscope_download() -> Callable[..., str]:
    try:
        from modelscope import snapshot_download as download
    except ImportError as error:
        raise CheckpointError(look_up.NO_MODELSCOPE) from error
    return download  # type: ignore[no-any-return]


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
