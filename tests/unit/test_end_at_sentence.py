"""The setting ``end_at_sentence``: where responses end, in every kind of search, and who refuses it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivg.engines.sequences import ends_sentence
from ivg.errors import ConfigError
from ivg.model import GuidedModel
from ivg.testing import byte_tokenizer, tiny_lm, tiny_value
from ivg.types import SamplingParams
from ivg.values.implicit import ImplicitValue
from scripted import scripted


@pytest.mark.parametrize(
    ("text", "after", "expected"),
    [
        ("One. Two! Three? Four.", 1, "One."),
        ("One. Two! Three? Four.", 4, "One."),
        ("One. Two! Three? Four.", 5, "One. "),  # a token for each byte, and the sentence has ended
        ("One. Two! Three? Four.", 6, "One. Two!"),
        ("One. Two! Three? Four.", 0, "One. Two! Three? Four."),
        ("Pi is 3.14 to J. Smith. More.", 1, "Pi is 3.14 to J. Smith."),
        ('"Well," he said. (Yes!) More.', 18, '"Well," he said. (Yes!'),
        ("a list\n- with items\n", 1, "a list\n"),
        ("\n\nA heading\nmore.", 1, "\n\nA heading\n"),
        ("そうです。はい。", 1, "そうです。"),
        ("no end at all", 1, "no end at all"),
        ("Mr. and Mrs. Smith vs. Dr. No. More.", 1, "Mr. and Mrs. Smith vs. Dr. No."),
        ("Films, e.g. this, i.e. mine. More.", 1, "Films, e.g. this, i.e. mine."),
        ("In the U.S. at 5 p.m. it ended. More.", 1, "In the U.S. at 5 p.m. it ended."),
        ("He likes films, books etc. More.", 1, "He likes films, books etc."),
        ("It was the best. A mr. More.", 1, "It was the best."),
    ],
)
def test_where_a_response_ends(text, after, expected):
    done = scripted(lambda _: text).generate("x", "custom", token="script", end_at_sentence=after)
    assert (done.text, done.finish_reason) == (expected, "stop")


ORDINARY = ["film", "Gen", "always", "me", "Standard", "may", "dr", "visit", "ok", "résumé"]
ABBREVIATED = ["Mr.", "Dr.", "St.", "e.g.", "U.S.", "Ph.D.", "J.", "cf.", "al.", "a.m.", "(i.e.", "Sept.", "3.", "2.5"]
INSIDE = st.lists(st.sampled_from([*ORDINARY, *ABBREVIATED, "word,", '"so', "[1]"]), max_size=6)
END = st.tuples(
    st.sampled_from([w for w in ORDINARY if w != "Gen"]), st.sampled_from([".", "!", "?", "…", "..."]), st.sampled_from(["", '"', ")", "”"])
)


@given(st.lists(st.tuples(INSIDE, END), min_size=1, max_size=4))
def test_sentences_end_where_they_were_made_to_end(made):
    """At every end, and behind no word inside; abbreviations in any place but the last."""
    text = ""
    for words, end in made:
        for word in words:
            text += word + " "
            assert not ends_sentence(text) and not ends_sentence(text[:-1])
        text += "".join(end)
        assert ends_sentence(text) and ends_sentence(text + " ")
        text += " "


def test_structured_output_is_not_ended_at_a_sentence():
    with pytest.raises(ConfigError, match="end_at_sentence would end json_schema in its middle"):
        SamplingParams(end_at_sentence=5, json_schema='{"type": "string"}')


def test_max_new_tokens_comes_first():
    done = scripted(lambda _: "a long sentence. Another.").generate("x", "custom", token="script", end_at_sentence=4, max_new_tokens=9)
    assert (done.text, done.finish_reason) == ("a long se", "length")


ENDS = {".": 6.0, "a": 3.0, "\n": 3.0}
"""What the base writes more often than it would."""


@pytest.fixture(scope="module")
def model():
    tokens = byte_tokenizer()
    pair = ImplicitValue(tiny_lm("tuned", seed=1, tokenizer=tokens), tiny_lm("untuned", seed=2, tokenizer=tokens))
    values = {"implicit": pair, "explicit": tiny_value(seed=3, tokenizer=tokens)}
    bias = {tokens(text).input_ids[0]: bias for text, bias in ENDS.items()}
    return GuidedModel(tiny_lm("base", tokenizer=tokens), values, SamplingParams(max_new_tokens=40, logit_bias=tuple(bias.items())))


def ends(text):
    """By words, not by the expression that the engines use; the byte model writes no other punctuation often."""
    if text.endswith("\n"):
        return bool(text.strip())
    text = text.rstrip(" ")
    if text.endswith(("!", "?", "...")):
        return True
    one_letter = text[-2:-1].isalpha() and not (text[-3:-2].isalnum() or text[-3:-2] == "_")
    return text.endswith(".") and not (text[-2:-1].isdigit() or one_letter or text.endswith(".."))


@pytest.mark.parametrize("settings", [{"method": "base"}, {"method": "eft"}, {"method": "eft", "draft": 3}], ids=str)
def test_the_response_is_the_beginning_of_the_one_without(model, settings):
    for seed in range(6):
        whole = model.generate("Film", **settings, seed=seed)
        found = model.generate("Film", **settings, seed=seed, end_at_sentence=8)
        assert whole.text.startswith(found.text)
        assert found.token_ids == whole.token_ids[: len(found.token_ids)]
        assert len(found.token_ids) >= 8 or whole.token_ids == found.token_ids
        if found.finish_reason == "stop" and len(found.token_ids) < len(whole.token_ids):
            assert ends(found.text)
            return
    pytest.fail("no response ended early")


def test_every_beam_of_a_search_ends(model):
    settings = {"width": 3, "successors": 3, "chunk_length": 6, "end_at_sentence": 10}
    done = [model.generate("Film", "ivg", seed=seed, **settings) for seed in range(4)]
    assert all(ends(d.text) and len(d.token_ids) >= 10 for d in done if d.finish_reason == "stop" and d.token_ids[-1] != 0)
    assert any(d.finish_reason == "stop" and 10 <= len(d.token_ids) < 40 and d.token_ids[-1] != 0 for d in done)


def test_given_texts_have_no_end_to_look_for(model):
    with pytest.raises(ConfigError, match="end_at_sentence is about where an answer ends"):
        model.logprobs("Film", "abc", "eft", end_at_sentence=3)


@pytest.mark.parametrize("text", ["He met et al.\n", "see Fig.\n\n", "It was Dec.\n", "J.\n", "3.\n", "no stop\n"])
def test_a_line_ends_whatever_its_last_word_is(text):
    assert ends_sentence(text)
    assert not ends_sentence("\n")
