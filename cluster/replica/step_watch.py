"""How long an engine's step has been running, seen from its replica: the engine itself tells nothing until it ends.

    vLLM's statistics, one record per step --ended--> StepWatch <--look-- each WATCH_S: are requests unfinished?
                                                         |--running_s--> pomarium_step_running_seconds
                                                         '--word--> /health: ok, or ok but slow

A model whose steps take long is served, so /health stays 200 and says it in words: who ends engines that are not well
would end one that computes, and the next would have to begin anew.
"""

OK = "ok"
SLOW = 5.0
"""How many times what a step is to take is worth a word."""


class StepWatch:
    """Times are seconds of one monotonic clock.

    Args:
        target_s: what a step is to take at most, 1 s where that is not bound.
    """

    def __init__(self, target_s: float) -> None:
        self._slow_s = SLOW * (target_s or 1.0)
        self._since: float | None = None
        self._last_s = 0.0

    def look(self, now: float, busy: bool) -> None:
        """`busy`: requests are unfinished. A step runs from when they were first seen, or the step before ended."""
        if not busy:
            self._since = None
        elif self._since is None:
            self._since = now

    def ended(self, now: float) -> None:
        """A step has ended."""
        if self._since is not None:
            self._last_s, self._since = now - self._since, now

    def running_s(self, now: float) -> float:
        """Seconds of the step that runs; 0 if none does."""
        return 0.0 if self._since is None else now - self._since

    def word(self, now: float) -> str:
        """OK, or a sentence without its full stop that begins with it."""
        if (running_s := self.running_s(now)) > self._slow_s:
            return f"{OK}, but no step of its engine has ended for {running_s:.0f} s"
        if self._last_s > self._slow_s:
            return f"{OK}, but its engine's last step took {self._last_s:.0f} s"
        return OK
