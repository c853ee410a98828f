"""The tokenizer of a GGUF file: transformers' reader, and what it does not know of how llama.cpp splits texts.

A tokenizer that would give other ids than the model was trained with is refused; the original's ``tokenizer.json`` may take its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ivg.errors import ModelError

_GPT2 = frozenset({"gpt-2", "phi-2", "mpt", "olmo", "jais", "gigachat", "roberta-bpe", "trillion", "granite-docling", "exaone4"})
"""``tokenizer.ggml.pre`` of files whose texts llama.cpp splits by GPT-2's expression, which is transformers' default."""
_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
"""… and where each digit stands alone before that."""
_WHOLE_WORDS = frozenset(
    {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano", "tekken"}
)
"""… and where a word that is a token stays whole, whatever the merges say, and texts begin with a token for that."""
_PROBES = ("Hello world, it's 2024!\n\n  Two  spaces", "naïve 漢字 😀", "a", " a")


def load_tokenizer(source: Path, metadata: Mapping[str, Any], original: Path | None = None) -> Any:
    """A transformers tokenizer.

    Args:
        source: folder with the file, as ``model.gguf``, alone.
        metadata: of the file.
        original: folder with the original's ``tokenizer.json``.

    Raises:
        ModelError: it cannot be made from the file.
    """
    from transformers import AutoTokenizer

    says = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    if original is not None:
        tokenizer = AutoTokenizer.from_pretrained(original)
        _check_tokens(tokenizer, says)
        tokenizer.chat_template = tokenizer.chat_template or metadata.get("tokenizer.chat_template")
        return tokenizer
    if "tokens" not in says:
        raise _unusable("the file holds no tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file="model.gguf")
    if says.get("model") == "gpt2":
        _complete_byte_level(tokenizer, str(says.get("pre")))
    elif says.get("model") == "llama":
        _check_prefix(tokenizer, bool(says.get("add_space_prefix", True)))
    _set_bos(tokenizer, says)
    return tokenizer


def check_saved(tokenizer: Any, folder: Path) -> None:
    """Raise unless the tokenizer that was saved in ``folder`` gives the same ids as ``tokenizer``.

    Raises:
        ModelError: names a text.
    """
    from transformers import AutoTokenizer

    saved = AutoTokenizer.from_pretrained(folder)
    texts = [*_PROBES, "".join(text for text in tokenizer.all_special_tokens)]
    for text in texts:
        if saved(text).input_ids != tokenizer(text).input_ids:
            raise _unusable(f"the tokenizer of the file reads {text[:40]!r} otherwise once it is saved")


def _complete_byte_level(tokenizer: Any, pre: str) -> None:
    """How a byte-level BPE splits a text before it merges."""
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    if pre in _DIGITS:
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    elif isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel) and pre not in _GPT2:
        raise _unusable(f"transformers does not know how the file's tokenizer splits texts (tokenizer.ggml.pre = {pre})")
    if pre in _WHOLE_WORDS:
        backend.model.ignore_merges = True


def _check_prefix(tokenizer: Any, prefix: bool) -> None:
    first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False).input_ids)[0]
    if first.startswith("▁") != prefix:
        raise _unusable(f"transformers does not read add_space_prefix = {prefix} of the file's tokenizer")


def _set_bos(tokenizer: Any, says: Mapping[str, Any]) -> None:
    """A token at the beginning of each text: as the file says, else as llama.cpp does for its kind of tokenizer."""
    wanted = says.get("add_bos_token", says.get("model") == "llama" or says.get("pre") in _WHOLE_WORDS)
    if says.get("model") == "gemma4":  # llama.cpp adds one; the reference leaves it to the chat template
        wanted = False
    ids = tokenizer("a").input_ids
    if tokenizer.bos_token_id is None or (ids[0] == tokenizer.bos_token_id) == bool(wanted):
        return
    from tokenizers import processors

    bos, backend = tokenizer.bos_token, tokenizer.backend_tokenizer
    special = [(bos, tokenizer.bos_token_id)] if wanted else []
    before = [bos] if wanted else []
    backend.post_processor = processors.TemplateProcessing(
        single=[*before, "$A"], pair=[*before, "$A", *before, "$B:1"], special_tokens=special
    )
    if (tokenizer("a").input_ids[0] == tokenizer.bos_token_id) != bool(wanted):
        raise _unusable("transformers does not read add_bos_token of the file's tokenizer")


def _check_tokens(tokenizer: Any, says: Mapping[str, Any]) -> None:
    """Raise for the ``tokenizer.json`` of another model."""
    normal = [i for i, kind in enumerate(says.get("token_type") or ()) if kind == 1]
    texts = says.get("tokens") or ()
    own = tokenizer.convert_ids_to_tokens([i for i in normal if i < len(tokenizer)])
    wrong = sum(texts[i] != token for i, token in zip(normal, own, strict=False))
    if len(own) < len(normal) or wrong > len(normal) // 100:  # spellings of white space may differ
        raise _unusable("tokenizer.json beside the file has other tokens than the file")


def _unusable(why: str) -> ModelError:
    return ModelError(
        f"cannot load the tokenizer: {why}\n  put the original model's tokenizer.json beside the GGUF file, and give the folder with both"
    )
