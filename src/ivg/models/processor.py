"""Vision-language checkpoints: which class of transformers loads them, and their processor, for pictures alone.

Must not depend on prompts or caches.
"""

from __future__ import annotations

import inspect
from typing import Any

_VIDEO = "video_processor"


def can_read_images(config: Any) -> bool:
    """Has transformers a class for this configuration that reads pictures and text, and writes text?"""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def image_class(config: Any, *, wanted: bool) -> Any:
    """Transformers' ``AutoModel…`` for a configuration: for text, or for pictures and text where they are ``wanted`` or nothing else is."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    only = type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and "AutoModelForCausalLM" not in (getattr(config, "auto_map", None) or {})
    return AutoModelForImageTextToText if can_read_images(config) and (wanted or only) else AutoModelForCausalLM


def reads_images(network: Any) -> bool:
    """Is ``network`` of one of transformers' classes that read pictures and text, and write text?"""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return type(network).__name__ in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()


def load_processor(place: Any, config: Any, **hub: Any) -> Any:
    """The processor at ``place``.

    One that also reads videos (Qwen-VL) is made without that part, which would need torchvision.

    Args:
        place: directory or hub id.
        config: of the checkpoint.
        hub: keyword arguments of ``from_pretrained`` that say where it comes from.

    Raises:
        Exception: whatever transformers raises where there is none.
    """
    from transformers import AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    kind = PROCESSOR_MAPPING.get(type(config), None)
    if kind is not None and _VIDEO in inspect.signature(kind.__init__).parameters:
        return without_videos(kind).from_pretrained(place, **hub)
    return AutoProcessor.from_pretrained(place, **hub)


def without_videos(kind: Any) -> Any:
    """The class ``kind`` of a processor without its part for videos."""

    def init(self: Any, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None, **more: Any) -> None:
        kind.__init__(self, image_processor, tokenizer, **{_VIDEO: None}, chat_template=chat_template, **more)

    return type(kind.__name__, (kind,), {"__init__": init, "__module__": kind.__module__})
