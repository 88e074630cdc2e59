"""JSON files beside a model's weights, each an object."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pomarium.worker.errors import CheckpointError


def read_object(file: Path) -> Mapping[str, Any]:
    """The object in `file`; empty if there is no file. Raises CheckpointError if it holds something else."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} does not hold a JSON object.")
    return content
