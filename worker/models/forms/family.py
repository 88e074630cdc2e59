"""What is known of a model family for the translation of its config.json: data only (families.py holds the table)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import Any

Config = Mapping[str, Any]

SCALED = frozenset({"default", "linear", "llama3", "yarn", "longrope", "dynamic", "proportional", "mrope"})
"""What mlx_lm/models/rope_utils.py (`initialize_rope`) takes."""


class Places(Enum):
    """Where mlx-lm's definition looks for what transformers 5 calls `rope_parameters`."""

    FLAT = "rope_theta, rope_scaling and their kin"
    THETA_OF_ITS_OWN = "rope_theta taken out of a flat rope_parameters, the rest not read"
    AS_IT_IS = "rope_parameters, flat or per layer type, all of it"
    NONE = "nowhere: positions are not rotated"


@dataclass(frozen=True)
class Rope:
    """How an mlx-lm definition reads what positions are rotated by.

    Attributes:
        places: see Places; the keys below matter for FLAT.
        theta, scaling, fraction: mlx-lm's keys; None where its definition has none.
        sliding_theta: key of sliding layers' base; None if all layers rotate alike.
        types: the rope types that its definition computes. A type it does not is refused.
        whole: the rotated fraction of a head that it computes where it reads none.
        rescaled: its definition builds nn.RoPE, in whose place mends.py puts a scaled one.
        unscaled: the scaling that does nothing, where its definition cannot do without one.
    """

    places: Places = Places.FLAT
    theta: str | None = "rope_theta"
    scaling: str | None = "rope_scaling"
    fraction: str | None = None
    sliding_theta: str | None = None
    types: frozenset[str] = SCALED
    whole: float = 1.0
    rescaled: bool = False
    unscaled: Callable[[Config], dict[str, Any]] | None = None


def plain_rope(**changes: Any) -> Rope:
    """The Rope of definitions that build nn.RoPE whatever scaling a config names."""
    return Rope(**{"types": frozenset({"default", "linear", "llama3", "yarn"}), "rescaled": True, **changes})


Derivation = Callable[[Config], Mapping[str, Any]]
"""From a config in transformers' form to keys in mlx-lm's; ValueError with a clause of what has no form in mlx-lm."""


@dataclass(frozen=True)
class Family:
    """A model type that transformers and mlx-lm share.

    Attributes:
        rope: see Rope.
        renamed: transformers' key -> mlx-lm's, of the same value.
        implied: keys that mlx-lm's definition asks for and transformers does not write -> what its definition does.
        computed: keys that mlx-lm's definition does not read -> the values that it stands for, where these are not just
            transformers' default (unread.json).
        derive: keys that take a computation, of those in `handled`.
        windowed: transformers lets layers attend within a window and mlx-lm's definition does not: windows.py does.
        exact_to: key of the context up to which mlx-lm's definition attends as transformers' does; None: to any.
        refused: why the family is not served, whatever its config says; None if it is.
    """

    rope: Rope = Rope()
    renamed: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    implied: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    computed: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: MappingProxyType({}))
    derive: Derivation | None = None
    handled: frozenset[str] = frozenset()
    windowed: bool = False
    exact_to: str | None = None
    refused: str | None = None
