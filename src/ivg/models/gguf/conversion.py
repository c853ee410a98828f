"""Converts a GGUF file into a directory in hub layout, with transformers' reader and the package ``gguf``.

What the reader leaves out is added (:mod:`ivg.models.gguf.config`, :mod:`ivg.models.gguf.tokenizer`) or refused: a converted model
gives the outputs of the file's, or there is none.
"""

from __future__ import annotations

import io
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ivg.errors import IVGError, MissingDependencyError, ModelError, reason
from ivg.models.gguf.config import complete_config, generation_settings
from ivg.models.gguf.parts import damaged, join
from ivg.models.gguf.tokenizer import check_saved, load_tokenizer
from ivg.models.weights import check_weights

_FLOATS = ("F32", "F16", "BF16", "F64")
_ROPE = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_KINDS = {
    "adapter": "a LoRA adapter",
    "mmproj": "a vision projector",
    "vocab": "a vocabulary without weights",
    "imatrix": "an importance matrix",
}


@dataclass(frozen=True)
class GGUFContents:
    """What a GGUF file says of its model.

    Attributes:
        metadata: its keys and values.
        shapes: of its tensors, by name, as torch has them.
        types: of its tensors, by name, as ggml calls them.
        rope: tensors that change the rotary frequencies.
    """

    metadata: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    types: Mapping[str, str]
    rope: Mapping[str, Tensor]

    @property
    def architecture(self) -> str:
        """As llama.cpp calls it."""
        return str(self.metadata.get("general.architecture"))


def convert(
    parts: Sequence[Path], folder: Path, title: str, beside: Sequence[Path] = (), on_read: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Write config, weights, tokenizer and generation config of a GGUF file into ``folder``; returns what it was made from.

    Tensors that the file holds as F32, F16 or BF16 are kept exactly; quantised ones are dequantised and stored in float16.

    Args:
        parts: the GGUF file, or those of a split model.
        folder: an empty directory.
        title: begins errors.
        beside: files of the original model that take precedence.
        on_read: called once the metadata is read.

    Raises:
        ModelError: a damaged file, or a model that transformers' reader does not read rightly; names what.
        MissingDependencyError: without the packages gguf and accelerate.
    """
    _require_packages()
    source = folder / "source"
    source.mkdir()
    file = source / "model.gguf"  # alone in a folder: transformers prefers other files beside it
    if len(parts) == 1:
        _link(parts[0], file)
    else:
        join(parts, file, title)
    contents = read(file, title)
    on_read()
    for path in beside:
        shutil.copyfile(path, folder / path.name)
    with _converting(title):
        tokenizer = load_tokenizer(source, contents.metadata, folder if (folder / "tokenizer.json").is_file() else None)
        network = _load_network(source, contents, title)
        generation_settings(network, tokenizer, contents.metadata, folder)
        _store_small(network, contents)
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        check_saved(tokenizer, folder)
    shutil.rmtree(source)
    return {"architecture": contents.architecture, "types": sorted(set(contents.types.values())), "made_with": _versions()}


def read(file: Path, title: str) -> GGUFContents:
    """The metadata and the table of tensors of a GGUF file.

    Raises:
        ModelError: it is damaged or incomplete, or holds no language model.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        tensors = reader.tensors
        rope = {t.name: torch.tensor(t.data.copy(), dtype=torch.float32) for t in tensors if t.name in _ROPE}
    except Exception as e:  # whatever the reader meets in a damaged file
        raise damaged(title, reason(e, 120)) from e
    if (count := int(metadata.get("split.count", 0))) > 1:
        number = int(metadata.get("split.no", 0)) + 1
        name = f"NAME-{number:05d}-of-{count:05d}.gguf"
        raise ModelError(f"{title}: this is part {number} of a model in {count} GGUF files\n  name it so ({name}), beside the others")
    kind = _KINDS.get(str(metadata.get("general.type"))) or (None if tensors else "a GGUF file without weights")
    if kind or "general.architecture" not in metadata:
        raise ModelError(
            f"{title}: this is {kind or 'a GGUF file that names no architecture'}\n  expected the GGUF file of a language model"
        )
    shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in tensors}
    return GGUFContents(metadata, shapes, {t.name: t.tensor_type.name for t in tensors}, rope)


def _load_network(source: Path, contents: GGUFContents, title: str) -> Any:
    """The network in float32.

    Raises:
        ModelError: weights that are missing, left over or not finite.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    config = AutoConfig.from_pretrained(source, gguf_file="model.gguf")
    complete_config(config, contents.metadata, contents.rope, title)
    network, info = AutoModelForCausalLM.from_pretrained(
        source,
        config=config,
        gguf_file="model.gguf",
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    check_weights(title, network, info)
    state = {tensor.data_ptr(): tensor for tensor in network.state_dict().values()}
    held = sum(tensor.numel() for tensor in state.values())
    beyond = f"blk.{config.get_text_config().num_hidden_layers}."  # layers that predict further tokens; transformers has none
    found = sum(math.prod(shape) for name, shape in contents.shapes.items() if name not in _ROPE and not name.startswith(beyond))
    if found != held:
        raise ModelError(
            f"{title}: the file holds {found:,} weights, of which transformers' reader puts {held:,} into {type(network).__name__}\n"
            "  give the original model (config.json and safetensors)"
        )
    if broken := [name for name, parameter in network.named_parameters() if not parameter.isfinite().all()]:
        raise ModelError(f"{title}: {broken[0]} holds NaN or infinity\n  the GGUF file is damaged; download it again")
    return network


def _store_small(network: Any, contents: GGUFContents) -> None:
    """Change each parameter to the smallest type that holds it exactly; matrices that were quantised to float16."""
    exact = {shape for name, shape in contents.shapes.items() if contents.types[name] in _FLOATS}
    quantised = not set(contents.types.values()) <= set(_FLOATS)
    for parameter in network.parameters():
        full, shape = parameter.data, tuple(parameter.shape)
        fits = (dtype for dtype in (torch.bfloat16, torch.float16) if torch.equal(full.to(dtype).float(), full))
        rounded = full.half()
        if (dtype := next(fits, None)) is not None:
            parameter.data = full.to(dtype)
        elif quantised and full.ndim > 1 and shape not in exact and bool(rounded.isfinite().all()):
            parameter.data = rounded
    matrices = {parameter.dtype for parameter in network.parameters() if parameter.ndim > 1}
    network.config.dtype = torch.float32 if torch.float32 in matrices else max(matrices, key=str)


def _link(file: Path, name: Path) -> None:
    try:
        name.symlink_to(file.resolve())
    except OSError:  # Windows, without the right to
        shutil.copyfile(file, name)


@contextmanager
def _converting(title: str) -> Iterator[None]:
    """Within, transformers prints nothing but a progress bar on a terminal.

    Raises:
        ModelError: for whatever transformers raises.
    """
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
            yield
    except IVGError:
        raise
    except Exception as e:
        if isinstance(e, OSError) and e.errno is not None:  # no space, no right; transformers' own have no number
            raise
        raise ModelError(
            f"{title}: transformers cannot read the GGUF file: {reason(e)}\n  give the original model (config.json and safetensors)"
        ) from e
    finally:
        logging.set_verbosity(before)


def _require_packages() -> None:
    try:
        import accelerate  # noqa: F401 - transformers' reader needs it
        import gguf  # noqa: F401
    except ImportError as e:
        raise MissingDependencyError("GGUF files need the packages gguf and accelerate\n  pip install 'ivg[gguf]'") from e


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("gguf", "transformers")}
