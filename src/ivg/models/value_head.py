"""Value networks: a causal backbone and a head that predicts the final reward from any prefix (IVG: Liu et al. 2024, arXiv 2409.17819).

Vocabulary head (Q-head): for every next token, the value of the prefix that it would make. Scalar head (V-head): the
value of the prefix itself. Reads every layout in use, recognised by the names of its tensors:

=====================================  ==========================================  ==================
tensor                                 written by                                  head
=====================================  ==========================================  ==================
``score_head.weight`` [vocab, hidden]  the IVG authors, and us                     vocabulary
``score.weight`` [1, hidden]           AutoModelForSequenceClassification, and us  scalar
``v_head.summary.{weight,bias}``       TRL's former AutoModelForCausalLMWithValueHead  scalar
=====================================  ==========================================  ==================
"""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ivg.errors import ModelError
from ivg.models.adapters import without_adapters
from ivg.models.placement import compute_dtype, input_device
from ivg.models.weights import OTHER_HEADS, check_weights, read_tensor, tensor_names, weight_files

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
        self.head = nn.Linear(size.hidden_size, outputs, bias=bias, dtype=compute_dtype(backbone))
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    def forward(self, input_ids: Tensor | None = None, *, logits_to_keep: int = 0, **kwargs: Any) -> Any:
        """Values [batch, positions, vocabulary or 1] of the last ``logits_to_keep`` positions (0: of all), as ``.logits``."""
        out = self.backbone(input_ids=input_ids, **kwargs)
        states = {name: out.get(name) for name in ("past_key_values", "cache_params", "state")}  # as the backbone calls its cache
        return SimpleNamespace(logits=self.head(out.last_hidden_state[:, -logits_to_keep:]), **states)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and weights: the authors' layout, AutoModelForSequenceClassification's, or, where a scalar head has
        a bias (which a sequence classifier would drop), TRL's. The backbone is written by transformers, under its own names.
        """
        from transformers.utils import logging

        logging.disable_progress_bar()
        folder = Path(folder)
        shell = _shell(self.config, self.kind)
        head = "score_head" if self.kind == "vocabulary" else "score" if self.head.bias is None else "v_head.summary"
        tensors = {f"{shell.base_model_prefix}.{k}": v.detach().cpu() for k, v in without_adapters(self.backbone.state_dict()).items()}
        tensors |= {f"{head}.{k}": v.detach().cpu() for k, v in self.head.state_dict().items()}
        shell.save_pretrained(folder, state_dict=tensors)
        (folder / "generation_config.json").unlink(missing_ok=True)  # a value generates nothing
        plain = json.loads(self.config.to_json_string(use_diff=False))  # transformers spells infinity as JSON can
        config = plain | {"ivg_value": {"head": self.kind, **self.notes}, "dtype": str(self.head.weight.dtype)[6:]}
        if self.kind == "scalar":
            config |= {"num_labels": 1, "id2label": {"0": "VALUE"}, "label2id": {"VALUE": 0}}
        if head == "score":
            config["architectures"] = [type(shell).__name__]
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n")

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        dtype: torch.dtype | None = None,
        quantization_config: Any = None,
        device_map: Any = None,
        max_memory: Any = None,
        attn_implementation: str | None = None,
        ignore_mismatched_sizes: bool = True,
        output_loading_info: bool = False,
        **hub: Any,
    ) -> Any:
        """Load any layout of the table above, from a directory or the hub. transformers loads the backbone, whatever its layout.

        Args:
            name: directory or hub id.
            dtype: of the weights; None: as stored.
            quantization_config: of the backbone, as transformers takes it.
            device_map: as transformers takes it.
            max_memory: as transformers takes it.
            attn_implementation: of the backbone, as transformers takes it.
            ignore_mismatched_sizes: report tensors of other shapes with the others, rather than raise.
            output_loading_info: return (model, what transformers reports of weights that are missing or left over), and check nothing.
            hub: ``revision``, ``trust_remote_code``, ``cache_dir``, ``token``.

        Raises:
            ModelError: no such model, no head among its tensors, a head of the wrong shape, weights that are missing or left over.
        """
        from transformers import AutoConfig, AutoModel

        config = AutoConfig.from_pretrained(name, **hub)
        kind, head = find_head(name, hub)
        weight, bias = read_head(name, hub)
        text = config.get_text_config()
        if (kind == "scalar" and weight.shape[0] != 1) or weight.shape[1] != text.hidden_size:
            raise _wrong_shape(name, kind, head, weight, text)
        dtype = dtype or weight.dtype
        placed = {"device_map": device_map, "max_memory": max_memory}
        placed |= {"quantization_config": quantization_config, "attn_implementation": attn_implementation}
        backbone, info = AutoModel.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            key_mapping=_WRAPPERS,
            output_loading_info=True,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            **{k: v for k, v in placed.items() if v is not None},
            **hub,
        )
        info["unexpected_keys"] = {key for key in info["unexpected_keys"] if not key.startswith((f"{head}.", *OTHER_HEADS))}
        if not output_loading_info:
            check_weights(name, backbone, info, files=partial(weight_files, name, hub))
        model = cls(backbone, kind, bias=bias is not None)
        model.notes = {k: v for k, v in (getattr(config, "ivg_value", None) or {}).items() if k != "head"}
        # rows may be padded, or not padded, against the embedding
        model.head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=dtype, device=input_device(backbone))
        model.head.load_state_dict({"weight": weight.to(dtype)} | ({} if bias is None else {"bias": bias.to(dtype)}))
        return (model.eval(), info) if output_loading_info else model.eval()


_WRAPPERS = {r"^pretrained_model\.": "", r"^backbone\.": ""}
"""What stands before the names of a backbone that was saved inside another module, for transformers' ``key_mapping``."""


