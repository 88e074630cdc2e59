"""Arrays that kernels write in place, and the order in which that happens.

    Ordered.access(use): use(arrays, token of the last access) -> (results, token of this access)

MLX knows nothing of a write through an input: it orders launches by the arrays that one makes and another takes, and on
a GPU it puts a memory barrier (Metal) or a graph edge (CUDA) exactly there. So every access takes a one-element array
that the access before it made, and makes its own; accesses form one chain, writes behind reads included, and nobody
gets hold of the arrays outside it. `mx.depends` would order the graph but set no barrier, for the kernel would not take
the token itself. Accesses by MLX operations take it with `indices_behind` and make one with `token_behind`.
"""

from collections.abc import Callable
from typing import TypeVar

import mlx.core as mx

Result = TypeVar("Result")


class Ordered:
    """Owner of arrays that are written in place."""

    def __init__(self, *arrays: mx.array, token: mx.array | None = None) -> None:
        """Take over `arrays`, evaluated and row-major. Nobody else may use them while this lives.

        Args:
            token: int32 (1,) of the last access so far; None: there was none.
        """
        self._arrays = arrays
        self._token = mx.zeros((1,), mx.int32) if token is None else token

    @property
    def arrays(self) -> list[mx.array]:
        """What to evaluate for all accesses so far to have happened."""
        return [*self._arrays, self._token]

    def access(self, use: Callable[[tuple[mx.array, ...], mx.array], tuple[Result, mx.array]]) -> Result:
        """Launch what reads or writes the arrays, behind all earlier accesses.

        Args:
            use: from the arrays and a token int32 (1,), which every launch on them takes, to a result and the token of
                the last of these launches.
        """
        result, self._token = use(self._arrays, self._token)
        return result

    @property
    def token(self) -> mx.array:
        """int32 (1,), of the last access."""
        return self._token

    def branch(self, token: mx.array) -> "Ordered":
        """The same arrays behind the access of `token`: for accesses that become part of a graph which is run later.

        Until `join` nobody may access the arrays otherwise.
        """
        return Ordered(*self._arrays, token=token)

    def join(self, token: mx.array) -> None:
        """The accesses of a branch have been launched; `token` is that of the last."""
        self._token = token


def indices_behind(indices: mx.array, token: mx.array) -> mx.array:
    """`indices`, integers, computed behind the access of `token`: what gathers by them runs behind it too."""
    return indices + (token[0] - token[0]).astype(indices.dtype)


def token_behind(token: mx.array, gathered: mx.array) -> mx.array:
    """The token of an access by MLX operations that has copied `gathered` out of the arrays."""
    return token + (gathered.reshape(-1)[:1] != gathered.reshape(-1)[:1]).astype(token.dtype)
