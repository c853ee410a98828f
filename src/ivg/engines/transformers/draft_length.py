"""How many tokens to draft ahead: as many as have all rows done soonest, here and now.

Knows: what rounds took, how often proposals were accepted. Must not know tensors or models. Timings may decide, because the
number changes no token (``engine.speculation``). With proposals accepted at rate a, a round that drafts g tokens ahead yields
n <= g tokens with probability a^(n-1) * (1 - a), else g + 1 (Leviathan et al. 2023). The time until a chunk is done is that of the
rounds that its slowest row needs: with many rows one is nearly always unlucky, and drafts pay less than for one. 0 ahead is
guided decoding as without drafts.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from functools import lru_cache

LENGTHS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Numbers of tokens ahead among which is chosen."""
TRIED_FIRST = (0, 1, 2)
TRIES = 2
RETRY = 64
"""Every so many rounds a neighbour of the best is measured again."""
HORIZON = 32
"""Tokens to look ahead at most when times are compared."""
FADING = 0.98
"""Weight of what was seen a round earlier, in the acceptance rate."""


class DraftLength:
    """Chooses the number of tokens ahead for one guidance; measures for each size of batch (power of two) by itself.

    Args:
        most: tokens ahead at most.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.tested, self.agreed = 4.0, 2.8  # before anything was seen
        self._rounds: defaultdict[int, int] = defaultdict(int)
        self._seconds: dict[tuple[int, int], deque[float]] = {}

    @property
    def acceptance(self) -> float:
        """Share of proposals accepted of late."""
        return self.agreed / self.tested

    def saw(self, tested: int, agreed: int) -> None:
        """Of ``tested`` proposals ``agreed`` were accepted in a round."""
        self.tested, self.agreed = FADING * self.tested + tested, FADING * self.agreed + agreed

    def took(self, rows: int, ahead: int, seconds: float) -> None:
        """A round of so many rows that drafted ``ahead`` tokens."""
        self._seconds.setdefault((rows.bit_length(), ahead), deque(maxlen=5)).append(seconds)

    def choose(self, rooms: Sequence[int]) -> int:
        """Tokens to draft ahead for rows that may grow by ``rooms`` tokens each."""
        bucket, longest = len(rooms).bit_length(), max(rooms) - 1
        options = [n for n in LENGTHS if n <= min(self.most, longest)]
        self._rounds[bucket] += 1
        for n in options:
            if n in TRIED_FIRST and len(self._seconds.get((bucket, n), ())) < TRIES:
                return n
        near = [min(room, HORIZON) for room in rooms]
        times = [self._until_done(n, near) for n in options]
        best = times.index(min(times))
        if self._rounds[bucket] % RETRY == 0:
            step = 1 if self._rounds[bucket] // RETRY % 2 else -1
            best = min(max(best + step, 0), len(options) - 1)
        return options[best]

    def _until_done(self, ahead: int, rooms: Sequence[int]) -> float:
        """Expected seconds until all rows are through their rooms, always drafting ``ahead`` tokens."""
        rate, total = round(self.acceptance, 2), 0.0
        counts = [(rounds_needed(ahead, room, rate), number) for room, number in Counter(rooms).items()]
        for n in range(max(rooms)):
            nobody, active = 1.0, 0.0
            for chances, number in counts:
                done = chances[min(n, len(chances) - 1)]
                nobody, active = nobody * done**number, active + number * (1 - done)
            if nobody > 0.999:
                break
            total += (1 - nobody) * self.seconds(max(1, round(active / (1 - nobody))), ahead, len(rooms))
        return total

    def seconds(self, rows: int, ahead: int, among: int) -> float:
        """What a round of ``rows`` takes; of ``among`` rows where none of so few was measured.

        The best of the last few, else from the line through those of fewer tokens ahead.
        """
        for bucket in dict.fromkeys((rows.bit_length(), among.bit_length())):
            if (bucket, ahead) in self._seconds:
                return min(self._seconds[bucket, ahead])
        known = {n: min(times) for (b, n), times in self._seconds.items() if b == among.bit_length()}
        less = max((n for n in known if n < ahead), default=0)
        if not less or 0 not in known:
            return known.get(less, 1.0)
        return known[less] + (ahead - less) * max(0.0, known[less] - known[0]) / less


@lru_cache(maxsize=4096)
def rounds_needed(ahead: int, room: int, acceptance: float) -> tuple[float, ...]:
    """Probability that a row is through ``room`` tokens after 0, 1, 2 … ``room`` rounds."""
    left = [0.0] * room + [1.0]  # probability of so many tokens left
    out = []
    for _ in range(room + 1):
        out.append(left[0])
        after = [left[0]] + [0.0] * room
        for tokens in range(1, room + 1):
            longest = min(ahead + 1, tokens)
            for n in range(1, longest + 1):
                chance = acceptance ** (n - 1) * (1.0 if n == longest else 1 - acceptance)
                after[tokens - n] += left[tokens] * chance
        left = after
    return tuple(out)
