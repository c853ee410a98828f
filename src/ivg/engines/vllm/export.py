"""Exports a composite for vLLM: a directory with config.json, tokenizer and one tensor. Weights stay where they are, by reference.

Reads no weights but the names of a value network's tensors, and needs no vLLM.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file

from ivg.engines.vllm.config import HeadKind, IVGConfig, IVGValueConfig, Submodel
from ivg.errors import ConfigError
from ivg.models.added_tokens import added_tokens
from ivg.models.generation_config import read_generation_config
from ivg.models.hub import find_model
from ivg.models.loading import LoadOptions, eos_ids, load_config, load_tokenizer
from ivg.models.network import Network, resolve, without_adapter
from ivg.models.plain_lora import check_plain_lora, lora_digest
from ivg.models.vocabulary import Vocabulary
from ivg.settings.models import ModelSource
from ivg.utils.cache import cache_folder


@dataclass(frozen=True)
class Guide:
    """A value that guides tokens inside the composite: a pair of models, or one.

    Attributes:
        name: of the group: ``implicit``, ``arm``, ``explicit`` …
        parts: (name in usage, path or reference, sign) of its models.
        head: ``vocabulary`` if the model is a value network.
    """

    name: str
    parts: tuple[tuple[str, ModelSource, float], ...]
    head: HeadKind = "language"


def pair(tuned: ModelSource, untuned: ModelSource, name: str = "implicit") -> Guide:
    """The implicit value of a tuned model and the untuned one that it was tuned from."""
    own = "" if name == "implicit" else f"{name}_"
    return Guide(name, ((f"{own}tuned", tuned, 1.0), (f"{own}untuned", untuned, -1.0)))


def export_composite(
    base: ModelSource,
    guides: Sequence[Guide],
    folder: str | Path,
    *,
    betas: Mapping[str, float] | None = None,
    options: LoadOptions | None = None,
) -> Path:
    """Write the directory of a composite; vLLM loads it like any model, where this package is installed.

    Models of one path are one set of weights there; what their LoRA adapters change is added to it.

    Args:
        base: directory or hub id, of a network or of an adapter; or a reference, of which the path, the adapter and its scale are used.
        guides: the first is the one that ``ivg_beta`` weighs.
        folder: a directory of its own, created if necessary; one with another kind of model is refused.
        betas: default weights by the guides' names; default: 1 for the first, 0 for the others.
        options: revision, trust_remote_code.

    Raises:
        ConfigError: no guide, two of one name, something else in ``folder``.
        VocabularyError: a guide whose token ids mean something else than the base's.
        ModelError: a model that cannot be read, an adapter that is more than LoRA.
    """
    options, folder = without_adapter(options or LoadOptions()), Path(folder)
    names = [guide.name for guide in guides]
    if len(set(names)) < len(names):
        raise ConfigError(f"got several guides of one name: {', '.join(names)}\n  expected each once")
    if unknown := set(betas or {}) - set(names):
        raise ConfigError(
            f"got a weight for {', '.join(sorted(unknown))}\n  expected guides of this composite: {', '.join(names) or 'none'}"
        )
    first = resolve(base, "base", options)
    vocabulary = _vocabulary("base", first, options)
    parts = [_part("base", first, options)]
    columns: dict[str, int] = {}
    smallest: dict[str, Vocabulary] = {}
    for guide in guides:
        for name, path, sign in guide.parts:
            found = resolve(path, name, options)
            own = _vocabulary(name, found, options)
            vocabulary.require_same(own, "inside vLLM guides read the base's token ids; use the transformers engine for this pair")
            parts.append(replace(_part(name, found, options, guide.name, sign, guide.head), tokenizer_eos_id=own.eos_id))
            # padding rows have logits, too: what all tokenizers of the guide know counts, as in the transformers engine
            smallest[guide.name] = min(smallest.get(guide.name, own), own, key=lambda known: known.size)
            columns[guide.name] = min(columns.get(guide.name, own.size), own.size, parts[-1].vocab_size)
    unknown_to = {name: added_tokens(vocabulary, own, columns[name], parts[0].vocab_size) for name, own in smallest.items()}
    added = {name: tokens.to_dict() for name, tokens in unknown_to.items() if tokens is not None}
    chosen = {name: 1.0 if i == 0 else 0.0 for i, name in enumerate(names)} | dict(betas or {})
    config = IVGConfig([part.to_dict() for part in parts], chosen, columns, added, architectures=["IVGForCausalLM"])
    _write(folder, config, first, {"ivg_beta": torch.tensor(config.default_betas or [0.0])}, options)
    return folder


def running_parts(folder: Path) -> list[str]:
    """Names of the submodels of a composite that compute; others have the outputs of one of them."""
    return list(dict.fromkeys(IVGConfig.from_pretrained(folder).sources.values()))


def export_value(path: str, folder: str | Path, *, options: LoadOptions | None = None) -> tuple[Path, HeadKind]:
    """Write the directory of a value network for the pooling engine; its kind of head.

    Raises:
        ModelError: no head among its tensors.
        ConfigError: something else in ``folder``.
    """
    options, folder = options or LoadOptions(), Path(folder)
    kind = head_kind(path, options)
    part = _part("value", Network(path), options, head=kind)
    _write(folder, IVGValueConfig(part.to_dict(), architectures=["IVGForValue"]), Network(path), {"unused": torch.zeros(1)}, options)
    return folder, kind


def head_kind(path: str, options: LoadOptions) -> HeadKind:
    """``vocabulary`` or ``scalar``, by the names of a checkpoint's tensors."""
    from ivg.models.value_head import find_head

    return find_head(find_model(path, "value", options.hub()), options.hub())[0]


