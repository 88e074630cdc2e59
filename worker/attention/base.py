"""The seam between models and attention: paged attention over the rows of one step.

    Batch --AttentionBackend.prepare--> StepAttention --attend, once per layer--> attention output

`prepare` turns a step's block tables into index arrays once; every layer then shares them. A backend is the MLX-op one
(`gathered`) or, on a GPU, the kernels'. Rows are tokens, (T, heads, head_dim); there is no batch or length axis.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import mlx.core as mx

from pomarium.kernels.ordered import Ordered
from pomarium.kernels.reference import Scoring
from pomarium.worker.batch import Batch


class StepAttention(Protocol):
    """Attention of one step."""

    def attend(
        self,
        layer: int,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scoring: Scoring,
    ) -> mx.array:
        """Store the rows' K and V, then attend causally over everything cached of each row's own sequence.

        Args:
            layer: index of the layer; its cache group gives the window.
            queries: (T, num_heads, head_dim), RoPE applied. keys: (T, num_kv_heads, head_dim).
            values: (T, num_kv_heads, value_dim).
            scoring: from the products of queries and keys to scores.

        Returns:
            (T, num_heads, value_dim) of the queries' dtype.
        """
        ...

    def attend_shared(
        self,
        layer: int,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scoring: Scoring,
    ) -> mx.array:
        """As `attend`, of a layer that keeps nothing and attends over what `layer` keeps.

        Args:
            layer: the owner, whose `attend` of this step came before. keys, values: the same that it was given, for
                backends that read the step's own rows there; storing them again would change nothing.
        """
        ...

    def attend_latents(
        self,
        layer: int,
        queries: mx.array,
        latents: mx.array,
        rank: int,
        scoring: Scoring,
    ) -> mx.array:
        """As `attend`, of a layer that keeps latents, which its heads share (absorbed multi-head latent attention).

        Args:
            queries: (T, num_heads, rank + rope_dim), in the latents' space; the last rope_dim elements rotated.
            latents: (T, rank + rope_dim), the rotated key behind the latent. Its first `rank` elements are the value.

        Returns:
            (T, num_heads, rank) of the queries' dtype.
        """
        ...


class InGraphs(Protocol):
    """Attention of steps of one row per sequence, in a graph that serves many of them (decode_graphs)."""

    @property
    def ordered(self) -> Sequence[Ordered]:
        """All that such a step writes in place."""
        ...

    def bucket(self, batch: Batch, rows: int) -> tuple[Any, list[list[mx.array]]] | None:
        """What steps that share a graph agree in, hashable, and the arrays that change from one to the next.

        Args:
            batch: of one row per sequence. rows: that it is padded to, with such as store nowhere and see nothing.

        Returns:
            None before any layer has asked for a plan.

        Raises:
            ValueError: a block table does not hold its sequence.
        """
        ...

    def step(
        self, rows: int, agreed: Any, arrays: Sequence[Sequence[mx.array]], ordered: Sequence[Ordered]
    ) -> StepAttention:
        """From what `bucket` gave, and branches of `ordered` in its order."""
        ...


class AttentionBackend(Protocol):
    """Maker of StepAttention; owns the pool."""

    @property
    def in_graphs(self) -> InGraphs | None:
        """None where a graph does not serve another step."""
        ...

    @property
    def arrays(self) -> list[mx.array]:
        """Arrays that a step writes in place; evaluate them with its results."""
        ...

    def prepare(self, batch: Batch) -> StepAttention:
        """Index arrays of a step."""
        ...
