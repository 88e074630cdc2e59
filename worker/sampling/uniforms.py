"""Random numbers of the draw: a pure function of (request seed, position), with no generator state.

A request therefore draws the same tokens in any batch and order, after preemption, on any number of stages and on
another replica. The function is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014) used as a counter: output number `position` of the generator whose state starts at the mixed seed. One
output per row feeds an inverse CDF. Gumbel noise would need V outputs per row: at V = 49152 and 32 rows 1.6 million
hashes and twice as many logarithms per step, for the same distribution.
"""

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

_MASK = (1 << 64) - 1
_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def request_seed(engine_seed: int, request_id: str) -> int:
    """Seed in [0, 2**64) of a request that brought none."""
    key = (engine_seed & _MASK).to_bytes(8, "little")
    return int.from_bytes(blake2b(request_id.encode(), digest_size=8, key=key).digest(), "little")


def random_bits(seeds: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """uint64 (R,) for R seeds (any integers, taken modulo 2**64) and R positions (>= 0)."""
    state = _mix(np.array([seed & _MASK for seed in seeds], dtype=np.uint64))
    return _mix(state + _GAMMA * (np.array(positions, dtype=np.uint64) + np.uint64(1)))


def uniform_pairs(bits: np.ndarray) -> np.ndarray:
    """float32 (R, 2), two independent uniforms in [0, 1) out of each uint64 of `bits` (R,): bits 63-40 and 39-16.

    24 bits are what float32 holds: more could round to 1.
    """
    pairs = np.stack([bits >> np.uint64(40), (bits >> np.uint64(16)) & np.uint64(0xFFFFFF)], axis=1)
    return pairs.astype(np.float32) * np.float32(2.0**-24)


def uniform(bits: int) -> float:
    """A uniform in [0, 1) with 53 bits."""
    return (bits >> 11) * 2.0**-53


def _mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, uint64 to uint64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = z ^ (z >> np.uint64(31))
    return mixed
