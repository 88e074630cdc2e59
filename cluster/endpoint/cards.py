"""What `/v1/models` shows of a model: OpenAI's object with the fields that vLLM adds, which its own clients read.

    Served (known when it is deployed), context (asked of a running engine, once) --card--> JSON object

Source: vllm/entrypoints/openai/models/protocol.py, ModelCard and ModelPermission.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pomarium.cluster.replica.serve_plan import QUEUE, Queue
from pomarium.worker.models import embedded


@dataclass(frozen=True)
class Served:
    """A model of the endpoint.

    Attributes:
        root: where its tokenizer is to be had: a path on the head, or an id of Hugging Face or ModelScope.
        context: tokens of prompt and answer, if the user said how many; else only a running engine knows.
        sleeps: it may be without an engine, and asking it would wake one.
        scales: how many engines it has follows from the calls that Serve counts.
        queue: for its engines.
    """

    root: str
    context: int | None = None
    sleeps: bool = False
    scales: bool = False
    queue: Queue = QUEUE


def root_of(source: str | None, folder: Path) -> str:
    """`root` of a model that the user calls `source` and that lies at `folder` on the head."""
    if source is None or source == embedded.NAME or Path(source).expanduser().exists():
        return str(folder)
    return source


def card(name: str, served: Served, context: int | None, created: int) -> dict[str, Any]:
    """The model's object. created: Unix time in seconds. context: tokens, None as long as nobody knows."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "pomarium",
        "root": served.root,
        "parent": None,
        "max_model_len": context,
        "permission": [
            {
                "id": f"modelperm-{name}",
                "object": "model_permission",
                "created": created,
                "allow_create_engine": False,
                "allow_sampling": True,
                "allow_logprobs": True,
                "allow_search_indices": False,
                "allow_view": True,
                "allow_fine_tuning": False,
                "organization": "*",
                "group": None,
                "is_blocking": False,
            }
        ],
    }
