"""How a batch goes, and how it went: counts, tokens, the share that caches gave; a bar, a summary, Prometheus series.

every answer --Tally.add--> Tally --postfix--> tqdm's bar      --summary--> the last line      --Series--> /metrics
"""

import json
import time
from dataclasses import dataclass, field

from pomarium.cluster.batch.lines import Answer


@dataclass
class Tally:
    """What happened in this run.

    Attributes:
        results, errors: lines answered. prompt, cached, generated: tokens, of `usage` in the answers.
        began: when the first engine was ready, by the monotonic clock.
    """

    results: int = 0
    errors: int = 0
    prompt: int = 0
    cached: int = 0
    generated: int = 0
    began: float = field(default_factory=time.monotonic)

    def add(self, answer: Answer) -> None:
        """An engine's answer."""
        if not answer.accepted:
            self.errors += 1
            return
        self.results += 1
        usage = json.loads(answer.body).get("usage") or {}
        # Responses counts the same by other names.
        details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
        self.prompt += usage.get("prompt_tokens") or usage.get("input_tokens") or 0
        self.generated += usage.get("completion_tokens") or usage.get("output_tokens") or 0
        self.cached += details.get("cached_tokens") or 0

    def reject(self) -> None:
        """A line that no engine has seen."""
        self.errors += 1

    @property
    def seconds(self) -> float:
        """Since the first engine was ready."""
        return time.monotonic() - self.began

    @property
    def postfix(self) -> str:
        """What the bar says beside rows and time."""
        rate = self.generated / max(self.seconds, 1e-9)
        return f"{rate:.0f} tok/s, {self._cached_share:.0%} cached, {self.errors} failed"

    @property
    def _cached_share(self) -> float:
        return self.cached / self.prompt if self.prompt else 0.0

    def summary(self, out: str, errors: str, before: int) -> str:
        """A few lines. `before`: answers that earlier runs had written."""
        earlier = f"; {before} were answered before" if before else ""
        speed = self.generated / max(self.seconds, 1e-9)
        return (
            f"{self.results} results in {out}, {self.errors} errors in {errors}{earlier}\n"
            f"{self.prompt} prompt tokens, {self._cached_share:.0%} of them cached; {self.generated} generated, "
            f"{speed:.1f} tokens/s in {self.seconds:.1f} s"
        )


class Series:
    """The same as Prometheus series of the Ray that this process is connected to."""

    def __init__(self, job: str) -> None:
        from ray.util.metrics import Counter

        tags = {"job": job}
        self._lines = Counter("pomarium_batch_lines", "Answered lines of a batch.", ("job", "outcome"))
        self._tokens = Counter("pomarium_batch_tokens", "Tokens of a batch.", ("job", "kind"))
        self._lines.set_default_tags(tags)
        self._tokens.set_default_tags(tags)
        self._told = Tally()

    def tell(self, tally: Tally) -> None:
        """Bring the series to `tally`."""
        told = self._told
        for outcome, now, before in (("result", tally.results, told.results), ("error", tally.errors, told.errors)):
            if now > before:
                self._lines.inc(now - before, {"outcome": outcome})
        for kind, now, before in (
            ("prompt", tally.prompt, told.prompt),
            ("cached", tally.cached, told.cached),
            ("generated", tally.generated, told.generated),
        ):
            if now > before:
                self._tokens.inc(now - before, {"kind": kind})
        self._told = Tally(tally.results, tally.errors, tally.prompt, tally.cached, tally.generated)
