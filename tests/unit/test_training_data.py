"""Every shape of data, and words for the wrong ones."""

import json

import numpy as np
import pytest

from ivg.errors import ConfigError, ModelError
from ivg.models.training_rows import FILE, read_training_rows, row_hash, seen, write_training_rows
from ivg.testing import byte_tokenizer
from ivg.training import encoding
from ivg.training.data import (
    ColumnMapping,
    RatedResponse,
    ReadOptions,
    SFTExample,
    pair_up,
    read_preferences,
    read_prompts,
    read_rated,
    read_sft_examples,
)
from ivg.training.split import held_out
from ivg.types import Message, Preference, Prompt
from ivg.utils.jsonl import as_lines


def write(path, rows):
    path.write_text(as_lines(rows))
    return path


def test_preferences_as_texts_messages_and_whole_conversations(tmp_path):
    user, good, bad = ({"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "yes"), ("assistant", "no")))
    texts = write(tmp_path / "a.jsonl", [{"prompt": "hi", "chosen": "yes", "rejected": "no", "chosen_score": 2, "rejected_score": 0.5}])
    messages = write(tmp_path / "b.jsonl", [{"prompt": [user], "chosen": [good], "rejected": [bad]}])
    whole = write(tmp_path / "c.jsonl", [{"chosen": [user, good], "rejected": [user, bad]}])
    assert read_preferences(texts) == [Preference(Prompt("hi"), "yes", "no", 1.5)]
    chat = Preference(Prompt((Message("user", "hi"),)), "yes", "no")
    assert read_preferences(messages) == read_preferences(whole) == [chat]


def test_the_papers_columns_give_rated_responses_and_pairs(tmp_path):
    file = write(tmp_path / "imdb.jsonl", [{"prompt": "p", "responses": ["a", "b"], "scores": [9, -9], "chosen": 0}])
    assert read_rated(file) == [RatedResponse(Prompt("p"), "a", 9.0), RatedResponse(Prompt("p"), "b", -9.0)]
    assert read_preferences(file) == [Preference(Prompt("p"), "a", "b", 18.0)]
    other = write(tmp_path / "other.jsonl", [{"prompt": "p", "responses": ["a", "b"], "scores": [9, -9], "chosen": 1}])
    assert read_preferences(other) == [Preference(Prompt("p"), "b", "a", -18.0)]  # the label of the data, not a new draw
    assert read_sft_examples(other) == [SFTExample(Prompt("p"), "b")]
    with pytest.raises(ConfigError, match="index of one of 2 responses, got 2"):
        read_preferences(write(tmp_path / "bad.jsonl", [{"prompt": "p", "responses": ["a", "b"], "scores": [9, -9], "chosen": 2}]))
    with pytest.raises(ConfigError, match="line 1: 2 responses and 1 scores"):
        read_rated(write(tmp_path / "worse.jsonl", [{"prompt": "p", "responses": ["a", "b"], "scores": [9]}]))


def test_later_rows_lack_nothing(tmp_path):
    file = write(tmp_path / "x.jsonl", [{"prompt": "p", "response": "r", "score": 1}, {"prompt": "p", "score": 1}])
    with pytest.raises(ConfigError, match=r"line 2: no response\n  got prompt, score"):
        read_rated(file)
    with pytest.raises(ConfigError, match="line 1: the prompt is empty"):
        read_prompts(write(tmp_path / "y.jsonl", [{"prompt": " "}]))


def test_responses_to_a_prompt_are_paired_wherever_they_stand():
    rows = [RatedResponse(Prompt(p), r, s) for p, r, s in (("p", "a", 99), ("q", "c", -99), ("p", "b", 0), ("q", "d", 0))]
    assert [(x.prompt.content, x.chosen) for x in pair_up(rows)] == [("p", "a"), ("q", "d")]


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": "p", "response": text, "score": score} for text, score in (("a", 99), ("b", 0))],
        [{"prompt": "p", "responses": ["a", "b"], "scores": [99, 0]}],
    ],
)
def test_preferences_are_made_of_all_rated_responses(tmp_path, rows):
    assert read_preferences(write(tmp_path / "r.jsonl", rows)) == [Preference(Prompt("p"), "a", "b", 99.0)]


