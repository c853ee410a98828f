"""Text of responses: decode(prompt + response) without decode(prompt), for every tokenizer, at any cut, in any steps."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ivg.diagnostics.pairs import prefixes
from ivg.engines.transformers.engine import TransformersEngine
from ivg.engines.transformers.guidance import apply_guidance
from ivg.errors import PromptError
from ivg.models.vocabulary import Vocabulary
from ivg.search.searcher import Request, Search, Searcher
from ivg.serving.responses import ChoiceState, TokenText
from ivg.testing import byte_tokenizer, tiny_lm
from ivg.training import encoding
from ivg.training.data import RatedResponse
from ivg.types import Beam, DecodeState, Prompt, SamplingParams, TokenGuidance, TokenLogprobs, new_key
from ivg.values.base import FunctionValue
from tokenizers_zoo import gemma, llama, metaspace, sentencepiece, wordpiece

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
SENTENCEPIECE = [(kind, prefix) for kind in ("unigram", "bpe") for prefix in ("first", "always", "never", "legacy")]
MAKERS = {
    **{f"{kind}-{prefix}": (lambda k=kind, p=prefix: sentencepiece(k, p)) for kind, prefix in SENTENCEPIECE},
    "bytes": lambda: byte_tokenizer([("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("æ", "Ĺ"), ("Ł", "ĺ")]),
    "llama": llama,
    "gemma": gemma,
    "metaspace": metaspace,
    "wordpiece": wordpiece,
}
_made: dict[str, Vocabulary] = {}


def vocabulary(name: str) -> Vocabulary:
    if name not in _made:
        _made[name] = Vocabulary(MAKERS[name]())
    return _made[name]


names = st.sampled_from([*MAKERS])
texts = st.text(st.sampled_from("the film isa. \n日本é🙂\N{REPLACEMENT CHARACTER}"), max_size=14)
cuts = st.lists(st.integers(0, 60), max_size=4)


def grown(v: Vocabulary, prompt: list[int], ids: list[int], where: list[int]) -> str:
    """The text in steps that end at ``where``; nothing is taken back, and each step adds to the one before."""
    state, out = v.start_decoding(prompt), ""
    for end in [*sorted(min(w, len(ids)) for w in where), len(ids)]:
        new, state = v.continue_text(ids[:end], state)
        out += new
    return out + v.continue_text(ids, state, final=True)[0]


@settings(deadline=None, max_examples=200)
@given(names, texts, st.booleans(), st.integers(0, 40), cuts)
def test_prompt_and_response_are_the_whole_text(name, text, special, cut, where):
    """Cut between any two tokens, in the middle of a character too."""
    v = vocabulary(name)
    ids = list(v.tokenizer(text, add_special_tokens=special).input_ids)
    prompt, response = ids[:cut], ids[cut:]
    whole = v.tokenizer.decode(ids, skip_special_tokens=True)
    assert v.decode(ids) == whole
    if not response:
        return
    answer = v.response_text(prompt, response)
    assert v.prompt_text(prompt) + answer == whole
    assert grown(v, prompt, response, where) == answer
    assert grown(v, prompt, response, list(range(len(response)))) == answer


@settings(deadline=None, max_examples=200)
@given(names, st.lists(st.integers(0, 330), max_size=14), st.integers(0, 14), cuts)
def test_any_tokens_give_the_same_text_in_any_steps(name, ids, cut, where):
    """A random model draws tokens that no text has: halves of characters, special tokens, spaces in a row."""
    v = vocabulary(name)
    ids = [i % v.size for i in ids]
    prompt, response = ids[:cut], ids[cut:]
    if response:
        answer = v.response_text(prompt, response)
        assert grown(v, prompt, response, where) == grown(v, prompt, response, list(range(len(response)))) == answer
        assert v.prompt_text(prompt) + answer == v.decode(ids)


@settings(deadline=None)
@given(st.lists(st.sampled_from([0x41, 0xC3, 0xA9, 0xE6, 0x97, 0xA5, 0xF0, 0x9F, 0x99, 0x82, 0xFF]), max_size=10), st.integers(0, 10))
def test_bytes_are_read_as_utf8_by_every_tokenizer(found, cut):
    """The tokenizers library would make all of a run of bytes unreadable where one is."""
    expected = bytes(found).decode(errors="replace")
    for name, pieces in (("unigram-first", [f"<0x{b:02X}>" for b in found]), ("bytes", _byte_level(found))):
        v = vocabulary(name)
        ids = [v.tokenizer.get_vocab()[p] for p in pieces]
        assert v.decode(ids) == expected
        assert v.prompt_text(ids[:cut]) + v.response_text(ids[:cut], ids[cut:]) == expected or cut >= len(ids)


def _byte_level(found: list[int]) -> list[str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return [bytes_to_unicode()[b] for b in found]


@pytest.mark.parametrize("name", ["unigram-first", "bytes"])
def test_a_character_that_is_cut_is_held_back_and_shown_once_at_the_end(name):
    v = vocabulary(name)
    ids = [*v.response_ids([], "a"), *_ids_of_bytes(v, "🙂".encode())]
    state, seen = v.start_decoding([]), []
    for end in range(1, len(ids)):
        new, state = v.continue_text(ids[:end], state)
        seen.append(new)
    assert seen == ["a", "", "", ""]
    assert v.continue_text(ids, state)[0] == "🙂"  # one more: whole
    assert v.continue_text(ids[:-1], state, final=True)[0] == REPLACEMENT  # no more: what decode() says, once
    assert v.continue_text(ids[:-1], v.continue_text(ids[:-1], state, final=True)[1], final=True)[0] == ""
    real = _ids_of_bytes(v, REPLACEMENT.encode())
    assert v.continue_text(real, v.start_decoding([]))[0] == REPLACEMENT  # the character itself lacks nothing
    assert v.start_decoding(real).shown == 1 and v.prompt_text(real) == REPLACEMENT


def _ids_of_bytes(v: Vocabulary, data: bytes) -> list[int]:
    pieces = [f"<0x{b:02X}>" for b in data] if "<0x41>" in v.tokenizer.get_vocab() else _byte_level(list(data))
    return [v.tokenizer.get_vocab()[p] for p in pieces]


@pytest.mark.parametrize(("kind", "prefix"), SENTENCEPIECE)
@pytest.mark.parametrize(
    ("prompt", "before"),
    [("a film is", "a film is"), ("[INST] the film\n", " the film\n"), ("a[INST]", "a"), ("<s>[INST]", ""), ("", "")],
)
def test_the_first_word_keeps_its_space(kind, prefix, prompt, before):
    """Behind text, a line end or a special token; at the very beginning there is no space to keep."""
    v = vocabulary(f"{kind}-{prefix}")
    ids = v.tokenizer(prompt, add_special_tokens=False).input_ids
    the = v.tokenizer("a the", add_special_tokens=False).input_ids[-_width(v) :]
    first = not v.decode(ids) and prefix != "never"
    assert v.response_text(ids, the) == ("the" if first else " the")
    assert v.continue_text(the, v.start_decoding(ids))[0] == v.response_text(ids, the)
    assert v.decode([*ids, *the]) == v.decode(ids) + v.response_text(ids, the)


def _width(v: Vocabulary) -> int:
    """Tokens of "▁the"."""
    return len(v.tokenizer("a the", add_special_tokens=False).input_ids) - len(v.tokenizer("a", add_special_tokens=False).input_ids)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from([n for n in MAKERS if n not in ("wordpiece", "metaspace")]), texts, texts)
def test_a_given_response_gets_the_tokens_that_spell_it(name, prompt, response):
    """Neither is a space added in front nor does one get lost."""
    v = vocabulary(name)
    before = v.tokenizer("a" + prompt).input_ids  # behind some text: at the very beginning a space may have no token
    assert v.response_text(before, v.response_ids(before, response)) == response


def test_nothing_is_decoded_without_a_context():
    v = vocabulary("unigram-first")
    assert v.start_decoding([]) == DecodeState() and v.continue_text([], DecodeState(), final=True) == ("", DecodeState())


# In the engine


def writing(name, prompt, ids):
    """A base with this tokenizer that answers ``prompt`` with ``ids``."""
    reader = tiny_lm("base", tokenizer=MAKERS[name]())

    def outputs(hypotheses):
        out = torch.full((len(hypotheses), len(reader.tokenizer)), -10.0)
        for row, h in enumerate(hypotheses):
            out[row, [*ids, reader.tokenizer.eos_token_id][len(h.token_ids)]] = 10.0
        return out

    reader.outputs = outputs
    return reader


def greedy(reader, prompt, search=None, **sampling):
    request = Request(Prompt(prompt), search or Search(), SamplingParams(temperature=0, **sampling), record=True, alternatives=2)
    steps = []
    searcher = Searcher(TransformersEngine(reader))
    searcher.add(request)
    while searcher.busy:
        steps += searcher.step()
    committed = [step.committed for step in steps]
    assert all(b.startswith(a) for a, b in pairwise(committed))  # what was shown is never taken back
    assert committed[-1] == steps[-1].completion.text
    return steps[-1].completion


@pytest.mark.parametrize("name", ["unigram-first", "bpe-always", "bpe-legacy", "unigram-never", "bytes", "metaspace", "wordpiece"])
@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_engine_writes_what_the_tokenizer_would_decode(name, chunk):
    v = vocabulary(name)
    prompt = v.tokenizer("a film is").input_ids
    ids = v.response_ids(prompt, " the movie")
    seen = []
    value = FunctionValue(lambda p, r: seen.append((p, r)) or float(len(r)))
    search = Search(width=1, successors=2, chunk_length=chunk, value=value)
    got = greedy(writing(name, "a film is", ids), "a film is", search, max_new_tokens=30)
    assert got.text == " the movie" == v.decode([*prompt, *got.token_ids]).removeprefix(v.decode(prompt))
    assert "".join(d.text for d in got.details) == got.text
    assert seen[-1] == ("a film is", " the movie")
    assert all(" the movie".startswith(text) for _, text in seen)


@pytest.mark.parametrize("name", ["unigram-first", "bpe-always", "bytes"])
def test_stop_strings_and_cut_characters(name):
    v = vocabulary(name)
    prompt = v.tokenizer("a").input_ids
    ids = [*v.response_ids(prompt, " the"), *_ids_of_bytes(v, "🙂".encode()), *v.response_ids(prompt, " is")]
    size = len(ids) - len(v.response_ids(prompt, " is"))
    base = writing(name, "a", ids)
    assert greedy(base, "a", max_new_tokens=30).text == " the🙂 is"
    assert greedy(base, "a", max_new_tokens=30, stop=(" is",)).text == " the🙂"
    assert greedy(base, "a", max_new_tokens=30, stop=(" the",)).text == ""  # with the space that tokenizers drop
    for missing in (1, 2, 3):
        cut = greedy(base, "a", Search(chunk_length=1), max_new_tokens=size - missing)
        assert (cut.text, cut.finish_reason) == (" the" + REPLACEMENT, "length")
        assert "".join(d.text for d in cut.details) == cut.text
    assert greedy(base, "a", max_new_tokens=size).text == " the🙂"
    ends = writing(name, "a", ids[: size - 1])  # the model itself ends it there
    assert (greedy(ends, "a", max_new_tokens=30).text, greedy(ends, "a", max_new_tokens=30).finish_reason) == (" the" + REPLACEMENT, "stop")


@pytest.mark.parametrize("name", ["unigram-first", "bytes"])
def test_candidates_are_read_with_their_spaces(name):
    """A guide of other tokens reads prompt and every candidate as one text."""
    v = vocabulary(name)
    prompt = v.tokenizer("a film is").input_ids
    seen = []
    value = FunctionValue(lambda p, r: seen.append(r) or 0.0)
    base = writing(name, "a film is", v.response_ids(prompt, " the"))
    greedy(base, "a film is", Search(guidance=TokenGuidance(value, 1.0, 3)), max_new_tokens=4)
    the = v.response_ids(prompt, " the")[0]
    assert v.response_text(prompt, [the]) in seen and not [r for r in seen if r.startswith("the")]


@pytest.mark.parametrize("name", ["unigram-first", "bytes"])
def test_an_end_as_candidate_is_the_text_that_would_end_there(name):
    """What was held back is in the text of a response that ends, and not in that of one that goes on."""
    v = vocabulary(name)
    first, second, *_ = _ids_of_bytes(v, "日".encode())
    text, state = v.continue_text([first], v.start_decoding([]))
    h = Beam(new_key(), None, Prompt("p"), (first,), text, vocabulary=v, decoded=state)
    seen = []
    value = FunctionValue(lambda p, r: seen.append(r) or 0.0)
    logits = torch.full((1, v.size), -9.0)
    logits[0, [v.tokenizer.eos_token_id, second]] = 9.0
    apply_guidance(logits, [h], TokenGuidance(value, 1.0, 2))
    assert sorted(seen) == ["", REPLACEMENT]


def test_given_responses_are_the_same_hypotheses():
    """What was written and what is given as text: the same tokens, so the same value."""
    for name in ("unigram-first", "bpe-always", "bpe-legacy", "bytes"):
        reader = tiny_lm("base", tokenizer=MAKERS[name]())
        for text in (" the movie", "the movie", "\nis", "日"):
            h = reader.make_beam(Prompt("a film is"), text)
            assert reader.vocabulary.response_text(reader.prompt_ids(h.prompt), h.token_ids) == h.text == text
            (end,) = prefixes(reader, h.prompt, text, ends=False)[-1:]
            assert end.token_ids == h.token_ids and end.text == text
            assert all(text.startswith(beam.text) for beam in prefixes(reader, h.prompt, text, ends=False))
    with pytest.raises(PromptError, match="half of a surrogate pair"):
        reader.make_beam(Prompt("a"), "\ud83d")


@pytest.mark.parametrize("name", ["unigram-first", "bpe-legacy", "bytes"])
def test_training_reads_rollouts_by_their_very_tokens(name):
    v = vocabulary(name)
    prompt = v.tokenizer("a film is").input_ids
    ids = [v.tokenizer.get_vocab()["t" if name == "bytes" else "▁t"], *v.response_ids(prompt, "he movie")]  # not the tokenizer's own cut
    text = v.response_text(prompt, ids)
    (row,) = encoding.encode_rated([RatedResponse(Prompt("a film is"), text, 1.0, tuple(ids), False)], v.tokenizer, None, 99)
    assert row.ids == [*prompt, *ids]
    (row,) = encoding.encode_rated([RatedResponse(Prompt("a film is"), text, 1.0, None, False)], v.tokenizer, None, 99)
    assert v.decode(row.ids) == "a film is" + text


def test_server_names_tokens_as_they_stand_in_a_text():
    for name in ("unigram-first", "bpe-always", "bytes", "wordpiece"):
        v = vocabulary(name)
        token_text = TokenText(v)
        ids = v.tokenizer("a the", add_special_tokens=False).input_ids
        shown = [token_text.decode(i) for i in ids]
        assert "".join(shown).strip() == "a the" and token_text.decode(v.tokenizer.eos_token_id) == v.tokenizer.eos_token


@settings(deadline=None, max_examples=150)
@given(names, texts, st.integers(0, 14))
def test_the_bytes_of_the_tokens_of_an_answer_are_its_text(name, text, stop):
    """Also where a stop string cuts it off after ``stop`` characters."""
    v = vocabulary(name)
    ids = v.tokenizer(text, add_special_tokens=False).input_ids
    state, details = v.start_decoding(()), []
    for end, token in enumerate(ids, 1):
        piece, state = v.continue_text(ids[:end], state, final=end == len(ids))
        details.append(TokenLogprobs(token, piece, 0.0, 0.0, (), ()))
    for limit in (stop, 99):
        written = "".join(d.text for d in details)[:limit]
        shown = ChoiceState(0).take_tokens(details, len(written), final=True)
        assert b"".join(TokenText(v).own_bytes(d.token, d.text) for d in shown) == written.encode()


@settings(deadline=None, max_examples=100)
@given(names, st.lists(st.integers(0, 10**6), max_size=12))
def test_the_bytes_of_any_tokens_are_their_text_with_bytes_of_no_character_replaced(name, numbers):
    v = vocabulary(name)
    ids, state, written = [n % v.size for n in numbers], v.start_decoding(()), b""
    for end, token in enumerate(ids, 1):
        piece, state = v.continue_text(ids[:end], state, final=end == len(ids))
        written += TokenText(v).own_bytes(token, piece)
    assert written.decode(errors="replace") == v.response_text((), ids)
