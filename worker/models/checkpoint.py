"""Facts of an mlx-lm directory, learnt from config.json and the safetensors headers; no weight is read.

    directory --inspect--> Checkpoint, or one sentence: what is missing, truncated or not supported

What mlx-lm loads is read off mlx_lm/utils.py (`load_model`): weights are `model*.safetensors`, and besides its own
quantised layers it repacks some foreign ones.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mlx_lm.utils import MODEL_REMAPPING, load_config

from pomarium.worker.errors import CheckpointError, UnsupportedError
from pomarium.worker.models.forms.completion import completed
from pomarium.worker.models.quantisation import Quantisation, quantisation_of
from pomarium.worker.models.wrappers import check_text_model, lifted

WHOLE = "model.safetensors"
"""The file of a model that is not cut into shards."""
HEAD = "lm_head.weight"
"""The tensor of a head, in transformers' names and in mlx-lm's."""
_MAX_HEADER = 100 << 20  # the safetensors library's own limit
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32}
_BITS |= {"I64": 64, "U64": 64, "F64": 64, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4}
_FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
_DTYPES = frozenset(_FLOATS.values())


@dataclass(frozen=True)
class Checkpoint:
    """A directory that mlx-lm can load.

    Attributes:
        model_type: as config.json says; mlx-lm may map it to another module.
        bytes: of all tensors, as stored.
        dtype: "float32", "float16" or "bfloat16": what config.json names, else that of most floating tensors.
        quantisation: None for dense weights.
        files: the weight files.
        config: config.json, in the form that mlx-lm reads.
    """

    path: Path
    model_type: str
    bytes: int
    dtype: str
    quantisation: Quantisation | None
    files: tuple[Path, ...]
    config: Mapping[str, Any]


def inspect(directory: Path) -> Checkpoint:
    """Check `directory` without reading a weight.

    Raises:
        CheckpointError: a file is missing, truncated or malformed, or a multimodal checkpoint holds no text model.
        UnsupportedError: mlx-lm has no such model type, or does not load this quantisation.
    """
    config = read_config(directory)
    model_type = _model_type(directory, config)
    quantisation = quantisation_of(directory, config, model_type)
    files = _weight_files(directory)
    dtypes: Counter[str] = Counter()
    total = 0
    held: set[str] = set()
    for file in files:
        for name, (dtype, nbytes) in read_safetensors_header(file).items():
            dtypes[dtype] += nbytes
            total += nbytes
            held.add(name)
    _check_index(directory, files, held)
    check_text_model(directory, config, held)
    config = untied(config, held)
    return Checkpoint(directory, model_type, total, _dtype(config, dtypes), quantisation, files, config)


def read_config(directory: Path) -> dict[str, Any]:
    """config.json (with the end-of-text ids of generation_config.json, as mlx-lm reads it), see forms.completion."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a folder.")
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory} holds no config.json, so it is not a model folder.")
    try:
        config = load_config(directory)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{directory / 'config.json'} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{directory / 'config.json'} does not hold a JSON object.")
    return lifted(directory, completed(directory, config))


def untied(config: dict[str, Any], held: Set[str]) -> dict[str, Any]:
    """`config`, which says that the head is not the embedding where it says nothing and there is a head among `held`.

    transformers and mlx-lm assume different things of a file that does not say (Mistral's, for one), and mlx-lm drops
    the tensor of a head that it takes for tied.
    """
    text = config.get("text_config")
    said = any("tie_word_embeddings" in part for part in (config, text if isinstance(text, dict) else {}))
    if said or not any(name == HEAD or name.endswith(f".{HEAD}") for name in held):
        return config
    inner = {"text_config": {**text, "tie_word_embeddings": False}} if isinstance(text, dict) else {}
    return {**config, "tie_word_embeddings": False, **inner}


def _model_type(directory: Path, config: Mapping[str, Any]) -> str:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not re.fullmatch(r"[A-Za-z0-9_.\-]+", model_type):
        raise CheckpointError(f"{directory / 'config.json'} names no model_type.")
    if "model_file" in config:
        raise UnsupportedError(f"{directory} brings its own model code ({config['model_file']!r}), which is not run.")
    module = MODEL_REMAPPING.get(model_type, model_type)
    if "." in module or find_spec(f"mlx_lm.models.{module}") is None:
        raise UnsupportedError(f"{directory}: mlx-lm has no model type {model_type!r}.")
    return model_type


def _weight_files(directory: Path) -> tuple[Path, ...]:
    files = tuple(sorted(directory.glob("model*.safetensors")))
    if not files:
        raise CheckpointError(f"{directory} holds no model*.safetensors; other weight formats are not read.")
    return files


def _check_index(directory: Path, files: Collection[Path], held: set[str]) -> None:
    """The shards of an index are there. One beside a whole model in one file, which it does not name, tells of other
    files and is not read, as transformers and mlx-lm do not."""
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        shards = sorted({str(shard) for shard in weight_map.values()})
        names = sorted(weight_map)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is not a valid index of shards.") from error
    if directory / WHOLE in files and WHOLE not in shards:
        return
    missing = [shard for shard in shards if not (directory / shard).is_file()]
    if missing:
        raise CheckpointError(f"{directory} is incomplete: {', '.join(missing)} is missing.")
    absent = [name for name in names if name not in held]
    if absent:
        raise CheckpointError(f"{directory} is incomplete: no shard holds the tensor {absent[0]!r}.")


def read_safetensors_header(file: Path) -> dict[str, tuple[str, int]]:
    """Tensor name -> (safetensors dtype, bytes), after checking that the file holds exactly what its header says.

    Raises:
        CheckpointError: naming the file that is truncated or malformed.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise CheckpointError(f"{file} is truncated or no safetensors file: its header does not fit in it.")
        raw = opened.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = {name: (str(t["dtype"]), *map(int, t["data_offsets"]), t["shape"]) for name, t in header.items()}
        entries = [
            (name, begin, end, math.prod(shape) * _BITS[dtype] == 8 * (end - begin) and 0 <= begin <= end)
            for name, (dtype, begin, end, shape) in tensors.items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} is no valid safetensors file: its header is malformed.") from error
    for name, _, end, sound in entries:
        if not sound:
            raise CheckpointError(f"{file} is no valid safetensors file: tensor {name!r} has inconsistent sizes.")
        if end > size - 8 - length:
            raise CheckpointError(f"{file} is truncated: tensor {name!r} ends beyond its {size} bytes.")
    return {name: (dtype, end - begin) for name, (dtype, begin, end, _) in tensors.items()}


def _dtype(config: Mapping[str, Any], dtypes: Counter[str]) -> str:
    text = config.get("text_config")
    for source in (config, text if isinstance(text, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            if source.get(key) in _DTYPES:
                return str(source[key])
    floating = [_FLOATS[dtype] for dtype, _ in dtypes.most_common() if dtype in _FLOATS]
    return floating[0] if floating else "float32"
