"""Counter-based random numbers: a draw depends on the seed, the place in the search tree and the position, and on nothing else.

So a seed reproduces a text whatever else is in the batch. The mixing function is SplitMix64's finaliser
(Steele, Lea, Flood 2014).
"""

from __future__ import annotations

_MASK = (1 << 64) - 1


def mix(*parts: int) -> int:
    """A 64-bit number from any integers; every bit of every part counts."""
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = (state ^ (part & _MASK)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state = (state ^ (state >> 31)) + 0x9E3779B97F4A7C15 & _MASK
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    return state ^ (state >> 31)


def as_seed(number: int) -> int:
    """A 64-bit number as a seed of a request, which has a sign; the draws are the same."""
    number &= _MASK
    return number - (1 << 64) if number >> 63 else number


def uniform(*parts: int) -> float:
    """A number in [0, 1) with 53 random bits."""
    return (mix(*parts) >> 11) * 2.0**-53


def child_rng_path(rng_path: int, position: int, index: int) -> int:
    """The rng_path of child ``index`` of a beam of ``position`` tokens.

    The first child inherits: so a search with W = K = 1 draws what plain sampling draws, whatever the chunk length.
    """
    return rng_path if index == 0 else mix(rng_path, position, index)
