"""How many tokens to draft ahead: as many as give the most tokens per second here and now.

Knows: what rounds took, how often proposals were accepted. Must not know tensors or models. Timings may decide, because the
number changes no token (``engine.speculation``). With proposals accepted at rate a, a round that drafts g tokens ahead yields
1 + a + ... + a^g tokens on average (Leviathan et al. 2023, equation 1); 0 ahead is guided decoding as without drafts.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence

LENGTHS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Numbers of tokens ahead among which is chosen."""
TRIED_FIRST = (0, 1, 2)
TRIES = 2
RETRY = 64
"""Every so many rounds a neighbour of the best is measured again."""
FADING = 0.98
"""Weight of what was seen a round earlier, in the acceptance rate."""


class Pace:
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
        rates = [self._expected(n, rooms) / self.seconds(len(rooms), n) for n in options]
        best = rates.index(max(rates))
        if self._rounds[bucket] % RETRY == 0:
            step = 1 if self._rounds[bucket] // RETRY % 2 else -1
            best = min(max(best + step, 0), len(options) - 1)
        return options[best]

    def _expected(self, ahead: int, rooms: Sequence[int]) -> float:
        """Tokens that a round yields, over all rows."""
        gains = [1.0]
        for _ in range(ahead):
            gains.append(gains[-1] * self.acceptance)
        return sum(sum(gains[:room]) for room in rooms)

    def seconds(self, rows: int, ahead: int) -> float:
        """What a round takes: the best of the last few measured, else from the line through those of fewer tokens ahead."""
        bucket = rows.bit_length()
        known = {n: min(times) for (b, n), times in self._seconds.items() if b == bucket}
        if ahead in known:
            return known[ahead]
        less = max((n for n in known if n < ahead), default=0)
        if not less or 0 not in known:
            return known.get(less, 1.0)
        return known[less] + (ahead - less) * max(0.0, known[less] - known[0]) / less
