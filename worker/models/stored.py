"""The models in the caches of this machine, and what their removal deletes. No network, no mlx-lm.

Hugging Face's cache ----+
ModelScope's folder -----+--stored--> StoredModel ..., by name
converted GGUF files ----+
"""

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from pomarium.worker.home import home
from pomarium.worker.models import embedded, hub
from pomarium.worker.models.gguf.cache import cache_folder
from pomarium.worker.models.look_up import CONFIG


class Cache(StrEnum):
    """Whose cache a model is in."""

    HUGGING_FACE = "Hugging Face"
    MODELSCOPE = "ModelScope"
    CONVERTED = "converted GGUF"


@dataclass(frozen=True)
class StoredModel:
    """A model in a cache.

    Attributes:
        name: as `pomarium serve` takes it; of a converted GGUF file the folder.
        folder: with its config.json; of what is not whole, or is no model, what there is.
        size: bytes on the disk. root: what removal deletes.
    """

    name: str
    cache: Cache
    folder: Path
    size: int
    root: Path

    @property
    def whole(self) -> bool:
        """All its weights are there."""
        return hub.is_whole(self.folder)

    def gguf_files(self) -> list[Path]:
        """The GGUF files in it, each of which is a model of its own."""
        return sorted(self.folder.rglob("*.gguf"))


def stored(modelscope_cache: Path | None = None) -> list[StoredModel]:
    """All of them, by name.

    Args:
        modelscope_cache: absolute folder of the local ModelScope models; None for ModelScope's own default.

    Raises:
        SettingsError: a home folder that is needed is not known.
    """
    found = [*_hugging_face(), *_modelscope(modelscope_cache), *_converted()]
    return sorted(found, key=lambda model: (model.name.lower(), model.cache))


def remove(model: StoredModel) -> None:
    """Delete it. Raises OSError."""
    shutil.rmtree(model.root)


def _hugging_face() -> Iterable[StoredModel]:
    for root in _folders(hub.cache(), re.compile(r"models--.+")):
        name = root.name.removeprefix("models--").replace("--", "/", 1)
        snapshots = _folders(root / "snapshots", re.compile(r"[0-9a-f]+"))
        folder = hub.snapshot(root) or (snapshots[-1] if snapshots else root)
        yield StoredModel(name, Cache.HUGGING_FACE, folder, _size(root), root)


def _modelscope(given: Path | None) -> Iterable[StoredModel]:
    base = given or home() / ".cache" / "modelscope" / "hub"
    for parent in (base, base / "models"):
        for organisation in _folders(parent, re.compile(r"[A-Za-z0-9][\w.\-]*")):
            for folder in _folders(organisation, re.compile(r"[A-Za-z0-9][\w.\-]*")):
                if (folder / CONFIG).is_file() and not folder.is_symlink():
                    name = f"{organisation.name}/{folder.name.replace('___', '.')}"
                    yield StoredModel(name, Cache.MODELSCOPE, folder, _size(folder), folder)


def _converted() -> Iterable[StoredModel]:
    for folder in _folders(cache_folder() / "gguf", re.compile(r".+-v\d+")):
        name = embedded.NAME if folder.name.startswith(f"{embedded.NAME}-{embedded.SHA256[:16]}-") else str(folder)
        yield StoredModel(name, Cache.CONVERTED, folder, _size(folder), folder)


def _folders(parent: Path, name: re.Pattern[str]) -> list[Path]:
    if not parent.is_dir():
        return []
    return sorted(path for path in parent.iterdir() if name.fullmatch(path.name) and path.is_dir())


def _size(root: Path) -> int:
    """Links are not followed: those of a hub's cache lead to files that are counted where they lie."""
    return sum(path.lstat().st_size for path in root.rglob("*") if path.is_file() and not path.is_symlink())
