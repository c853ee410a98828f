"""Where a run happened and what it used: processor, memory, versions, commit; peak memory of a piece of work.

None of it influences results; none of it is written to transcripts or scores.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from time import monotonic, process_time
from typing import Any


def machine() -> dict[str, Any]:
    """Processor, cores, memory and versions."""
    import psutil
    import torch
    import transformers

    from ivg.utils.version import VERSION

    out: dict[str, Any] = {
        "processor": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "ivg": VERSION,
    }
    if torch.cuda.is_available():
        out["gpu"] = torch.cuda.get_device_name()
    return out


def run_metadata() -> dict[str, Any]:
    """Commit, command and machine of this process."""
    return {"commit": commit(), "command": command(), "machine": machine()}


def commit(file: Path | None = None) -> str | None:
    """The checkout's commit (with ``+`` where files differ from it); None without git, or where git does not know this very code.

    A package installed inside another project's checkout is not that project's.
    """
    file = file or Path(__file__)
    try:
        _git(file.parent, "ls-files", "--error-unmatch", file.name)
        head = _git(file.parent, "rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git(file.parent, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def command() -> str:
    """The command line of this process, as it can be typed again."""
    name, spec = Path(sys.argv[0]).name, getattr(sys.modules["__main__"], "__spec__", None)
    module = None if spec is None else spec.name.removesuffix(".__main__")
    program = ["ivg"] if name == "ivg" or module == "ivg" else [name] if module is None else ["python", "-m", module]
    return shlex.join([*program, *sys.argv[1:]])


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def _cpu_model() -> str:
    """Psutil does not know it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def on_gpu(device: str | None = None) -> bool:
    """Is memory that of a GPU? ``device`` None: wherever there is one."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_available() and not (device or "cuda").startswith("cpu")


def malloc_trim() -> None:
    """Return freed memory to the system, so that peaks are of what is in use."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak() -> None:
    """Peak memory is counted from now on."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: str | None = None) -> int | None:
    """Peak memory since :func:`reset_peak`: of the GPU (see :func:`on_gpu`), else of this process (weights included)."""
    if on_gpu(device):
        return int(sys.modules["torch"].cuda.max_memory_allocated())
    with suppress(OSError, StopIteration, ValueError):  # psutil has no peak on Linux
        line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return None


def resident_bytes(device: str | None = None) -> int:
    """Memory in use now, counted as :func:`peak_bytes` counts."""
    if on_gpu(device):
        return int(sys.modules["torch"].cuda.memory_allocated())
    import psutil

    return int(psutil.Process().memory_info().rss)


def cpu_contention(begin: tuple[float, float, float]) -> float | None:
    """Share of the machine's processors that other processes took since ``begin`` = :func:`cpu_clock`.

    None for less than a second: the system counts in hundredths of a second.
    """
    wall, busy, own = (now - then for now, then in zip(cpu_clock(), begin, strict=True))
    return max(0.0, busy - own) / (wall * (os.cpu_count() or 1)) if wall >= 1 else None


def cpu_clock() -> tuple[float, float, float]:
    """Seconds: on the wall, of all processors at work, of this process."""
    import psutil

    times = psutil.cpu_times()
    idle = ("idle", "iowait", "guest", "guest_nice")  # guests are part of user and nice
    busy = sum(seconds for name, seconds in times._asdict().items() if name not in idle)
    return monotonic(), busy, process_time()
