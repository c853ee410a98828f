"""What single cells of training rows say: ends of responses, scores, tokens, indices; and what becomes of rows that are unusable."""

import json

import pytest

from ivg.jobs.failures import Failures
from ivg.testing import byte_tokenizer
from ivg.training.data import (
    ColumnMapping,
    RatedResponse,
    ReadOptions,
    SFTExample,
    read_any,
    read_preferences,
    read_rated,
    read_sft_examples,
)
from ivg.training.data_check import check_data
from ivg.training.encoding import encode_sft
from ivg.training.split import held_out
from ivg.types import Message, Preference, Prompt
from ivg.utils.jsonl import as_lines

P = Prompt("p")
RATED = {"prompt": "p", "response": "r", "score": 1}


def write(path, rows):
    path.write_text(as_lines(rows))
    return path


def used(reader, path, rows):
    """(items, errors of the other rows)."""
    bad = []
    items = reader(write(path, rows), options=ReadOptions(on_bad=bad.append))
    return items, [row.error for row in bad]


def test_sft_appends_no_end_to_responses_that_were_cut(tmp_path):
    rows = [
        {"prompt": "p", "response": "ab", "finish_reason": "length", "ended": False},
        {"prompt": "p", "response": "ab", "finish_reason": "stop", "ended": False},  # by a stop string
        {"prompt": "p", "response": "ab", "finish_reason": "length"},
        {"prompt": "p", "response": "ab", "finish_reason": None},
        {"prompt": "p", "response": "ab", "finish_reason": "length", "ended": True},
        {"prompt": "p", "response": "ab"},
    ]
    file, tokenizer = write(tmp_path / "x.jsonl", rows), byte_tokenizer()
    examples = read_sft_examples(file)
    assert [e.ends for e in examples] == [False, False, False, True, True, True]
    ids = [row["input_ids"] for row in encode_sft(examples, tokenizer, None, 99)]
    assert [i[-1] == tokenizer.eos_token_id for i in ids] == [e.ends for e in examples]
    assert not read_sft_examples(write(tmp_path / "t.jsonl", [{"text": "ab", "finish_reason": "length"}]))[0].ends
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert not read_sft_examples(write(tmp_path / "m.jsonl", [{"messages": turns, "ended": False}]))[0].ends
    cut = write(tmp_path / "cut.jsonl", rows[:1])
    assert check_data(cut, None, tokenizer, 3).counts["too long"] == 0  # of 3 tokens, without an end
    assert check_data(write(tmp_path / "w.jsonl", rows[-1:]), None, tokenizer, 3).counts["too long"] == 1


def test_a_text_that_begins_with_its_prompt_is_refused(tmp_path):
    """It would be trained with its prompt twice."""
    rows = [{"prompt": "Q: x", "text": " A: y"}, {"prompt": "Q: x", "text": "Q: x A: y"}]
    items, errors = used(read_sft_examples, tmp_path / "a.jsonl", rows)
    assert len(items) == 1 and errors[0].startswith("text begins with the prompt")


def test_runs_of_version_0_2_know_their_rows():
    """Runs are taken up where their rows read the same: an end that follows is not said, as then."""
    assert repr(SFTExample(None, "a")) == "SFTExample(prompt=None, response='a')"
    assert repr(SFTExample(None, "a", ends=False)) != repr(SFTExample(None, "a"))


def test_an_empty_prompt_beside_messages_with_the_answer_is_refused(tmp_path):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [RATED, {"prompt": "", "messages": chat, "response": "b", "score": 1.0}]
    items, errors = used(read_rated, tmp_path / "a.jsonl", rows)
    assert len(items) == 1 and "messages end with the answer" in errors[0]


def test_the_output_of_generate_is_prompts_with_responses(tmp_path):
    rows = [{"prompt": "p", "index": 0, "text": "r", "finish_reason": "length"}, {"prompt": "p", "text": "s", "finish_reason": "stop"}]
    file = write(tmp_path / "answers.jsonl", rows)
    assert read_sft_examples(file) == [SFTExample(P, "r", False), SFTExample(P, "s")]
    assert read_any(file) == ("SFT examples", read_sft_examples(file))
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    both = write(tmp_path / "both.jsonl", [{"prompt": "q", "messages": turns, "text": "q a"}])  # as data sets on the hub have them
    assert read_sft_examples(both) == [SFTExample(Prompt((Message("user", "q"),)), "a")]
    assert read_sft_examples(write(tmp_path / "plain.jsonl", [{"text": "t"}])) == [SFTExample(None, "t")]


