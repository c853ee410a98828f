"""``ivg models``: what is embedded, which methods there are, what can be set."""

from __future__ import annotations

import json
from typing import Any

HELP = "List the embedded models, the methods, and the settings of methods."


def models() -> None:
    """See HELP."""
    from rich.console import Console
    from rich.table import Table

    from ivg.embedded import names, path
    from ivg.search.methods import METHODS

    out = Console(highlight=False)
    table = Table("model", "kind", "parameters", "MB", "directory", title="Embedded models", title_justify="left", box=None, pad_edge=False)
    for name in names():
        folder = path(name)
        config = json.loads((folder / "config.json").read_text())
        weights = folder / "model.safetensors"
        table.add_row(name, _kind(config), f"{_parameters(weights):,}", f"{weights.stat().st_size / 1e6:.1f}", str(folder))
    out.print(table)
    rows = Table(
        "method", "W", "K", "L", "token guide", "selected by", "what", title="\nMethods", title_justify="left", box=None, pad_edge=False
    )
    for s in METHODS.values():
        length = "-" if s.chunk_length is None else str(s.chunk_length)
        rows.add_row(s.name, str(s.width), str(s.successors), length, s.token or "-", s.select or "-", s.summary)
    out.print(rows)
    title = "\nSettings of methods (--set KEY=VALUE; in recipes the table search)"
    settings = Table("setting", "default", "what", title=title, title_justify="left", box=None, pad_edge=False)
    for name, default, meaning in setting_rows():
        settings.add_row(name, default, meaning)
    out.print(settings)


def setting_rows() -> list[tuple[str, str, str]]:
    """(name, default, meaning) of every setting of a method."""
    from ivg.settings.schema import settings_of
    from ivg.settings.search import SearchSettings

    rows = settings_of(SearchSettings).values()
    return [(d.name, "-" if d.default in (None, ()) else str(d.default), d.setting.help) for d in rows]


def _kind(config: dict[str, Any]) -> str:
    head = config.get("ivg_value", {}).get("head")
    if head:
        return f"value, {head} head"
    return "classifier" if "SequenceClassification" in "".join(config.get("architectures") or []) else "language model"


def _parameters(weights: Any) -> int:
    """Counted from the file's header, without reading the weights."""
    with weights.open("rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    total = 0
    for name, entry in header.items():
        if name != "__metadata__":
            size = 1
            for n in entry["shape"]:
                size *= n
            total += size
    return total
