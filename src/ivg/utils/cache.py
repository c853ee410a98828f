"""The folder that holds what can be made again, and digests of files, which are kept there. Imports no torch."""

from __future__ import annotations

import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path

CACHE_FROM = 64 << 20
"""Bytes from which the digest of a file is cached, by path, size, modification time and inode."""
_SETTLE_SECONDS = 2.0
"""A file modified so recently is not cached: clocks of file systems are coarse."""


def cache_folder(name: str) -> Path:
    """``name`` below ``IVG_CACHE``, or below ``ivg`` in ``XDG_CACHE_HOME`` or ``~/.cache``."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("IVG_CACHE") or user / "ivg") / name


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits; that of a large file is cached."""
    stat = path.stat()
    if stat.st_size < CACHE_FROM:
        return _digest(path)
    key = f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ino}"
    cached = cache_folder("digests") / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.sha256"
    with suppress(OSError, ValueError):
        digest = cached.read_text(encoding="ascii").strip()
        if len(digest) == 64:
            return digest
    digest = _digest(path)
    if time.time() - stat.st_mtime > _SETTLE_SECONDS and path.stat().st_mtime_ns == stat.st_mtime_ns:
        with suppress(OSError):
            cached.parent.mkdir(parents=True, exist_ok=True)
            partial = cached.with_suffix(f".{os.getpid()}")
            partial.write_text(digest, encoding="ascii")
            partial.replace(cached)
    return digest


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