@pytest.mark.parametrize("score", ["1_0", "\u0663", 10**400, True, "0x1", "inf", "", [1]])
def test_scores_that_are_no_numbers_fail_their_rows(tmp_path, score):
    items, errors = used(read_rated, tmp_path / "x.jsonl", [RATED, {**RATED, "score": score}])
    if score is True:  # an outcome
        assert ([i.score for i in items], errors) == ([1.0, 1.0], [])
        return
    assert [i.score for i in items] == [1.0]
    (error,) = errors
    assert error.startswith("expected a finite score, got ") and len(error) < 120


def test_numbers_as_text_are_scores(tmp_path):
    scores = ["1", "-1.5", "+.5", "2.", "1e-3", " 7 "]
    items, errors = used(read_rated, tmp_path / "x.jsonl", [{**RATED, "score": s} for s in scores])
    assert ([i.score for i in items], errors) == ([1.0, -1.5, 0.5, 2.0, 0.001, 7.0], [])


@pytest.mark.parametrize("ids", [["x"], [1.0], [-1], [True], [2**40], [[1]], "5"])
def test_tokens_that_are_no_ids_fail_their_rows(tmp_path, ids):
    items, errors = used(read_rated, tmp_path / "x.jsonl", [{**RATED, "token_ids": [3, 4]}, {**RATED, "token_ids": ids}])
    assert items == [RatedResponse(P, "r", 1.0, (3, 4))]
    assert len(errors) == 1 and "token_ids" in errors[0]


@pytest.mark.parametrize("index", [True, False, "\u00b2", 1.0, "-1"])
def test_the_index_of_the_better_response_is_a_whole_number(tmp_path, index):
    row = {"prompt": "p", "responses": ["a", "b"], "scores": [2, 1], "chosen": 0}
    items, errors = used(read_preferences, tmp_path / "x.jsonl", [row, {**row, "chosen": index}])
    assert items == [Preference(P, "a", "b", 1.0)]
    assert errors == [f"chosen must be the index of one of 2 responses, got {index!r}"]


def test_the_format_of_responses_is_for_lists_in_csv_too(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,responses,scores\np,"[""a"", ""b""]","[1, -1]"\nq,ab,"[1]"\n')
    bad = []
    options = ReadOptions(mapping=ColumnMapping(response=" {response}"), on_bad=bad.append)
    assert [r.response for r in read_rated(tmp_path / "a.csv", options)] == [" a", " b"]
    assert [row.error for row in bad] == ["expected a list in responses, got 'ab'"]


def test_no_plain_text_is_both_trained_on_and_measured():
    rows = [SFTExample(None, text) for text in ["a", "b", "c", "d"] * 3]
    train, test = held_out(rows, 0.5)
    assert ({r.response for r in train}, {r.response for r in test}) == ({"a", "b"}, {"c", "d"})


def test_unusable_rows_are_written_as_they_were(tmp_path):
    rows = [RATED, {"prompt": "p", "response": "r", "score": "x", "more": [1, {"a": None}]}, {"question": "q"}]
    path = write(tmp_path / "x.jsonl", rows)
    path.write_text(path.read_text() + "hello\n")
    failures = Failures(lambda _: None, tmp_path / "failed.jsonl")
    failures.open()
    read_rated(path, ReadOptions(mapping=ColumnMapping({"score": "score"}), on_bad=failures.add_unusable))
    first, second, third = map(json.loads, (tmp_path / "failed.jsonl").read_text().splitlines())
    assert first == {**rows[1], "error": "expected a finite score, got 'x'"}
    assert second == {**rows[2], "error": "no column 'score' (for score) - got question"}
    assert third["text"] == "hello" and third["error"].startswith("expected a JSON object")
