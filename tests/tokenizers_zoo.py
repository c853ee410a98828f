"""Small tokenizers of every kind that causal models have, made here: SentencePiece with byte fallback, byte-level, WordPiece."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

WORDS = ["the", "is", "a", "film", "movie", "mo", "vie", "s", "t", "h", "e", "i", "é", "日", "\N{REPLACEMENT CHARACTER}"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = ["<unk>", "<s>", "</s>", "[INST]"]
MERGES = [("m", "o"), ("t", "h"), ("th", "e"), ("▁", "the"), ("i", "s"), ("▁", "is"), ("▁", "a"), ("f", "i"), ("l", "m"), ("fi", "lm")]


@cache
def sentencepiece(kind: str = "unigram", prefix: str = "first") -> Any:
    """As Llama's: spaces are ``▁``, unknown characters bytes, the first space of a text is left out again.

    Args:
        kind: ``unigram`` or ``bpe``.
        prefix: where encoding writes a space of its own: ``first``, ``always``, ``never``, or ``legacy`` (a normalizer does).
    """
    known = _known()
    pieces = [*SPECIAL, *BYTES, *known]
    if kind == "unigram":
        scores = [0.0] * len(SPECIAL) + [-20.0] * 256 + [-10.0 + len(p) for p in known]
        tok = Tokenizer(models.Unigram(list(zip(pieces, scores, strict=True)), unk_id=0, byte_fallback=True))
    else:
        tok = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, MERGES, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if prefix == "legacy":
        tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tok.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=prefix, split=False)
    strip = [] if prefix == "never" else [decoders.Strip(" ", 1, 0)]
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    tok.add_special_tokens(SPECIAL)
    return _fast(tok, bos_token="<s>", eos_token="</s>", unk_token="<unk>", additional_special_tokens=["[INST]"])


def _known() -> list[str]:
    letters = sorted({c for word in WORDS for c in word} | set("mofilvw"))
    return list(dict.fromkeys([*WORDS, *letters, "▁", "▁▁", *(f"▁{w}" for w in WORDS), "film", "fi", "lm", "th"]))


@cache
def llama() -> Any:
    """Of transformers' own class."""
    pieces = ["<unk>", "<s>", "</s>", *BYTES, *_known()]
    return LlamaTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=MERGES)


@cache
def gemma() -> Any:
    """Of transformers' own class."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *BYTES, *_known()]
    return GemmaTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=MERGES)


@cache
def metaspace() -> Any:
    """As T5's and ALBERT's: the Metaspace decoder, no bytes."""
    pieces = [*SPECIAL, "▁", *(f"▁{w}" for w in WORDS), *WORDS, *"abcdefghijklmnopqrstuvwxyz."]
    tok = Tokenizer(models.Unigram([(p, -float(i > 3)) for i, p in enumerate(dict.fromkeys(pieces))], unk_id=0))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tok.add_special_tokens(SPECIAL)
    return _fast(tok, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@cache
def wordpiece() -> Any:
    """As BERT's: ``##`` goes on with a word, every other piece begins one."""
    pieces = [*SPECIAL, "the", "is", "a", "film", "mo", "##vie", "##s", "##t", *"thefilm.,", *(f"##{c}" for c in "thefilmovsa")]
    tok = Tokenizer(models.WordPiece({p: i for i, p in enumerate(dict.fromkeys(pieces))}, unk_token="<unk>"))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    tok.add_special_tokens(SPECIAL)
    return _fast(tok, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _fast(tok: Tokenizer, **names: Any) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=tok, clean_up_tokenization_spaces=False, **names)
