"""Whether there can be the model that a user names, found out in a second: without its weights, and without mlx-lm,
whose import takes many.

    name --local--> a folder or GGUF file of this machine, else an id --look_up--> config.json, where it is at hand

`resolve.py` makes a directory of the same names.
"""

import difflib
import importlib.util
import re
from pathlib import Path

from pomarium.worker.errors import CheckpointError
from pomarium.worker.home import user_path

EMBEDDED = ("smollm2", "embedded")
ACCEPTED = "a folder, a .gguf file, an id like organisation/name, or smollm2 (the embedded model)"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*")
CONFIG = "config.json"
PATIENCE_S = 10.0
"""How long the Hub has to answer; resolve.py has its own patience."""


def local(name: str) -> Path | None:
    """The folder or GGUF file that `name` is; None for an id and for the embedded model.

    Raises:
        CheckpointError: it is neither, or what is there is no model.
    """
    if name in EMBEDDED:
        return None
    if not name:
        raise CheckpointError(f"The model's name is empty: a model is {ACCEPTED}.")
    path = path_of(name)
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise CheckpointError(f"{name} holds no {CONFIG}, so it is not a model folder.")
        return path
    if path.exists():
        if path.suffix.lower() != ".gguf":
            raise CheckpointError(f"{name} is a file but no .gguf file: a model is {ACCEPTED}.")
        return path
    if name.startswith(("/", ".", "~")) or path.suffix.lower() == ".gguf" or not HUB_ID.fullmatch(name):
        raise CheckpointError(f"There is no model {name!r}{meant(name)}: a model is {ACCEPTED}.")
    return None


def path_of(name: str) -> Path:
    """`name` as a path, whatever is there.

    Raises:
        CheckpointError: nothing can be opened by that name.
        SettingsError: it begins with a home folder that is not known.
    """
    path = user_path(name)
    try:
        str(path).encode()
        path.is_dir()
    except (OSError, ValueError) as error:  # ValueError: bytes that are no UTF-8, which tokenizers do not open
        raise CheckpointError(f"No model can be opened at {name!a} ({error}): a model is {ACCEPTED}.") from None
    return path


def look_up(name: str | None, *, use_modelscope: bool = False) -> Path | None:
    """The model's config.json, if it is on this machine already.

    Args:
        name: None is the embedded model. use_modelscope: ids are ModelScope's instead of Hugging Face's.

    Raises:
        CheckpointError: there is certainly no such model, or it cannot be fetched now.
    """
    if name is None or name in EMBEDDED:
        return None
    if (path := local(name)) is not None:
        return path / CONFIG if path.is_dir() else None
    if not use_modelscope:
        return _on_hugging_face(name)
    if importlib.util.find_spec("modelscope") is None:
        raise CheckpointError(NO_MODELSCOPE)
    return None


NO_MODELSCOPE = "VLLM_USE_MODELSCOPE is set but the package modelscope is not installed: run `pip install modelscope`."


def absent(name: str) -> CheckpointError:
    """Hugging Face does not have it."""
    return CheckpointError(
        f"Hugging Face has no model {name!r} (or it is private){meant(name)}: a model is {ACCEPTED}."
    )


def unreachable(name: str) -> CheckpointError:
    """It is not here, and cannot be fetched."""
    return CheckpointError(
        f"The model {name!r} is not on this machine and Hugging Face cannot be reached{meant(name)}: a model is "
        f"{ACCEPTED}."
    )


def meant(name: str) -> str:
    """ ", did you mean X?" of a model beside where `name` would be, or the embedded one; "" if nothing is like it."""
    path = Path(name).expanduser()
    beside = path.parent
    try:
        found = [one.name for one in beside.iterdir() if one.suffix.lower() == ".gguf" or (one / CONFIG).is_file()]
    except OSError:
        found = []
    near = difflib.get_close_matches(path.name, found, 1, cutoff=0.7)
    if near:
        return f" (did you mean {beside / near[0]}?)"
    return " (did you mean smollm2?)" if difflib.get_close_matches(name.lower(), EMBEDDED, 1, cutoff=0.7) else ""


def _on_hugging_face(name: str) -> Path | None:
    import httpx2
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    # Read at each call: huggingface_hub's own defaults are those of its import.
    cached = try_to_load_from_cache(name, CONFIG, cache_dir=constants.HF_HUB_CACHE)
    if isinstance(cached, str):
        return Path(cached)
    if constants.HF_HUB_OFFLINE:
        raise unreachable(name)
    try:
        info = HfApi().model_info(name, timeout=PATIENCE_S)
    except RepositoryNotFoundError:
        raise absent(name) from None
    except HfHubHTTPError:
        return None  # it answers, if not well: resolve.py asks again
    except httpx2.HTTPError:
        raise unreachable(name) from None
    if info.siblings is not None and CONFIG not in {file.rfilename for file in info.siblings}:
        raise CheckpointError(
            f"{name} of Hugging Face holds no {CONFIG}, so it cannot be served as it is: of GGUF files fetch one, "
            "and name that."
        )
    return None
