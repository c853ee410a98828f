"""Can the hub be reached? transformers and datasets try again for a minute where nobody answers; ask here before asking them.

Imports no torch; huggingface_hub is imported where it is needed.
"""

from __future__ import annotations

import functools
import time

PROBE_SECONDS = 5.0
"""The hub has this long to answer whether it is there at all."""


def reachable() -> bool:
    """Does the hub answer? Asked once in a minute."""
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE and _answers(str(constants.ENDPOINT), int(time.monotonic() // 60))


def why_not() -> str:
    """Why the hub was not :func:`reachable`, in words."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE forbids asking the hub"
    return f"the hub ({constants.ENDPOINT}) cannot be reached"


@functools.lru_cache(maxsize=8)
def _answers(endpoint: str, minute: int) -> bool:
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint, timeout=PROBE_SECONDS)  # any answer will do
    except Exception:  # whatever the client of the day raises: no route, no name, no time, no proxy
        return False
    return True
