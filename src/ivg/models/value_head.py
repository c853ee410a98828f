"""Value networks: a causal backbone and a head that predicts the final reward from any prefix (METHOD, section 1).

Vocabulary head (Q-head): for every next token, the value of the prefix that it would make. Scalar head (V-head): the
value of the prefix itself. Reads every layout in use, told apart by the names of its tensors:

=====================================  ==========================================  ==================
tensor                                 written by                                  head
=====================================  ==========================================  ==================
``score_head.weight`` [vocab, hidden]  the IVG authors, and us                     vocabulary
``score.weight`` [1, hidden]           AutoModelForSequenceClassification, and us  scalar
``v_head.summary.{weight,bias}``       TRL's former AutoModelForCausalLMWithValueHead  scalar
=====================================  ==========================================  ==================
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ivg.errors import ModelError

HeadKind = Literal["vocabulary", "scalar"]
_HEADS: dict[str, HeadKind] = {"score_head": "vocabulary", "score": "scalar", "v_head.summary": "scalar"}


class ValueModel(nn.Module):
    """``backbone`` (a transformers base model: hidden states out) with a linear ``head``.

    Args:
        backbone: e.g. ``LlamaModel`` or ``GPT2Model``.
        kind: ``vocabulary`` or ``scalar``.
        bias: whether the head has one; the authors' has none.

    ``notes``: how it was trained (``target``, ``scale``, ``template``), kept in config.json.
    """

    def __init__(self, backbone: nn.Module, kind: HeadKind, *, bias: bool = False) -> None:
        super().__init__()
        self.backbone, self.kind = backbone, kind
        self.notes: dict[str, Any] = {}
        self.config: Any = backbone.config
        size = cast("Any", backbone).config.get_text_config()
        outputs = size.vocab_size if kind == "vocabulary" else 1
        self.head = nn.Linear(size.hidden_size, outputs, bias=bias, dtype=next(backbone.parameters()).dtype)
        nn.init.zeros_(self.head.weight)
        if bias:
            nn.init.zeros_(self.head.bias)

    def forward(self, input_ids: Tensor | None = None, *, logits_to_keep: int = 0, **kwargs: Any) -> Any:
        """Values [batch, positions, vocabulary or 1] of the last ``logits_to_keep`` positions (0: of all), as ``.logits``."""
        hidden = self.backbone(input_ids=input_ids, **kwargs).last_hidden_state
        return SimpleNamespace(logits=self.head(hidden[:, -logits_to_keep:]))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, in the authors' layout or AutoModelForSequenceClassification's."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        name = "score_head" if self.kind == "vocabulary" else "score"
        prefix = _backbone_prefix(self.config)
        tensors = {f"{prefix}{k}": v.detach().contiguous().cpu() for k, v in self.backbone.state_dict().items()}
        tensors |= {f"{name}.{k}": v.detach().contiguous().cpu() for k, v in self.head.state_dict().items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = self.config.to_dict() | {"ivg_value": {"head": self.kind, **self.notes}, "dtype": str(self.head.weight.dtype)[6:]}
        if self.kind == "scalar":
            config |= {"num_labels": 1, "id2label": {"0": "VALUE"}, "label2id": {"VALUE": 0}}
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    @classmethod
    def from_pretrained(cls, name: str | Path, *, dtype: torch.dtype | None = None, **hub: Any) -> ValueModel:
        """Load any layout of the table above, from a directory or the hub.

        Args:
            name: directory or hub id.
            dtype: of the weights; None: as stored.
            hub: ``revision``, ``trust_remote_code``, ``cache_dir``, ``token``.

        Raises:
            ModelError: no such model, no head among its tensors, or a head of the wrong shape.
        """
        from transformers import AutoConfig, AutoModel

        config = AutoConfig.from_pretrained(name, **hub)
        tensors = read_tensors(name, hub)
        head = _head_name(name, tensors)
        weight, bias = tensors.pop(f"{head}.weight"), tensors.pop(f"{head}.bias", None)
        kind = _HEADS[head]
        text = config.get_text_config()
        if (kind == "scalar" and weight.shape[0] != 1) or weight.shape[1] != text.hidden_size:
            raise ModelError(
                f"{name}: {head}.weight has shape {tuple(weight.shape)}\n  expected "
                f"({'1' if kind == 'scalar' else text.vocab_size}, {text.hidden_size}) for a {kind} head"
                + ("; a classifier with several labels is a reward model: --reward" if kind == "scalar" else "")
            )
        dtype = dtype or weight.dtype
        backbone = AutoModel.from_config(config, trust_remote_code=hub.get("trust_remote_code", False), dtype=dtype)
        _load_backbone(backbone, tensors, name)
        model = cls(backbone, kind, bias=bias is not None)
        model.notes = {k: v for k, v in (getattr(config, "ivg_value", None) or {}).items() if k != "head"}
        if weight.shape != model.head.weight.shape:  # rows may be padded, or not padded, against the embedding
            model.head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=dtype)
        model.head.load_state_dict({"weight": weight.to(dtype)} | ({} if bias is None else {"bias": bias.to(dtype)}))
        return model.eval()


def _backbone_prefix(config: Any) -> str:
    """What transformers puts before the backbone's tensor names in a model with a head: ``model.``, ``transformer.``…"""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).base_model_prefix + "."


