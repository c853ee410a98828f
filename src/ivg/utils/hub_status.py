"""Can the hub be reached? transformers and datasets retry for a minute where it cannot; ask here first.

Imports no torch; huggingface_hub is imported where it is needed.
"""

from __future__ import annotations

import functools
import time

PROBE_SECONDS = 5.0
"""Timeout of the probe."""


def reachable() -> bool:
    """Does the hub answer? Probed at most once a minute."""
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE and _answers(str(constants.ENDPOINT), int(time.monotonic() // 60))


def unreachable_reason() -> str:
    """Why the hub was not :func:`reachable`."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    return f"the hub ({constants.ENDPOINT}) cannot be reached"


@functools.lru_cache(maxsize=8)
def _answers(endpoint: str, minute: int) -> bool:
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint, timeout=PROBE_SECONDS)  # any answer will do
    except Exception:  # the HTTP client differs between versions: no route, no name, timeout, proxy
        return False
    return True
