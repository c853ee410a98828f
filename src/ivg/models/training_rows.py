"""Fingerprints of the rows that a model was trained on, in a small file beside its weights: evaluation can detect leakage.

One row of training data gives a 64-bit hash for each response, of prompt and response with runs of white space made one space. The file
holds the sorted hashes and no text: the data cannot be read from it, but a given row can be looked up.

Handles prompts, responses, folders and hub ids. Must not depend on trainers or evaluation.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ivg.errors import ModelError
from ivg.models.chat_template import prompt_text
from ivg.models.hub import find_model
from ivg.types import Prompt

FILE = "training_rows.npy"
"""Sorted uint64 hashes, as numpy writes them; 8 bytes for each response."""

Hashes = NDArray[np.uint64]


def row_hash(prompt: Prompt | None, response: str) -> int:
    """64-bit hash of a response and its prompt; ``None``: a plain text."""
    parts = ("" if prompt is None else prompt_text(prompt), response)
    text = "\x1f".join(" ".join(unicodedata.normalize("NFC", part).split()) for part in parts)
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def row_hashes(rows: Iterable[tuple[Prompt | None, str]]) -> Hashes:
    """Sorted hashes of (prompt, response) rows, each once."""
    return np.unique(np.fromiter((row_hash(prompt, response) for prompt, response in rows), np.uint64))


def write_training_rows(folder: str | Path, rows: Iterable[tuple[Prompt | None, str]], parent: str | Path | None = None) -> None:
    """Write :data:`FILE` into ``folder``: the rows, and those that ``parent``, where training began, was trained on before."""
    before = None if parent is None else read_training_rows(parent)
    own = row_hashes(rows)
    np.save(Path(folder) / FILE, own if before is None else np.union1d(own, before), allow_pickle=False)


def read_training_rows(model: str | Path) -> Hashes | None:
    """The hashes beside the weights of a folder or hub id; None: that model has none, so its training data are unknown.

    Raises:
        ModelError: the file is damaged.
    """
    from transformers.utils.hub import cached_file

    quiet = {f"_raise_exceptions_for_{kind}": False for kind in ("gated_repo", "missing_entries", "connection_errors")}
    try:
        found = cached_file(str(find_model(model, "model", weights=False)), FILE, **quiet)
    except (ModelError, OSError, ValueError):  # neither a folder nor a repository: a function, for example
        return None
    if found is None:
        return None
    try:
        hashes: Hashes = np.load(found, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise ModelError(f"cannot read {found}: {e}\n  train the model again, or remove the file: its data are then unknown") from e
    if hashes.dtype != np.uint64 or hashes.ndim != 1:
        raise ModelError(f"{found} holds {hashes.dtype} {list(hashes.shape)}\n  expected a list of 64-bit hashes (uint64)")
    return hashes


def copy_training_rows(model: str | Path, folder: str | Path) -> None:
    """The same fingerprints beside a copy of the weights; nothing where ``model`` has none."""
    if (known := read_training_rows(model)) is not None:
        np.save(Path(folder) / FILE, known, allow_pickle=False)


def seen(known: Hashes, prompt: Prompt, response: str) -> bool:
    """Was ``response`` to ``prompt``, or the text of both together, among the rows?"""
    hashes = [row_hash(prompt, response), row_hash(None, prompt_text(prompt) + response)]
    return bool(np.isin(np.array(hashes, np.uint64), known).any())


def source_of(network: Any) -> str | None:
    """Folder or hub id that a network was loaded from; None: it was made in memory."""
    return getattr(network.config, "_name_or_path", None) or None