def export_to_cache(write: Callable[[Path], Any], cache: Path) -> Path:
    """A directory below ``cache`` that ``write`` fills, named by a digest of its files; the same one for the same content.

    vLLM keeps compiled graphs by a model's path, so other submodels must have another one. Safe with several processes at once.
    """
    cache.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=cache, prefix=".new-"))
    try:
        write(fresh)
        place = cache / f"ivg-{_digest(fresh)[:16]}"
        try:
            fresh.rename(place)
        except OSError:
            if not place.is_dir():
                raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)  # writing failed, or the same content was there already
    return place


def _digest(folder: Path) -> str:
    """Of names and contents of all files."""
    digest = sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(folder).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def default_cache() -> Path:
    """Where composites are cached."""
    return cache_folder("vllm")


def _vocabulary(name: str, network: Network, options: LoadOptions) -> Vocabulary:
    found = str(find_model(network.path, name, options.hub()))
    tokenizer = load_tokenizer(network.tokenizer, options, name)
    described = SimpleNamespace(
        config=load_config(network.path, options, name), generation_config=read_generation_config(found, **options.hub())
    )
    return Vocabulary(tokenizer, eos_ids(described, tokenizer), owner=name)


def _part(name: str, network: Network, options: LoadOptions, group: str = "", sign: float = 1.0, head: HeadKind = "language") -> Submodel:
    found = find_model(network.path, name, options.hub())
    config = load_config(network.path, options, name)
    local = Path(found).is_dir()
    part = Submodel(name, config.to_dict(), str(Path(found).resolve()) if local else str(found), options.revision, group, sign, head)
    part.network_config()  # raises for other than causal language models
    if network.adapter is None:
        return part
    check_plain_lora(network.adapter, name)
    return replace(part, adapter=str(network.adapter.resolve()), scale=network.scale, adapter_digest=lora_digest(network.adapter))


def _write(folder: Path, config: Any, main: Network, tensors: dict[str, torch.Tensor], options: LoadOptions) -> None:
    """Write the files; an earlier composite is overwritten."""
    existing = folder / "config.json"
    if existing.exists() and json.loads(existing.read_text()).get("model_type") not in ("ivg", "ivg_value"):
        raise ConfigError(f"{folder} holds another model\n  give the composite a directory of its own")
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    load_tokenizer(main.tokenizer, options, "base").save_pretrained(folder)
    found = find_model(main.path, "base", options.hub())
    generation = Path(found) / "generation_config.json"
    if generation.is_file():  # it names the tokens that end an answer
        shutil.copyfile(generation, folder / "generation_config.json")
    elif not Path(found).is_dir() and (config := read_generation_config(str(found), **options.hub())) is not None:
        config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})  # vLLM's loader needs a weights file in the directory
