"""The environment variables that configure Pomarium: one typed table, read by the parser, `pomarium env` and the docs.

    os.environ --parse_all--> values and errors --load--> Settings, or a SettingsError that names every invalid variable
                                              --cluster/cli/env.py--> what `pomarium env` prints

vLLM swallows what a platform plugin raises while it is being loaded, so `wants_mlx` and `normalise`, which run there,
never raise; `check_and_update_config` and the command line call `load`, before any weight is read.
Imports nothing but the standard library.
"""

import difflib
import os
import re
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from pomarium.worker.errors import SettingsError

MACHINE_MEMORY = "POMARIUM_MACHINE_MEMORY"
"""Bytes that this machine may use for models, set by the rack's node that the process belongs to, not by users."""

WIRE = "POMARIUM_WIRE"

STEP_TIMEOUT = "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"
"""vLLM's variable. Seconds after which a step that has not ended is taken for a fault; unset: never, for a worker that
is lost or frozen is seen by its links, and one that computes for long is not to be ended."""

AUTO_FRACTION = 0.9
"""Share of the memory base that `auto` stands for under paged attention."""

STEP_SECONDS = 1.0
"""What a step is to take at most: who waits for a token beside a long prompt hardly notices so much."""

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})
_NUMBER = re.compile(r"\+?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_SIZE = re.compile(r"([1-9]\d{0,11})\s*([KMG]iB)?", re.ASCII)
_UNITS = {None: 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_QUOTES = ('"', "'", "`", "“", "”", "‘", "’")


class DeviceKind(StrEnum):
    """Where MLX computes."""

    GPU = "gpu"
    CPU = "cpu"


class Wire(StrEnum):
    """What is kept from being paged out on a Mac: nothing, or weights and KV pool."""

    OFF = "off"
    POOL = "pool"


class MultimodalMode(StrEnum):
    """What becomes of a multimodal checkpoint: its text model, images as well, or whichever of them runs."""

    AUTO = "auto"
    TEXT_ONLY_COMPAT = "text-only-compat"
    NATIVE = "multimodal-native"


@dataclass(frozen=True)
class Settings:
    """Every variable, parsed.

    Attributes:
        memory_fraction: share of the memory base in (0, 1]; None is `auto`.
        device: None if the user did not ask for one: the GPU then, or the CPU on a machine without a GPU backend.
        modelscope_cache: absolute folder of the local ModelScope models.
        step_seconds: what a step of the engine is to take at most; 0: no bound.
        max_request_chars: characters of text and token ids in one request; None is `auto`.
        visible_devices: as the executor wrote it for this worker; None outside of one.
        max_body, max_upload: bytes of a request's body, and of an uploaded file's.
        client_timeout: seconds that a client may keep the endpoint waiting.
    """

    memory_fraction: float | None = None
    use_mlx: bool = True
    device: DeviceKind | None = None
    paged_attention: bool = True
    debug: bool = False
    multimodal_mode: MultimodalMode = MultimodalMode.AUTO
    use_modelscope: bool = False
    modelscope_cache: Path | None = None
    gdn_lazy_kernels: bool = True
    mla_kernel: bool = False
    decode_graphs: bool = True
    step_seconds: float = STEP_SECONDS
    max_request_chars: int | None = None
    wire: Wire = Wire.OFF
    visible_devices: str | None = None
    max_body: int = 8 << 20
    max_upload: int = 200 << 20
    client_timeout: float = 30.0

    @property
    def resolved_fraction(self) -> float:
        """The share of the memory base that paged attention takes."""
        return AUTO_FRACTION if self.memory_fraction is None else self.memory_fraction


Value = float | int | bool | str | Path | None
Parser = Callable[[str], Value]
"""Takes the text without surrounding white space; raises ValueError if it is not accepted."""


@dataclass(frozen=True)
class Variable:
    """Declaration of one environment variable.

    Attributes:
        field: the attribute of Settings that it fills.
        default: what an unset variable means, as the documentation writes it.
        accepted: completes the sentence "set it to ...".
        meaning: one cell of docs/configuration.md.
    """

    name: str
    field: str
    default: str
    accepted: str
    parse: Parser
    meaning: str


def _fraction(text: str) -> float | None:
    if text.lower() == "auto":
        return None
    if _NUMBER.fullmatch(text) is None or not 0.0 < float(text) <= 1.0:
        raise ValueError
    return float(text)


def _count(text: str) -> int | None:
    if text.lower() == "auto":
        return None
    if not (text.isascii() and text.isdigit()) or len(text) > 18 or int(text) == 0:
        raise ValueError
    return int(text)


def _boolean(text: str) -> bool:
    word = text.lower()
    if word not in _TRUE | _FALSE:
        raise ValueError
    return word in _TRUE


def _device(text: str) -> DeviceKind:
    return DeviceKind(text.lower())


def _wire(text: str) -> Wire:
    return Wire(text.lower())


def _multimodal_mode(text: str) -> MultimodalMode:
    return MultimodalMode(text.lower())


def _absolute_path(text: str) -> Path:
    path = Path(text)
    if not path.is_absolute():
        raise ValueError
    return path


def _size(text: str) -> int:
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError
    return int(match[1]) * _UNITS[match[2]]


def _seconds(text: str) -> float:
    if _NUMBER.fullmatch(text) is None or not 0.0 < float(text) <= 86_400.0:
        raise ValueError
    return float(text)


def _seconds_or_zero(text: str) -> float:
    return 0.0 if _NUMBER.fullmatch(text) and float(text) == 0 else _seconds(text)


_BOOLEAN = "1/0, true/false, yes/no or on/off"

VARIABLES: tuple[Variable, ...] = (
    Variable(
        "VLLM_METAL_MEMORY_FRACTION",
        "memory_fraction",
        "auto",
        "auto or a number above 0 and at most 1",
        _fraction,
        "`auto` or a number in (0, 1]: the share of the machine's memory that weights, activations and KV cache take. "
        "Paged: `auto` is 0.9. Not paged: must be `auto`, and just enough for the model plus one sequence of maximum "
        "length is taken. The base is the recommended working set on a GPU and the machine's memory on the CPU, where "
        "`auto` gives 2 GiB to the KV cache, up to 4 GiB if one sequence needs them. It is an upper bound: what others "
        "took, a reserve for the system, and what `--max-num-seqs` sequences cannot use are left alone. Workers on one "
        "machine share the fraction.",
    ),
    Variable(
        "VLLM_METAL_USE_MLX",
        "use_mlx",
        "1",
        _BOOLEAN,
        _boolean,
        "0: Pomarium's platform stands down and vLLM's own CPU backend serves the same request; for comparing.",
    ),
    Variable(
        "VLLM_MLX_DEVICE",
        "device",
        "gpu",
        "gpu or cpu",
        _device,
        "`gpu` or `cpu`. A GPU that is asked for and absent is an error; not set on a machine without a GPU backend "
        "means `cpu`, with one log line.",
    ),
    Variable(
        "VLLM_METAL_USE_PAGED_ATTENTION",
        "paged_attention",
        "1",
        _BOOLEAN,
        _boolean,
        "0: mlx-lm's contiguous cache instead of the paged one, with the same output.",
    ),
    Variable(
        "VLLM_METAL_DEBUG",
        "debug",
        "0",
        _BOOLEAN,
        _boolean,
        "1: logs the composition of each step's batch, the attention path chosen and memory figures.",
    ),
    Variable(
        "VLLM_METAL_MULTIMODAL_MODE",
        "multimodal_mode",
        "auto",
        "auto, text-only-compat or multimodal-native",
        _multimodal_mode,
        "`auto`: multimodal checkpoints on the compatibility allowlist (Gemma 4, Qwen3.5, Qwen3.6, Idefics3, SmolVLM) "
        "are served as text models, and an image in a request is an error; Idefics3 and SmolVLM take images where the "
        "checkpoint has its vision tower and nothing else is in the way. One line of the log says which. "
        "`text-only-compat`: all are text models. `multimodal-native`: what cannot take images is refused with the "
        "reason.",
    ),
    Variable(
        "VLLM_USE_MODELSCOPE",
        "use_modelscope",
        "False",
        _BOOLEAN,
        _boolean,
        "True: model ids are looked up on ModelScope instead of Hugging Face. A missing package or a failed download "
        "is an error, not a change of registry.",
    ),
    Variable(
        "VLLM_METAL_MODELSCOPE_CACHE",
        "modelscope_cache",
        "none",
        "an absolute path (`~` and variables are not expanded)",
        _absolute_path,
        "Absolute path of the folder with the local ModelScope models.",
    ),
    Variable(
        "VLLM_METAL_GDN_LAZY_KERNELS",
        "gdn_lazy_kernels",
        "1",
        _BOOLEAN,
        _boolean,
        "1: on a GPU gated-delta layers whose sizes fit run through kernels over states in place, within MLX's lazy "
        "graph. 0: mlx-lm's own modules over gathered states, with the same output, as on the CPU.",
    ),
    Variable(
        "VLLM_METAL_MLA_KERNEL",
        "mla_kernel",
        "0",
        _BOOLEAN,
        _boolean,
        "1: on a GPU decode rows of latent attention (rank 512 + 64, blocks of 16 or 32) go through their own kernel, "
        "also in mixed batches. 0: MLX operations, with the same output, as on the CPU.",
    ),
    Variable(
        "POMARIUM_DECODE_GRAPHS",
        "decode_graphs",
        "1",
        _BOOLEAN,
        _boolean,
        "1: on a GPU decode steps run as graphs that are built once, and each is sent before the last one's tokens are "
        "read, for models all of whose attention kernels take. 0: every step is built anew and waited for, with the "
        "same output, as on the CPU.",
    ),
    Variable(
        "POMARIUM_STEP_SECONDS",
        "step_seconds",
        "1",
        "a number of seconds, or 0",
        _seconds_or_zero,
        "What a step of the engine is to take at most: its tokens follow from what steps were seen to take, between 16 "
        "tokens of prompts and `--max-num-batched-tokens`. 0: no bound.",
    ),
    Variable(
        "POMARIUM_MAX_REQUEST_CHARS",
        "max_request_chars",
        "auto",
        "auto or a whole number above 0",
        _count,
        "`auto` or a whole number: characters of text and token ids in one request, `/tokenize` included; more is an "
        "error (400) before a tokenizer reads it. `auto` is 16 for each token of `--max-model-len`, "
        "at least 1,000,000.",
    ),
    Variable(
        WIRE,
        "wire",
        "off",
        "off or pool",
        _wire,
        "On a Mac. `off`: nothing is wired, and macOS may page out what is idle. `pool`: weights and KV pool are "
        "wired, once, when they are made, and nothing else ever is. `pomarium serve --wire` sets it.",
    ),
    Variable(
        "VLLM_METAL_VISIBLE_DEVICES",
        "visible_devices",
        "set by the executor",
        "nothing: the executor sets it",
        str,
        "The devices of one worker. The executor sets it; a value set by the user is overridden with one warning.",
    ),
    Variable(
        "POMARIUM_MAX_BODY",
        "max_body",
        "8MiB",
        "a number of bytes such as 8388608 or 8MiB",
        _size,
        "The largest body of a request to the endpoint, in bytes or with KiB, MiB or GiB; a larger one is answered "
        "with 413.",
    ),
    Variable(
        "POMARIUM_MAX_UPLOAD",
        "max_upload",
        "200MiB",
        "a number of bytes such as 209715200 or 200MiB",
        _size,
        "The same of a file that is uploaded for batches, which has 200 MiB at most in any case.",
    ),
    Variable(
        "POMARIUM_CLIENT_TIMEOUT",
        "client_timeout",
        "30",
        "a number of seconds above 0 and at most 86400",
        _seconds,
        "Seconds that a client has for the head of a request, and for its body beyond what that takes at 16 KiB a "
        "second; then it is answered with 408.",
    ),
)

_BY_FIELD: Mapping[str, Variable] = {variable.field: variable for variable in VARIABLES}


def load(environ: Mapping[str, str]) -> Settings:
    """Parses every variable of `environ`. Raises SettingsError with one sentence for each invalid one."""
    values, errors = parse_all(environ)
    if errors:
        raise SettingsError(" ".join(errors.values()))
    return Settings(**values)  # type: ignore[arg-type]  # VARIABLES pairs each field with the parser of its type


def step_timeout(environ: Mapping[str, str]) -> float | None:
    """STEP_TIMEOUT's seconds; None: no bound."""
    return None if (text := environ.get(STEP_TIMEOUT)) is None else float(text)


def wants_mlx(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether VLLM_METAL_USE_MLX leaves our platform on. Never raises: an invalid value counts as on, for `load` to
    refuse once errors are shown to the user."""
    text = environ.get(_BY_FIELD["use_mlx"].name, "1").strip().lower()
    return text not in _FALSE


def normalise(environ: MutableMapping[str, str] = os.environ) -> None:
    """Rewrites a valid VLLM_USE_MODELSCOPE as "True" or "False", since vLLM (envs.py) takes "yes" and "on" for false.

    Never raises; an invalid value is left for `load` to refuse. To run before vLLM's model code is imported, which
    reads the variable at import.
    """
    variable = _BY_FIELD["use_modelscope"]
    text = environ.get(variable.name)
    if text is not None and text.strip().lower() in _TRUE | _FALSE:
        environ[variable.name] = str(_boolean(text.strip()))


def parse_all(environ: Mapping[str, str]) -> tuple[dict[str, Value], dict[str, str]]:
    """(field -> value of each variable that is set and valid, field -> sentence of each that is refused)."""
    values: dict[str, Value] = {}
    errors: dict[str, str] = {}
    for variable in VARIABLES:
        text = environ.get(variable.name)
        if text is None:
            continue
        try:
            values[variable.field] = variable.parse(text.strip())
        except ValueError:
            errors[variable.field] = _refusal(variable, text)
    if values.get("memory_fraction") is not None and values.get("paged_attention") is False:
        del values["memory_fraction"]
        errors["memory_fraction"] = (
            f"VLLM_METAL_MEMORY_FRACTION={environ['VLLM_METAL_MEMORY_FRACTION']!r} needs the paged cache: "
            "set it to auto, or VLLM_METAL_USE_PAGED_ATTENTION to 1."
        )
    return values, errors


def unknown(environ: Mapping[str, str]) -> tuple[str, ...]:
    """One sentence for each variable that looks like ours and is not, with the name that was probably meant."""
    names = [variable.name for variable in VARIABLES]
    sentences = []
    for name in sorted(environ):
        if name.startswith(("VLLM_METAL_", "VLLM_MLX_")) and name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            sentences.append(f"{name} is not a variable of Pomarium{f': did you mean {near[0]}?' if near else '.'}")
    return tuple(sentences)


def _refusal(variable: Variable, text: str) -> str:
    hint = " (without quotes)" if text.strip().startswith(_QUOTES) else ""
    return f"{variable.name}={text!r} is not accepted: set it to {variable.accepted}{hint}."