def test_rewards_that_are_python_functions(tmp_path):
    from ivg.values.reward import load_reward

    (tmp_path / "random.py").write_text("def score(prompt, response):\n    return len(prompt) + 10 * len(response)\nnumber = 1\n")
    reward = load_reward(f"{tmp_path / 'random.py'}:score")  # not the standard library's module of that name
    assert reward.judge([(Prompt("ab"), "c")]) == [12.0]
    for name, words in (
        ("random.py:none", "AttributeError"),
        ("random.py:number", "is not a function"),
        ("nothing.py:f", "FileNotFoundError"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_reward(f"{tmp_path}/{name}")


def test_parquet_json_and_folders(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"prompt": "p", "response": "r", "score": 1.0}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    (tmp_path / "test.json").write_text(json.dumps(rows))
    assert read_rated(tmp_path) == read_rated(tmp_path, ReadOptions("test")) == [RatedResponse(Prompt("p"), "r", 1.0)]
    with pytest.raises(ConfigError, match=r"no split 'dev'\n.*test.json, train.parquet"):
        read_rated(tmp_path, ReadOptions("dev"))


def test_errors_of_wrong_columns_list_got_and_expected(tmp_path):
    file = write(tmp_path / "x.jsonl", [{"question": "q", "answer": "a"}])
    with pytest.raises(
        ConfigError, match=r"columns question, answer\n  preferences need prompt, chosen, rejected; or prompt, response, score"
    ):
        read_preferences(file)
    with pytest.raises(ConfigError, match="rated responses need prompt, response, score"):
        read_rated(file)
    with pytest.raises(ConfigError, match="--columns NAME=COLUMN"):
        read_prompts(file)
    mapping = ColumnMapping({"prompt": "question", "response": "answer"}, "{prompt}?", " {response}")
    assert read_sft_examples(file, ReadOptions(mapping=mapping)) == [SFTExample(Prompt("q?"), " a")]
    with pytest.raises(ConfigError, match=r"no column 'x' \(for prompt\)"):
        read_prompts(file, ReadOptions(mapping=ColumnMapping({"prompt": "x"})))


@pytest.mark.parametrize("score", [None, "good", float("nan"), float("inf")])
def test_a_score_must_be_a_finite_number(tmp_path, score):
    file = write(tmp_path / "x.jsonl", [{"prompt": "p", "response": "r", "score": score}])
    with pytest.raises(ConfigError, match=r"line 1: (expected a finite|no) score"):
        read_rated(file)


def test_files_that_are_not_there_or_not_data(tmp_path):
    with pytest.raises(ConfigError, match=r"no such file: .*none\.parquet"):
        read_rated(tmp_path / "none.parquet")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "p"}\nhello\n')
    with pytest.raises(ConfigError, match="line 2: expected a JSON object, got hello"):
        read_prompts(tmp_path / "bad.jsonl")
    (tmp_path / "latin.csv").write_bytes("prompt\nOné\nTwé\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"no row that can be used\n  the first of 2: .*line 2: not UTF-8"):
        read_prompts(tmp_path / "latin.csv", ReadOptions(on_bad=lambda row: None))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ConfigError, match="is empty"):
        read_prompts(tmp_path / "empty.jsonl")


def test_rollouts_that_failed_are_left_out(tmp_path):
    rows = [
        {"prompt": "p", "index": 0, "error": "too long", "response": None},
        {"prompt": "q", "response": "r", "score": 1, "finish_reason": "length"},
    ]
    assert read_rated(write(tmp_path / "r.jsonl", rows)) == [RatedResponse(Prompt("q"), "r", 1.0, None, False)]


def test_bradley_terry_labels_follow_the_rewards():
    rows = [RatedResponse(Prompt(str(i)), side, score) for i in range(4000) for side, score in (("a", 1.0), ("b", 0.0))]
    pairs = pair_up(rows, seed=3)
    share = sum(p.chosen == "a" for p in pairs) / len(pairs)
    assert abs(share - 0.7311) < 0.03  # sigmoid(1), 4 standard errors
    assert all(p.margin == (1.0 if p.chosen == "a" else -1.0) for p in pairs)
    assert pair_up(rows, seed=3) == pairs != pair_up(rows, seed=4)
    assert all(pair.margin > 0 for pair in pair_up(rows, label="higher"))
    assert pair_up([RatedResponse(Prompt("p"), text, 1.0) for text in "ab"], label="higher") == []
    assert pair_up([RatedResponse(Prompt("p"), "same", 1.0), RatedResponse(Prompt("p"), "same", 2.0)]) == []


def test_no_prompt_is_both_trained_on_and_measured():
    rows = [RatedResponse(Prompt(str(i % 10)), str(i), 0.0) for i in range(40)]
    train, test = held_out(rows, 0.2)
    assert (len(train), len(test)) == (32, 8)
    assert not {r.prompt for r in train} & {r.prompt for r in test}
    assert {r.prompt.content for r in test} == {"8", "9"}  # the last prompts: which rows are held out is no surprise
    assert held_out(rows, 0.0)[1] == []


def test_rows_in_tokens_end_only_where_the_response_is_whole():
    tokenizer = byte_tokenizer()
    cut, whole = RatedResponse(Prompt("ab"), "cd", 1.0, None, False), RatedResponse(Prompt("ab"), "cd", 1.0)
    a, b = encoding.encode_rated([cut, whole], tokenizer, None, 99)
    assert b.ids == [*a.ids, tokenizer.eos_token_id]
    assert a.prompt_length == b.prompt_length == 2
    (pair,) = encoding.encode_preferences([Preference(Prompt("ab"), "c", "d", None, False, True)], tokenizer, "<{prompt}>", 99)
    assert tokenizer.decode(pair["prompt_ids"]) == "<ab>"
    assert pair["rejected_ids"][-1] == tokenizer.eos_token_id != pair["chosen_ids"][-1]
    assert encoding.encode_rated([cut], tokenizer, None, 3) == []


def test_rollouts_keep_their_tokens_unless_the_value_has_others():
    merged, plain = byte_tokenizer(merges=[("a", "b")]), byte_tokenizer()
    odd = plain("ab", add_special_tokens=False).input_ids  # two tokens, which `merged` would write as one
    row = RatedResponse(Prompt("x"), "ab", 1.0, tuple(odd), False)
    assert encoding.encode_rated([row], merged, None, 99)[0].ids[1:] == odd
    permuted = byte_tokenizer(permute=True)
    assert permuted.decode(encoding.encode_rated([row], permuted, None, 99)[0].ids) == "xab"


def test_fingerprints_identify_rows_without_their_text(tmp_path):
    chat = Prompt((Message("user", "Say  hi"),))
    rows = [(Prompt("Say hi"), "hi there"), (None, "A text as it is"), (Prompt("caf\u00e9"), "\ud83d lone")]
    write_training_rows(tmp_path, rows)
    known = read_training_rows(tmp_path)
    assert len(known) == 3
    assert known.tolist() == sorted(row_hash(*row) for row in rows)
    assert seen(known, Prompt("Say hi"), "hi there")
    assert seen(known, chat, " hi\nthere ")  # one user message and other white space: the same row
    assert seen(known, Prompt("A text"), " as it is")  # prompt and response of what was trained on as one text
    assert seen(known, Prompt("cafe\u0301"), "\ud83d lone")
    assert not seen(known, Prompt("Say hi"), "hi")
    assert not seen(known, Prompt("Say"), "hi hi there")
    assert b"hi there" not in (tmp_path / FILE).read_bytes()
    assert (tmp_path / FILE).stat().st_size <= 128 + 8 * 3
    (tmp_path / "child").mkdir()
    write_training_rows(tmp_path / "child", [(Prompt("new"), "row"), rows[0]], parent=tmp_path)
    assert len(read_training_rows(tmp_path / "child")) == 4
    (tmp_path / "plain").mkdir()
    assert read_training_rows(tmp_path / "plain") is None
    assert read_training_rows("file.py:function") is None
    for damage in (known.tobytes()[:20], b""):
        (tmp_path / FILE).write_bytes(damage)
        with pytest.raises(ModelError, match=f"cannot read .*{FILE}"):
            read_training_rows(tmp_path)
    np.save(tmp_path / FILE, np.zeros((2, 2)))
    with pytest.raises(ModelError, match="expected a list of 64-bit hashes"):
        read_training_rows(tmp_path)


def test_unusable_rows_are_reported_and_left_out(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text(
        '{"prompt": "p", "chosen": "a", "rejected": "b"}\nhello\n{"prompt": "p", "chosen": "a"}\n'
        '{"prompt": "p", "chosen": "a", "rejected": "a"}\n{"prompt": 3, "chosen": "a", "rejected": "b"}\n'
    )
    bad = []
    assert read_preferences(file, options=ReadOptions(on_bad=bad.append)) == [Preference(Prompt("p"), "a", "b")]
    assert [row.place.rpartition(" ")[2] for row in bad] == ["2", "3", "4", "5"]
    assert bad[2].error == "chosen and rejected are the same text"
    with pytest.raises(ConfigError, match=r"x\.jsonl, line 2: expected a JSON object, got hello"):
        read_preferences(file)


def test_cells_of_csv_are_texts(tmp_path):
    lists = ',"[""a"", ""b""]","[1, -1]",0\n'
    (tmp_path / "a.csv").write_text(f"prompt,responses,scores,chosen\np{lists}")
    assert read_preferences(tmp_path / "a.csv") == [Preference(Prompt("p"), "a", "b", 2.0)]
    (tmp_path / "b.csv").write_text('prompt,response,score,token_ids,ended,error\np,r,0.5,"[1, 2]",False,\nq,s,1,,true,too long\n')
    assert read_rated(tmp_path / "b.csv") == [RatedResponse(Prompt("p"), "r", 0.5, (1, 2), False)]
    (tmp_path / "c.csv").write_text("prompt,responses,scores\np,ab,cd\n")
    with pytest.raises(ConfigError, match="line 2: expected a list in responses, got 'ab'"):
        read_rated(tmp_path / "c.csv")
