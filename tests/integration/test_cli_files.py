"""No command reads and writes one file."""

import pytest

from ivg.utils.jsonl import as_lines

ROWS = as_lines([{"prompt": "One", "chosen": "a", "rejected": "b"}, {"prompt": "Two", "response": "a"}])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("train sft --model embedded:untuned --data rows.jsonl --out run --failed rows.jsonl", "--data and --failed are the same"),
        ("train sft --model embedded:untuned --data rows.jsonl --out run --failed link.jsonl", "--data and --failed are the same"),
        ("train sft --model embedded:untuned --data rows.jsonl --out run --failed hard.jsonl", "--data and --failed are the same"),
        ("train dpo --model embedded:untuned --data x.jsonl --data rows.jsonl --out run --failed ./rows.jsonl", "are the same"),
        (
            "train dpo --model embedded:untuned --data data --out run --failed data/train.jsonl",
            "a file of the split that --data data reads",
        ),
        ("train dpo --model embedded:untuned --data data --out run --failed data/train-failed.jsonl", "a file of the split that"),
        ("train rollout --prompts rows.jsonl --reward embedded:gold --out rows.jsonl", "--prompts and --out are the same file"),
        ("train rollout --prompts rows.jsonl --reward embedded:gold --out rows.parquet", "--prompts and --out are the same file"),
        ("train rollout --prompts rows.jsonl --reward embedded:gold --out r.jsonl --failed r.jsonl", "--out and --failed are the same"),
        ("check --preferences rows.jsonl --output rows.jsonl", "--preferences and --output are the same file"),
        ("winrate rows.jsonl --plain --output rows.jsonl", "judgements and --output are the same file"),
        ("generate --input rows.jsonl --trace rows.jsonl", "--input and --trace are the same file"),
        ("generate --input rows.jsonl --output hard.jsonl", "--input and --output are the same file"),
    ],
)
def test_a_file_that_is_read_is_never_written(ivg, tmp_path, monkeypatch, arguments, says):
    if arguments.startswith("train"):
        pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for file in (tmp_path / "rows.jsonl", tmp_path / "x.jsonl", tmp_path / "data" / "train.jsonl"):
        file.write_text(ROWS)
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "rows.jsonl")
    (tmp_path / "hard.jsonl").hardlink_to(tmp_path / "rows.jsonl")
    code, out, err = ivg(*arguments.split())
    assert (code, out, says in err) == (2, "", True), err
    assert (tmp_path / "rows.jsonl").read_text() == (tmp_path / "data" / "train.jsonl").read_text() == ROWS