def _shell(config: Any, kind: HeadKind) -> Any:
    """A network without weights that knows how transformers names those of a backbone below a head, and how it writes them."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    config = copy.deepcopy(config)  # saving writes into it
    if kind == "scalar":
        config.num_labels = 1
    with torch.device("meta"):
        try:
            return AutoModelForSequenceClassification.from_config(config)
        except ValueError:  # transformers has no classifier of this architecture
            return AutoModelForCausalLM.from_config(config)


def _wrong_shape(name: str | Path, kind: HeadKind, head: str, weight: Tensor, text: Any) -> ModelError:
    return ModelError(
        f"{name}: {head}.weight has shape {tuple(weight.shape)}\n  expected "
        f"({'1' if kind == 'scalar' else text.vocab_size}, {text.hidden_size}) for a {kind} head"
        + ("; a classifier with several labels is a reward model: --reward" if kind == "scalar" else "")
    )


def find_head(name: str | Path, hub: dict[str, Any]) -> tuple[HeadKind, str]:
    """(kind, beginning of its tensors' names) of a checkpoint's head; reads no tensor where they are in safetensors.

    Raises:
        ModelError: no such model, or no head among its tensors.
    """
    names = [key for path in weight_files(name, hub) for key in tensor_names(path)]
    head = next((h for h in _HEADS if f"{h}.weight" in names), None)
    if head is None:
        raise ModelError(
            f"{name} has no value head\n  expected one of the tensors {', '.join(f'{h}.weight' for h in _HEADS)}; "
            f"got e.g. {', '.join(sorted(names)[-3:])}"
        )
    return _HEADS[head], head


def read_head(name: str | Path, hub: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Weight [outputs, hidden] and bias (or None) of a checkpoint's head.

    Raises:
        ModelError: as :func:`find_head`.
    """
    _, head = find_head(name, hub)
    where = {key: path for path in weight_files(name, hub) for key in tensor_names(path)}
    weight, bias = (read_tensor(where[key], key) if (key := f"{head}.{part}") in where else None for part in ("weight", "bias"))
    assert weight is not None
    return weight, bias
