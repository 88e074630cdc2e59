"""Which platform vLLM will take in this environment, and the sentence if it would not be ours.

    environ + entry points --diverted--> sentences --require--> UnsupportedError

vLLM decides at import and says nothing (vllm/platforms/__init__.py, resolve_current_platform_cls_qualname):
VLLM_TARGET_DEVICE=cpu goes before every plugin; VLLM_PLUGINS leaves out those that it does not name; of two plugins
that are active none is taken. The model would then run on torch's CPU kernels, or not at all. `pomarium` and our worker
processes ask before they import vLLM; `vllm serve` and `vllm.LLM` load `plugin.require_platform`, unless VLLM_PLUGINS
leaves out that as well. With VLLM_METAL_USE_MLX=0 our platform is not wanted and nothing is asked.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points

from pomarium.worker.errors import UnsupportedError
from pomarium.worker.settings import wants_mlx

GROUP = "vllm.platform_plugins"
OURS = "pomarium"
TARGET, ALLOWED = "VLLM_TARGET_DEVICE", "VLLM_PLUGINS"


@dataclass(frozen=True)
class Plugin:
    """An entry point of `GROUP`. distribution: that carries it."""

    name: str
    distribution: str


def installed() -> tuple[Plugin, ...]:
    """All platform plugins on this Python's path."""
    found = {Plugin(each.name, each.dist.name if each.dist is not None else "?") for each in entry_points(group=GROUP)}
    return tuple(sorted(found, key=lambda plugin: (plugin.name, plugin.distribution)))


def diverted(environ: Mapping[str, str], plugins: Iterable[Plugin]) -> list[str]:
    """A sentence for each reason why vLLM would not take our platform, or would take none."""
    if not wants_mlx(environ):
        return []
    sentences = []
    if (target := environ.get(TARGET, "")).lower() == "cpu":
        sentences.append(
            f"{TARGET}={target} makes vLLM ignore Pomarium's platform and compute with torch: unset it, or set "
            "VLLM_METAL_USE_MLX=0 if vLLM's own CPU backend is meant."
        )
    allowed = environ[ALLOWED].split(",") if ALLOWED in environ else None
    if allowed is not None and OURS not in allowed:
        value = environ[ALLOWED]
        sentences.append(
            f"{ALLOWED}={value} leaves out Pomarium's platform, so that vLLM would not compute with MLX: set it to "
            f"{','.join([*filter(None, allowed), OURS])}, or unset it."
        )
    others = [each for each in plugins if each.name != OURS and (allowed is None or each.name in allowed)]
    if others:
        names = ", ".join(f"{each.name} of the package {each.distribution}" for each in others)
        kept = [OURS] if allowed is None else [name for name in allowed if name not in {each.name for each in others}]
        sentences.append(
            f"Another platform plugin of vLLM is installed ({names}), and vLLM takes one only: uninstall it, or set "
            f"{ALLOWED}={','.join(dict.fromkeys([*kept, OURS]))}."
        )
    return sentences


def require(environ: Mapping[str, str] = os.environ) -> None:
    """Raises UnsupportedError if vLLM would not take our platform although it is wanted."""
    if sentences := diverted(environ, installed()):
        raise UnsupportedError(sentences[0])