def _load_backbone(backbone: nn.Module, tensors: dict[str, Tensor], name: str | Path) -> None:
    wanted = set(backbone.state_dict())
    state = {}
    for key, tensor in tensors.items():
        parts = key.split(".")
        for cut in range(3):  # "pretrained_model.transformer.h.0…", "model.layers.0…", "h.0…"
            if ".".join(parts[cut:]) in wanted:
                state[".".join(parts[cut:])] = tensor
                break
    missing = sorted(wanted - set(state) - {b for b, _ in backbone.named_buffers()})
    if missing:
        raise ModelError(f"{name} lacks {len(missing)} tensors of its {type(backbone).__name__}: {', '.join(missing[:3])} …")
    backbone.load_state_dict(state, strict=False)


def find_head(name: str | Path, hub: dict[str, Any]) -> HeadKind:
    """What kind of head a checkpoint has; reads names of tensors, and no tensor where it is in safetensors.

    Raises:
        ModelError: no such model, or no head among its tensors.
    """
    return _HEADS[_head_name(name, [key for path in _weight_files(name, hub) for key in _names(path)])]


def read_head(name: str | Path, hub: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Weight [outputs, hidden] and bias (or None) of a checkpoint's head.

    Raises:
        ModelError: as :func:`find_head`.
    """
    where = {key: path for path in _weight_files(name, hub) for key in _names(path)}
    head = _head_name(name, list(where))
    weight, bias = (_tensor(where[key], key) if (key := f"{head}.{kind}") in where else None for kind in ("weight", "bias"))
    assert weight is not None
    return weight, bias


def read_tensors(name: str | Path, hub: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors of a checkpoint, sharded or not, safetensors or PyTorch's older format.

    Raises:
        ModelError: when there is no such file.
    """
    from safetensors.torch import load_file

    out: dict[str, Tensor] = {}
    for path in _weight_files(name, hub):
        out |= load_file(path) if path.endswith(".safetensors") else torch.load(path, weights_only=True, map_location="cpu")
    return out


def _weight_files(name: str | Path, hub: dict[str, Any]) -> list[str]:
    """The files that hold a checkpoint's tensors."""
    from transformers.utils import cached_file

    options = {k: v for k, v in hub.items() if k in ("revision", "cache_dir", "token")}
    for file in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"):
        path = cached_file(name, file, _raise_exceptions_for_missing_entries=False, **options)
        if path is None:
            continue
        if not file.endswith(".index.json"):
            return [str(path)]
        shards = sorted(set(json.loads(Path(path).read_text())["weight_map"].values()))
        return [str(cached_file(name, shard, **options)) for shard in shards]
    raise ModelError(f"{name} has no weights\n  expected model.safetensors (or its index, or pytorch_model.bin)")


def _names(path: str) -> list[str]:
    from safetensors import safe_open

    if not path.endswith(".safetensors"):
        return list(torch.load(path, weights_only=True, map_location="meta"))
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _tensor(path: str, key: str) -> Tensor:
    from safetensors import safe_open

    if not path.endswith(".safetensors"):
        return torch.load(path, weights_only=True, map_location="cpu")[key]
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(key)


def _head_name(name: str | Path, tensors: Collection[str]) -> str:
    """The beginning of the head's names.

    Raises:
        ModelError: there is none.
    """
    head = next((h for h in _HEADS if f"{h}.weight" in tensors), None)
    if head is None:
        raise ModelError(
            f"{name} has no value head\n  expected one of the tensors {', '.join(f'{h}.weight' for h in _HEADS)}; "
            f"got e.g. {', '.join(sorted(tensors)[-3:])}"
        )
    return head
