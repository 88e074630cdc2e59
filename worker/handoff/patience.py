"""How often and how long a sender tries to resume: a pure clock, told when connections end and when chunks pass."""

from pomarium.worker.handoff.settings import HandoffSettings


class Patience:
    """Counts from the first loss after the last progress, so that a path that always breaks again counts as away."""

    def __init__(self, settings: HandoffSettings) -> None:
        self._settings = settings
        self._pause_s = settings.pause_s
        self._since: float | None = None

    def progress(self) -> None:
        """A chunk was accepted, or none was left to be sent."""
        self._since, self._pause_s = None, self._settings.pause_s

    def lost(self, now: float) -> float | None:
        """A connection ended, or could not be opened, at `now` (seconds): seconds to pause, None to give up."""
        if self._since is None:
            self._since = now
        left = self._since + self._settings.away_s - now
        if left <= 0:
            return None
        pause_s = min(self._pause_s, left)
        self._pause_s = min(2 * self._pause_s, self._settings.max_pause_s)
        return pause_s
