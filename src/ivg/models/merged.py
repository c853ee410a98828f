"""Networks with the weights of an adapter added to their own: rewards, values, and whatever is trained further.

Language models that share a network switch adapters instead (:mod:`ivg.models.shared`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ivg.errors import ModelError
from ivg.models.adapter_directory import AdapterSource
from ivg.models.adapters import Adapters
from ivg.models.placement import compute_dtype, input_device
from ivg.models.value_head import ValueModel

LoadBase = Callable[..., Any]
"""From a class of transformers to the adapter's network; ``new_head`` and further arguments of ``from_pretrained`` by name."""


def load_merged(source: AdapterSource, auto_class: Any, what: str, load: LoadBase, *, new_head: bool = False) -> Any:
    """The network of ``source`` with the adapter merged.

    Args:
        source: the adapter.
        auto_class: transformers' ``AutoModel…``, or :class:`~ivg.models.value_head.ValueModel`.
        what: the model's role, for errors.
        load: loads the network; for ``AutoModel`` the body, of a value, too.
        new_head: the adapter needs no head: it is to be trained.

    Raises:
        ModelError: the adapter does not fit the network, or is not of the kind that ``auto_class`` is.
    """
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    if auto_class is ValueModel:
        return _value(source, what, load)
    if source.value_notes is not None:
        if auto_class is AutoModelForSequenceClassification and source.value_notes.get("head") == "scalar":
            return _classifier(source, what, load)
        if auto_class is AutoModelForSequenceClassification:
            raise ModelError(f"{what} {str(source.folder)!r} is a value network, not a sequence classifier\n  give it as --value")
        raise ModelError(f"{what} {str(source.folder)!r} is the adapter of a value\n  give it as --value")
    if auto_class is AutoModel:
        kind = AutoModelForCausalLM if source.labels is None else AutoModelForSequenceClassification
        return load_merged(source, kind, what, load).base_model
    if auto_class is not AutoModelForSequenceClassification:
        if source.labels is not None:
            raise ModelError(f"{what} {str(source.folder)!r} is the adapter of a reward model\n  give it as --reward")
        network = load(auto_class)
    elif source.labels is None:
        network = load(auto_class, new_head=new_head)
    else:
        network = load(auto_class, new_head=True, num_labels=source.labels)
        body = f"{network.base_model_prefix}."
        if missing := [name for name, _ in network.named_parameters() if not name.startswith(body) and name not in source.files]:
            raise ModelError(f"{what}: the adapter {str(source.folder)!r} lacks {missing[0]}, which would be random\n  train it again")
    network = _merge(network, source, what)
    source.apply_to(network.config)
    return network


def _merge(network: Any, source: AdapterSource, what: str) -> Any:
    if source.head_only:
        return network
    adapters = Adapters(network)
    return adapters.merge(adapters.add(source.folder, source.scale, what))


def _classifier(source: AdapterSource, what: str, load: LoadBase) -> Any:
    """A scalar value as the classifier of one label that it is."""
    from transformers import AutoModelForSequenceClassification

    value = _value(source, what, load)
    if value.head.bias is not None:
        raise ModelError(f"{what} {str(source.folder)!r} is a value whose head has a bias, which no classifier has\n  give it as --value")
    network = load(AutoModelForSequenceClassification, new_head=True, num_labels=1)
    setattr(network, network.base_model_prefix, value.backbone)
    network.score.weight = value.head.weight
    source.apply_to(network.config)
    return network.eval()


def _value(source: AdapterSource, what: str, load: LoadBase) -> ValueModel:
    from transformers import AutoModel, AutoModelForSequenceClassification

    if source.value_notes is None:
        if source.labels != 1:
            why = f"{what}: the adapter {str(source.folder)!r} has no value head"
            raise ModelError(f"{why}\n  expected what ivg train value --keep-adapter writes")
        classifier = load_merged(source, AutoModelForSequenceClassification, what, load)  # a reward of one label is a scalar value
        model = ValueModel(classifier.base_model, "scalar", bias=classifier.score.bias is not None)
        model.head = classifier.score
        return model.eval()
    model = value_on(_merge(load(AutoModel), source, what), source)
    source.apply_to(model.config)
    return model


def value_on(body: Any, source: AdapterSource) -> ValueModel:
    """The value with the head of ``source`` on ``body``, which stays as it is: another network may share it."""
    notes = dict(source.value_notes or {})
    model = ValueModel(body, notes.pop("head"))
    model.notes = notes
    rows = body.config.get_text_config().vocab_size
    head: nn.Linear = source.head(body.get_input_embeddings().weight, rows)
    model.head = head.to(input_device(body), compute_dtype(body))
    return model.eval()
