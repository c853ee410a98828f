"""Which network a reference to a language model means, and with which adapter it is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ivg.errors import ModelError
from ivg.models.adapter_directory import find_adapter
from ivg.models.hub import has_tokenizer
from ivg.models.loading import LoadOptions
from ivg.settings.models import ModelRef, ModelSource


@dataclass(frozen=True)
class Network:
    """A network, and the adapter that it is read with.

    Attributes:
        path: of the network: directory, hub id, or whatever names a model.
        adapter: directory of a PEFT adapter.
        scale: factor of what the adapter changes.
    """

    path: str
    adapter: Path | None = None
    scale: float = 1.0

    @property
    def tokenizer(self) -> str:
        """Where its tokenizer is: in the adapter's directory, if there is one."""
        return str(self.adapter) if self.adapter is not None and has_tokenizer(self.adapter) else self.path


def resolve(model: ModelSource, what: str, options: LoadOptions) -> Network:
    """The network of ``model``, whose path may be an adapter's own; adapters of the hub are downloaded.

    Args:
        model: directory or hub id, of a network or of an adapter; or a reference.
        what: the model's role, for errors.
        options: for the hub.

    Raises:
        ModelError: no adapter of a language model there, or one that does not say what it is of.
    """
    ref = model if isinstance(model, ModelRef) else ModelRef(path=str(model))
    source = find_adapter(ref.path, ref.adapter, ref.scale, what, replace(options, revision=None).hub())
    if source is None:
        return Network(ref.path)
    if source.value_notes is not None or source.labels is not None:
        raise ModelError(f"{what}: the adapter {str(source.folder)!r} is no adapter of a language model\n  give it as --value or --reward")
    return Network(source.base, source.folder, source.scale)


def without_adapter(options: LoadOptions) -> LoadOptions:
    """``options`` for the network alone."""
    return replace(options, adapter=None, scale=None)
