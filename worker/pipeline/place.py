"""Where a worker stands among the stages of one replica: what the executor tells it before it loads anything."""

from dataclasses import dataclass

from pomarium.worker.models.stages import StageCut


@dataclass(frozen=True)
class StagePlace:
    """One stage of a plan.

    Attributes:
        rank: of this stage, from 0.
        cuts: half-open range of layers of each stage, by rank.
        epoch: number of the plan; tensors of another one are refused.
        token: shared by the stages of the plan, to prove each other.
        host: address of this machine that the other stages reach.

    Raises:
        ValueError: the ranges do not follow one another from layer 0, or one is empty.
    """

    rank: int
    cuts: tuple[tuple[int, int], ...]
    epoch: int
    token: str
    host: str

    def __post_init__(self) -> None:
        due = 0
        for first, end in self.cuts:
            if first != due or end <= first:
                raise ValueError(f"the stages {self.cuts} do not follow one another")
            due = end
        if not 0 <= self.rank < len(self.cuts):
            raise ValueError(f"there is no stage {self.rank} of {len(self.cuts)}")

    @property
    def cut(self) -> StageCut:
        """The layers of this stage."""
        return StageCut(*self.cuts[self.rank], self.cuts[-1][1])

    @property
    def last(self) -> int:
        """Rank of the last stage, which samples."""
        return len(self.cuts) - 1

    @property
    def is_first(self) -> bool:
        """This stage looks up embeddings and needs token ids."""
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        """This stage samples."""
        return self.rank == self.last


@dataclass(frozen=True)
class Surroundings:
    """What else a worker has to know of where it is.

    Attributes:
        workers: that share this machine and so its memory, this one included.
        source: what the user called the model: where the engine's folder is not on this machine, it is found by that.
        place: the stage that the worker is; None if it runs the whole model.
    """

    workers: int = 1
    source: str | None = None
    place: StagePlace | None = None
