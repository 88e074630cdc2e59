"""What can be told of a model before it is served: its kind, its context, whether it runs on this machine.

    folder --checkpoint.inspect, placement.profile--> kind, context, costs --+
    room_here(): memory for models -------------------------------------------+--described--> Description
    chat template, tokenizer, generation_config.json ---conversation--> Conversation

Imports mlx-lm when it is asked, which takes seconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pomarium.cluster.machine.units import format_size
from pomarium.cluster.placement import context_length
from pomarium.cluster.placement.fit import fit
from pomarium.cluster.placement.profile import converted, headers_of_directory, profile_of
from pomarium.cluster.rack.machine_facts import model_memory
from pomarium.cluster.replica.parsers import Parsers, choose
from pomarium.cluster.replica.serve_plan import STEP_REQUESTS, STEP_TOKENS
from pomarium.worker.errors import CheckpointError, PomariumError
from pomarium.worker.models import chat_facts, endings
from pomarium.worker.models.json_files import read_object

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")
"""What of generation_config.json vLLM takes where a request does not say (vllm/config/model.py)."""


@dataclass(frozen=True)
class MachineRoom:
    """What this machine has for models.

    Attributes:
        memory: bytes in all. dense: weights become float32, as on a CPU.
        most_kv: bytes for K and V at most; None: all that are left.
    """

    memory: int
    dense: bool
    most_kv: int | None


@dataclass(frozen=True)
class Description:
    """A model and this machine.

    Attributes:
        family: config.json's model type. weights: how they are stored. context: the model's own.
        refusal: why it does not run here, in one sentence; None: it does.
        kv_bytes: what is left for K and V. fits: tokens of one sequence that they hold, at
            most `context`.
    """

    family: str | None
    weights: str | None
    context: int | None
    refusal: str | None
    kv_bytes: int | None = None
    fits: int | None = None


@dataclass(frozen=True)
class Conversation:
    """How a model answers.

    Attributes:
        template: it has a chat template. parsers: of its answers. endings: a clause on where they end.
        sampling: of generation_config.json.
    """

    template: bool
    parsers: Parsers
    endings: str
    sampling: Mapping[str, Any]


def room_here(environ: Mapping[str, str]) -> MachineRoom:
    """Of this machine, were nothing else to run on it. Raises SettingsError."""
    from pomarium.worker import device, memory, settings

    values = settings.load(environ)
    on_cpu = device.detect(values).kind is settings.DeviceKind.CPU
    bounded = on_cpu and values.memory_fraction is None
    return MachineRoom(model_memory(None, environ), on_cpu, memory.CPU_MOST_AUTO_KV_BYTES if bounded else None)


def described(folder: Path, room: MachineRoom) -> Description:
    """A model's folder on a machine with `room`. What is wrong with it is its `refusal`."""
    from pomarium.worker.models.checkpoint import inspect
    from pomarium.worker.models.wrappers import WRAPPED_IN

    family, context = _told(folder)
    try:
        checkpoint = inspect(folder)
        headers = headers_of_directory(folder, folder.name)
        profile = profile_of(converted(headers, "float32") if room.dense else headers)
    except PomariumError as error:
        return Description(family, None, context, str(error))
    quantised = checkpoint.quantisation
    bits = "" if quantised is None or quantised.bits is None else f", {quantised.bits} bit"
    weights = checkpoint.dtype if quantised is None else f"{quantised.method}{bits}"
    found = fit(profile, room.memory, rows=STEP_TOKENS, sampled=STEP_REQUESTS, most_kv=room.most_kv)
    refusal = None
    if found.left <= 0 or found.context == 0:
        refusal = (
            f"It does not fit into the {format_size(room.memory)} that this machine has for models: weights and "
            f"one step leave {format_size(max(0, found.left))} for K and V."
        )
    model_type = checkpoint.config.get(WRAPPED_IN, checkpoint.model_type)
    return Description(model_type, weights, context, refusal, max(0, found.left), found.context)


def conversation(folder: Path, model_type: str) -> Conversation:
    """How a model answers. Raises CheckpointError for a damaged file."""
    facts = chat_facts.read(folder, model_type)
    generation = read_object(folder / endings.GENERATION)
    sampling = {name: generation[name] for name in SAMPLING if generation.get(name) is not None}
    return Conversation(facts.template is not None, choose(facts), _endings(folder, generation), sampling)


def _endings(folder: Path, generation: Mapping[str, Any]) -> str:
    from transformers import AutoTokenizer

    config = read_object(folder / endings.CONFIG)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: its tokenizer cannot be read: {str(error).rstrip('.')}.") from error
    marks = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    facts = endings.TokenizerFacts(tokenizer.eos_token_id, marks)
    text = config.get("text_config")
    size = config.get("vocab_size") or (text or {}).get("vocab_size") or len(tokenizer)
    found = endings.endings_of(generation, config, facts, int(size))
    return found.described(lambda token: str(tokenizer.convert_ids_to_tokens([token])[0]))


def _told(folder: Path) -> tuple[str | None, int | None]:
    """What config.json says by itself, whether the model runs or not."""
    try:
        config = read_object(folder / endings.CONFIG)
    except CheckpointError:
        return None, None
    family = config.get("model_type")
    return family if isinstance(family, str) else None, context_length.longest(config)
