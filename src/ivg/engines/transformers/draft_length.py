"""How many tokens to draft ahead: the number for which all rows are expected to finish first, from measured times.

Uses only the times of rounds and the rates of acceptance; no tensors, no models. Timings may decide, because the
number changes no token (``speculation``). With proposals accepted at rate a, a round that drafts g tokens ahead yields
n <= g tokens with probability a^(n-1) * (1 - a), else g + 1 (Leviathan et al. 2023, arXiv 2211.17192). The time until a chunk is done
is that of the rounds that its slowest row needs: with many rows one is nearly always slow, and drafts pay less than for one. 0 ahead
is guided decoding without drafts.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from functools import lru_cache

LENGTHS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Candidate numbers of tokens ahead."""
FIRST = 4
"""The number that is measured first, then 0. Drafts that pay at all mostly pay there, and a round of 0 yields one token."""
MEASUREMENTS = 2
"""Of a number before its time is believed: in the first pass of a shape kernels are prepared."""
OPTIMISM = 0.5
"""Part of the slope up to the longest measured draft that longer ones are taken to cost, so that they are tried: reading one token more
costs less and less."""
REMEASURE_AFTER = 64
"""Every so many rounds a neighbour of the best number is measured again."""
HORIZON = 32
"""Tokens to look ahead at most when times are compared."""
DECAY = 0.98
"""Weight of the round before in the running acceptance rate."""


class DraftLength:
    """Chooses the number of tokens ahead for one guidance; measures each size of batch (power of two) separately.

    Args:
        longest: tokens ahead at most.
    """

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.tested, self.agreed = 4.0, 2.8  # a prior
        self._rounds: defaultdict[int, int] = defaultdict(int)
        self._seconds: dict[tuple[int, int], deque[float]] = {}

    @property
    def acceptance(self) -> float:
        """Share of proposals accepted recently."""
        return self.agreed / self.tested

    def record_acceptance(self, tested: int, agreed: int) -> None:
        """In one round ``agreed`` of ``tested`` proposals were accepted."""
        self.tested, self.agreed = DECAY * self.tested + tested, DECAY * self.agreed + agreed

    def record_time(self, rows: int, ahead: int, seconds: float) -> None:
        """One round of ``rows`` rows, whose longest draft had ``ahead`` tokens, took so many seconds."""
        self._seconds.setdefault((rows.bit_length(), ahead), deque(maxlen=5)).append(seconds)

    def choose(self, remaining: Sequence[int]) -> int:
        """Tokens to draft ahead for rows that may grow by ``remaining`` tokens each."""
        bucket, longest = len(remaining).bit_length(), max(remaining) - 1
        options = [n for n in LENGTHS if n <= min(self.longest, longest)]
        self._rounds[bucket] += 1
        known = self._measured(bucket)
        if options[-1] > 0 and max(known, default=0) == 0:  # drafts may end sooner than asked for: then that is what was measured
            return max(n for n in options if n <= FIRST)
        if 0 not in known:
            return 0
        near = [min(tokens, HORIZON) for tokens in remaining]
        times = [self._expected_seconds(n, near) for n in options]
        best = times.index(min(times))
        if self._rounds[bucket] % REMEASURE_AFTER == 0:
            step = 1 if self._rounds[bucket] // REMEASURE_AFTER % 2 else -1
            best = min(max(best + step, 0), len(options) - 1)
        return options[best]

    def _expected_seconds(self, ahead: int, remaining: Sequence[int]) -> float:
        """Expected seconds until all rows have grown by ``remaining``, always drafting ``ahead`` tokens."""
        rate, total = round(self.acceptance, 2), 0.0
        counts = [(rounds_needed(ahead, tokens, rate), number) for tokens, number in Counter(remaining).items()]
        for n in range(max(remaining)):
            all_done, active = 1.0, 0.0
            for probabilities, number in counts:
                done = probabilities[min(n, len(probabilities) - 1)]
                all_done, active = all_done * done**number, active + number * (1 - done)
            if all_done > 0.999:
                break
            total += (1 - all_done) * self.seconds(max(1, round(active / (1 - all_done))), ahead, len(remaining))
        return total

    def seconds(self, rows: int, ahead: int, batch: int) -> float:
        """Time of a round of ``rows`` rows; of ``batch`` rows where none of that size was measured.

        The minimum of the last few; where there are none, between those of the nearest numbers, or from fewer tokens ahead.
        """
        for bucket in dict.fromkeys((rows.bit_length(), batch.bit_length())):
            if (time := self._measured(bucket).get(ahead)) is not None:
                return time
        known = self._measured(batch.bit_length())
        less, more = max((n for n in known if n < ahead), default=None), min((n for n in known if n > ahead), default=None)
        if less is None or more is None:
            slope = OPTIMISM * (known[less] - known[0]) / less if less else 0.0
            return known.get(less or 0, 1.0) + max(0.0, slope) * (ahead - (less or 0))
        return known[less] + (known[more] - known[less]) * (ahead - less) / (more - less)

    def _measured(self, bucket: int) -> dict[int, float]:
        """Seconds of a round by tokens ahead."""
        return {n: min(times) for (size, n), times in self._seconds.items() if size == bucket and len(times) >= MEASUREMENTS}


@lru_cache(maxsize=4096)
def rounds_needed(ahead: int, remaining: int, acceptance: float) -> tuple[float, ...]:
    """Probability that a row has grown by ``remaining`` tokens after 0, 1, 2 … ``remaining`` rounds."""
    left = [0.0] * remaining + [1.0]  # probability of so many tokens left
    out = []
    for _ in range(remaining + 1):
        out.append(left[0])
        after = [left[0]] + [0.0] * remaining
        for tokens in range(1, remaining + 1):
            longest = min(ahead + 1, tokens)
            for n in range(1, longest + 1):
                probability = acceptance ** (n - 1) * (1.0 if n == longest else 1 - acceptance)
                after[tokens - n] += left[tokens] * probability
        left = after
    return tuple(out)
