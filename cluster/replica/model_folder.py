"""The models in a folder: `pomarium serve --models FOLDER`.

    FOLDER/NAME (config.json), FOLDER/NAME.gguf, and a level deeper FOLDER/ORG/NAME --models_in--> {name: path}

Whether each can be served is for others to say (replica/model_check.py).
"""

from pathlib import Path

from pomarium.worker.errors import SettingsError
from pomarium.worker.home import user_path

CONFIG, GGUF = "config.json", ".gguf"
DEPTH = 2
"""ORG/NAME, as hubs and LM Studio keep them; of a GGUF file ORG/NAME/FILE."""


def models_in(folder: str) -> dict[str, Path]:
    """Path of each model by its name: where it lies in the folder, less `.gguf`.

    Raises:
        SettingsError: there is no such folder, it cannot be read, or nothing in it looks like a model.
    """
    root = user_path(folder)
    if not folder:
        raise SettingsError("--models names no folder: give one that has models in it.")
    if not root.is_dir():
        raise SettingsError(f"--models {folder} is no folder: give one that has models in it.")
    try:
        found = dict(sorted(_found(root, "", DEPTH).items()))
    except OSError as error:
        raise SettingsError(f"--models {folder} cannot be read ({error.strerror}).") from error
    if not found:
        one = " It is a model itself: `pomarium serve FOLDER` serves it." if (root / CONFIG).is_file() else ""
        raise SettingsError(
            f"--models {folder} has no models: none of what is in it is a folder with a {CONFIG} or a {GGUF} file.{one}"
        )
    return found


def _found(folder: Path, prefix: str, depth: int) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if (path / CONFIG).is_file():
                found[f"{prefix}{path.name}"] = path
            elif depth:
                found |= _found(path, f"{prefix}{path.name}/", depth - 1)
        elif path.suffix.lower() == GGUF and path.is_file():
            found[f"{prefix}{path.stem}"] = path
    return found
