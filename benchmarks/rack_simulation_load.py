"""A day of requests: a load curve with two peaks and bursts --requests--> when each comes and how long it computes.

Arrivals are a Poisson process whose rate is constant for a minute at a time; computing times are lognormal. A replica
takes up to `slots` requests at once and answers each at the same rate, however many there are.
"""

import math
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

DAY_S = 86_400.0
MINUTE_S = 60.0


@dataclass(frozen=True)
class Peak:
    """A hill of the load curve: hour of its top, half its width in hours (a normal curve's deviation), height."""

    hour: float
    width_h: float
    height: float


@dataclass(frozen=True)
class Burst:
    """More load at once: hour at which it begins, minutes, share of the peak load that is added."""

    hour: float
    minutes: float
    share: float


@dataclass(frozen=True)
class Curve:
    """Load over a day as a share of its highest without bursts. Assumed: the hours of an office, and three bursts.

    Attributes:
        night: what is left when nobody works.
    """

    night: float = 0.002
    peaks: tuple[Peak, ...] = (Peak(10.5, 1.5, 0.998), Peak(15.5, 1.8, 0.9))
    bursts: tuple[Burst, ...] = (Burst(4, 5, 0.3), Burst(11, 10, 0.4), Burst(21, 10, 0.3))

    def at(self, second: float) -> float:
        """The share at a second; each day is like the first."""
        hour = second % DAY_S / 3600
        hills = (peak.height * math.exp(-(((hour - peak.hour) / peak.width_h) ** 2) / 2) for peak in self.peaks)
        burst = sum(one.share for one in self.bursts if one.hour <= hour < one.hour + one.minutes / 60)
        return self.night + max(hills, default=0.0) + burst


@dataclass(frozen=True)
class Requests:
    """In the order of their coming.

    Attributes:
        times: seconds after midnight.
        work: seconds that a slot computes for each.
    """

    times: Sequence[float]
    work: Sequence[float]


def requests(curve: Curve, peak_rate: float, mean_s: float, sigma: float, seed: int, length_s: float) -> Requests:
    """From midnight on.

    Args:
        peak_rate: requests a second where the curve is one.
        mean_s: mean computing time, seconds. sigma: deviation of its logarithm.
        length_s: no request comes later, seconds.
    """
    source = random.Random(seed)
    mu = math.log(mean_s) - sigma * sigma / 2
    times, work = array("d"), array("d")
    for minute in range(math.ceil(length_s / MINUTE_S)):
        rate = peak_rate * curve.at(minute * MINUTE_S)
        end = min((minute + 1) * MINUTE_S, length_s)
        # A Poisson process has no memory: to begin anew at each minute with that minute's rate is exact.
        time = minute * MINUTE_S + source.expovariate(rate) if rate > 0 else end
        while time < end:
            times.append(time)
            work.append(source.lognormvariate(mu, sigma))
            time += source.expovariate(rate)
    return Requests(times, work)
