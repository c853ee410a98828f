"""Rows in, rows out: formats, failed rows, resuming, pipes, provenance, rollouts."""

# ruff: noqa: F811  (a fixture of another file)

import json
import sys

import pytest
from test_cli import LENGTH, hub, rows_of, write_rows  # noqa: F401  (hub is a fixture)

from ivg import GuidedModel
from ivg.models.loading import LoadOptions
from ivg.utils.locks import lock_file

EFT = ["--method", "base", "--max-new-tokens", "3", "--ignore-eos", "--dtype", "float32", "--device", "cpu"]


@pytest.fixture
def base(hub):
    return ["--base", str(hub / "base"), *EFT]


def test_every_format_and_columns_that_travel(ivg, base, tmp_path):
    rows = [{"id": "a", "prompt": "One", "topic": "x\u2028y"}, {"id": "b", "prompt": "Two", "topic": "🎬"}]
    files = {
        "in.jsonl": "".join(json.dumps(r, ensure_ascii=False) + "\r\n" for r in rows),
        "in.json": json.dumps({"data": rows}),
        "in.csv": "\ufeffid,prompt,topic\n" + "".join(f'{r["id"]},{r["prompt"]},"{r["topic"]}"\n' for r in rows),
    }
    found = []
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode())
        assert ivg("generate", "--input", tmp_path / name, "--output", tmp_path / f"{name}.out.jsonl", *base)[0] == 0
        found.append([{k: r[k] for k in ("id", "prompt", "topic", "text")} for r in rows_of_file(tmp_path / f"{name}.out.jsonl")])
    assert found[0] == found[1] == found[2]
    assert [{k: r[k] for k in ("id", "prompt", "topic")} for r in found[0]] == rows
    (tmp_path / "in.txt").write_text("One\n\nTwo\n")
    assert ivg("generate", "--input", tmp_path / "in.txt", "--format", "text", "--output", tmp_path / "t.jsonl", *base)[0] == 0
    assert [r["prompt"] for r in rows_of_file(tmp_path / "t.jsonl")] == ["One", "Two"]


def test_a_prompt_in_several_rows_gets_new_draws(ivg, base, tmp_path):
    """Each row others; the first those that it has alone; the same when the run is taken up again."""
    longer = [*base, "--max-new-tokens", "12", "--temperature", "1", "--n", "2", "--seed", "5"]
    source, out, alone = (
        write_rows(tmp_path / "in.jsonl", [{"prompt": p} for p in ("One", "Two", "One", "One")]),
        tmp_path / "o",
        tmp_path / "a",
    )
    assert ivg("generate", "--input", source, "--output", out, *longer)[0] == 0
    found = rows_of_file(out)
    texts = [r["text"] for r in found if r["prompt"] == "One"]
    assert len(set(texts)) == 6 and {r["seed"] for r in found} == {5}
    assert ivg("generate", "--input", write_rows(tmp_path / "one.jsonl", [{"prompt": "One"}]), "--output", alone, *longer)[0] == 0
    assert [r["text"] for r in rows_of_file(alone)] == texts[:2]
    out.write_text("".join(f"{json.dumps(r)}\n" for r in found if r["id"] != found[4]["id"]))
    assert ivg("generate", "--input", source, "--output", out, *longer)[0] == 0
    assert {(r["id"], r["index"], r["text"]) for r in rows_of_file(out)} == {(r["id"], r["index"], r["text"]) for r in found}


def test_rows_that_are_added_get_draws_that_no_other_row_has(ivg, base, tmp_path):
    """In front of a row that is done, too; a row that is lost gets its own again."""
    longer = [*base, "--max-new-tokens", "12", "--temperature", "1"]
    out = tmp_path / "o.jsonl"

    def run(*names):
        source = write_rows(tmp_path / "in.jsonl", [{"id": name, "prompt": "One", "repeat": "mine"} for name in names])
        assert ivg("generate", "--input", source, "--output", out, *longer)[0] == 0
        rows = rows_of_file(out)
        assert all(r["input_columns"] == {"repeat": "mine"} for r in rows)
        return {r["id"]: (r["repeat"], r["text"]) for r in rows}

    first = run("a")
    found = run("b", "a", "c")
    assert found["a"] == first["a"] and [found[name][0] for name in "abc"] == [0, 1, 2] and len({text for _, text in found.values()}) == 3
    out.write_text("".join(line for line in out.read_text().splitlines(keepends=True) if '"id": "b"' not in line))
    assert run("c", "b") == found


def test_a_refused_run_leaves_the_failed_rows_of_another(ivg, base, tmp_path):
    """Of one that writes the same output now, and of one with other settings."""
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "One"}, {"question": "no prompt"}])
    out, failed = tmp_path / "o.jsonl", tmp_path / "failed.jsonl"
    command = ["generate", "--input", source, "--output", out, "--failed", failed, *base]
    assert ivg(*command)[0] == 1
    kept = failed.read_text()
    assert len(rows_of_file(failed)) == 1
    failed.write_text(kept + kept)
    with lock_file(out):
        code, _, err = ivg(*command)
    assert (code, failed.read_text()) == (2, kept + kept) and "another run is writing" in err
    code, _, err = ivg(*command, "--max-new-tokens", "2")
    assert (code, failed.read_text()) == (2, kept + kept) and "settings differ" in err
    assert ivg(*command)[0] == 1 and failed.read_text() == kept


def test_columns_of_other_names(ivg, base, tmp_path):
    source = write_rows(tmp_path / "in.jsonl", [{"question": "One", "topic": "x"}])
    assert ivg("generate", "--input", source, "--columns", "prompt=question", "--output", tmp_path / "out.jsonl", *base)[0] == 0
    (row,) = rows_of_file(tmp_path / "out.jsonl")
    assert (row["prompt"], row["question"], row["topic"]) == ("One", "One", "x")
    code, _, err = ivg("generate", "--input", source, "--columns", "prompt=questn", *base)
    assert code == 2 and err == f"error: {source}: no column questn - got question, topic\n"


def rows_of_file(path):
    from ivg.utils.jsonl import read_jsonl

    return list(read_jsonl(path))


def test_failed_rows_are_kept_as_they_were_with_why(ivg, base, tmp_path):
    long = {"id": 3, "prompt": "long " * 40, "x": [4]}
    (tmp_path / "in.jsonl").write_text('{"id": 1, "prompt": "One", "x": 2}\nnot json\n' + json.dumps(long) + "\n")
    arguments = ["generate", "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--failed", tmp_path / "f.jsonl", *base]
    code, _, err = ivg(*arguments, "--n", 2)
    assert code == 1
    assert err.endswith("answered 2, skipped 0, failed 3, already done 0\n")
    assert err.count("error: ") == 2
    unread, unanswered = rows_of_file(tmp_path / "f.jsonl")
    assert unread["text"] == "not json"
    assert "expected a JSON object" in unread["error"]
    assert "context of base (128)" in unanswered.pop("error")
    assert unanswered == long
    assert ivg(*arguments, "--n", 2)[2].endswith("answered 0, skipped 0, failed 3, already done 2\n")


def test_best_of_keeps_the_likeliest(ivg, hub, tmp_path):
    rows = [{"id": 0, "prompt": "One"}, {"id": 1, "prompt": "Two, "}]
    out, source = tmp_path / "out.jsonl", write_rows(tmp_path / "in.jsonl", rows)
    drawn = ["--base", str(hub / "base"), *EFT, "--seed", 3, "--temperature", 1.3, "--best-of", 5]
    arguments = ["generate", "--input", source, *drawn, "--output", out]
    model = GuidedModel.from_pretrained(hub / "base", options=LoadOptions(device="cpu", dtype="float32"))
    settings = {"seed": 3, "temperature": 1.3, "max_new_tokens": 3, "ignore_eos": True}
    expected = [c for some in model.generate(["One", "Two, "], "base", n=2, best_of=5, **settings) for c in some]

    def tokens():
        return [tuple(r["token_ids"]) for r in sorted(rows_of_file(out), key=lambda r: (r["id"], r["index"]))]

    assert ivg(*arguments)[2].endswith("answered 2, skipped 0, failed 0, already done 0\n")
    assert tokens() == [c.token_ids for c in expected[::2]]
    assert ivg(*arguments, "--n", 2)[2].endswith("answered 2, skipped 0, failed 0, already done 2\n")
    assert tokens() == [c.token_ids for c in expected]
    assert tokens() != [c.token_ids for some in model.generate(["One", "Two, "], "base", n=2, **settings) for c in some]
    assert all(r["settings"]["best_of"] == 5 for r in rows_of_file(out))
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[1:]))  # as of a killed run
    assert ivg(*arguments, "--n", 2)[2].endswith("answered 1, skipped 0, failed 0, already done 3\n")
    assert tokens() == [c.token_ids for c in expected]
    assert ivg("generate", "One", *drawn, "--quiet")[1] == f"One{expected[0].text}\n"

    code, _, err = ivg(*arguments, "--best-of", 4)
    assert code == 2 and "best_of is 4, was 5" in err
    code, _, err = ivg(*arguments, "--n", 6)
    assert code == 2 and "run: best_of must be at least n (6), got 5" in err


def test_samples_without_a_score_are_never_the_best(ivg, hub, tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text("def score(prompt, response):\n    return float('inf') if sum(response.encode()) % 2 else 1.0\n")
    base = ["--base", str(hub / "base"), "--reward", f"{reward}:score", *EFT[2:], "--method", "bon", "-K", 1, "--temperature", 1.3]
    source, out = write_rows(tmp_path / "in.jsonl", [{"id": 1, "prompt": "One"}]), tmp_path / "out.jsonl"
    code, _, err = ivg("generate", "--input", source, *base, "--output", out, "--best-of", 8, "--n", 8)
    rows = sorted(rows_of_file(out), key=lambda r: r["index"])
    assert code == 1 and 0 < len(rows) < 8 and f"answered {len(rows)}, skipped 0, failed {8 - len(rows)}" in err
    assert [r["index"] for r in rows] == list(range(len(rows)))
    out.unlink()
    code, _, err = ivg("generate", "--input", source, *base, "--output", out, "--best-of", 8)
    (best,) = rows_of_file(out)
    failed = 8 - len(rows)
    assert code == 0 and f"note: {failed} sample" in err and "best_of chose among the others" in err
    assert best["token_ids"] == rows[0]["token_ids"] and f"best_of: {failed} of 8 samples failed: " in best["notes"][-1]
    reward.write_text("def score(prompt, response):\n    return float('inf')\n")
    code, _, err = ivg("generate", "--input", source, *base, "--output", tmp_path / "none.jsonl", "--best-of", 4)
    assert code and "failed 1" in err and "best_of chose" not in err  # there are no others


@pytest.mark.parametrize("verb", ["chat", "compare", "serve", "eval sentiment --out OUT", "train rollout --prompts IN --out OUT.jsonl"])
def test_best_of_is_refused_where_one_answer_is_drawn(ivg, tmp_path, verb):
    (tmp_path / "r.toml").write_text("[run]\nn = 2\nbest_of = 3\n")
    arguments = [word.replace("OUT", str(tmp_path / "out")).replace("IN", str(tmp_path / "in.jsonl")) for word in verb.split()]
    more = ["Hi"] if verb in ("chat", "compare") else []
    code, _, err = ivg(*arguments, *more, "--recipe", tmp_path / "r.toml")
    assert code == 2 and "run.best_of=3: ivg" in err and "leave it out; ivg generate reads it" in err


def test_edited_prompts_are_answered_again_and_new_rows_shift_nothing(ivg, base, tmp_path):
    arguments = ["generate", "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", *base]
    write_rows(tmp_path / "in.jsonl", [{"prompt": "One"}, {"prompt": "Two"}, {"id": 5, "prompt": "Five"}])
    ivg(*arguments)
    first = {r["prompt"]: r["text"] for r in rows_of(tmp_path / "out.jsonl")}
    write_rows(tmp_path / "in.jsonl", [{"prompt": "New"}, {"prompt": "One"}, {"prompt": "Two"}, {"id": 5, "prompt": "Other"}])
    code, _, err = ivg(*arguments)
    assert code == 0
    assert "1 prompts have changed under the same id (5)" in err
    assert err.endswith("answered 2, skipped 0, failed 0, already done 2\n")
    rows = rows_of(tmp_path / "out.jsonl")
    assert sorted(r["prompt"] for r in rows) == ["New", "One", "Other", "Two"]
    assert all(r["text"] == first[r["prompt"]] for r in rows if r["prompt"] in first)
    texts = {r["prompt"]: r["text"] for r in rows}
    ivg("generate", "Other", "--output", tmp_path / "other.jsonl", *base)
    assert rows_of(tmp_path / "other.jsonl")[0]["text"] == texts["Other"]


def test_what_made_the_answers_is_compared(ivg, hub, base, tmp_path):
    import shutil

    model = tmp_path / "model"
    shutil.copytree(hub / "base", model)
    arguments = ["generate", "One", "--output", tmp_path / "out.jsonl", "--base", model, *EFT]
    assert ivg(*arguments)[0] == 0
    before = (tmp_path / "out.jsonl").read_bytes()
    assert "already done 1" in ivg(*arguments)[2]
    for change, says in (
        (["--template", "base=Q: {prompt}"], 'templates is {"base": "Q: {prompt}"}, was not set'),
        (["--dtype", "bfloat16"], 'dtype is "bfloat16", was "float32"'),
        (["--temperature", "0.5"], "temperature is 0.5, was not set"),
    ):
        code, _, err = ivg(*arguments, *change)
        assert (code, says in err) == (2, True)
        assert "use another --output" in err
    for file in model.glob("*.safetensors"):
        data = bytearray(file.read_bytes())
        data[-3] ^= 1  # trained anew
        file.write_bytes(data)
    code, _, err = ivg(*arguments)
    assert (code, "weights.base is " in err) == (2, True)
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_answers_to_standard_output_and_pipes(ivg, base, tmp_path):
    import os
    import threading

    wanted = [{"id": 1, "prompt": "One"}, {"id": 2, "prompt": "Two"}]
    write_rows(tmp_path / "in.jsonl", wanted)
    for name in ("-", "/dev/stdout"):
        code, out, err = ivg("generate", "--input", tmp_path / "in.jsonl", "--output", name, *base)
        assert [json.loads(line)["id"] for line in out.splitlines()] == [1, 2]
        assert (code, err) == (0, "answered 2, skipped 0, failed 0, already done 0\n")
    os.mkfifo(tmp_path / "pipe")
    heard = []
    reader = threading.Thread(target=lambda: heard.append((tmp_path / "pipe").read_text()), daemon=True)
    reader.start()
    assert ivg("generate", "--input", tmp_path / "in.jsonl", "--output", tmp_path / "pipe", *base)[0] == 0
    reader.join(60)
    assert [json.loads(line)["id"] for line in heard[0].splitlines()] == [1, 2]


def test_a_closed_pipe_ends_the_run_without_an_error(ivg, base, tmp_path, monkeypatch):
    import errno

    from ivg.jobs.store import StreamRows

    def closed(self, row):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(StreamRows, "append", closed)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # typer puts another in its place
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    code, _, err = ivg("generate", "One", "--output", "-", *base)
    assert (code, err) == (1, "answered 0, skipped 1, failed 0, already done 0\n")


def test_a_score_that_is_no_number_fails_its_row(ivg, base, tmp_path, monkeypatch):
    from dataclasses import replace

    from ivg.jobs.runner import LocalBackend

    def scored(result):
        score = float("nan") if result.task.source.id == 1 else 1.0
        return replace(result, completion=replace(result.completion, score=score))

    real = LocalBackend.run
    monkeypatch.setattr(LocalBackend, "run", lambda self, tasks: map(scored, real(self, tasks)))
    write_rows(tmp_path / "in.jsonl", [{"id": i, "prompt": "One"} for i in range(3)])
    code, _, err = ivg("generate", "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", *base)
    assert code == 1
    assert "line 2: its score is nan" in err
    assert [r["id"] for r in rows_of(tmp_path / "out.jsonl")] == [0, 2]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--input", "none.jsonl"], "no such file: none.jsonl - expected a file: "),
        (["--input", "org/rows"], "no such file: org/rows - expected a file: "),  # asks no hub
        (["--input", "."], "cannot read .: it is a folder - expected a file of rows"),
        (["--input", "empty.jsonl"], "empty.jsonl holds no rows - expected rows with prompt or messages"),
        (["--input", "latin.jsonl"], "latin.jsonl, line 1: not UTF-8 at byte 16 (0xe9); convert the file, e.g. iconv -f LATIN1 -t UTF-8"),
        (["--input", "wide.jsonl"], "wide.jsonl is UTF-16, not UTF-8 - convert it, e.g. iconv -f UTF-16 -t UTF-8"),
        (["--input", "good.jsonl", "--format", "xml"], "unknown format 'xml' - expected one of: jsonl, json, csv, parquet, text"),
        (["--input", "words.txt"], "cannot tell the format of words.txt - give --format jsonl, json, csv, parquet or text"),
        (["--input", "good.jsonl", "--output", "."], "cannot write .: it is a folder - expected a JSONL file"),
        (
            ["--input", "good.jsonl", "--output", "out.csv"],
            "cannot write out.csv: rows are written as JSONL - give a name that ends in .jsonl",
        ),
        (
            ["--input", "good.jsonl", "--output", "good.jsonl"],
            "--input and --output are the same file, good.jsonl - give each a file of its own",
        ),
        (["--input", "good.jsonl", "--failed", "-"], "--failed - is no file - expected a JSONL file for the rows that failed"),
        (["--input", "good.jsonl", "--output", "/dev/full"], "cannot write /dev/full: No space left on device"),
        (["--input", "good.jsonl", "--output", "/proc/x.jsonl"], "cannot write /proc/x.jsonl: "),
        (
            ["--input", "good.jsonl", "--failed", "good.jsonl/x"],
            "cannot write good.jsonl/x: ",
        ),
    ],
    ids=lambda a: " ".join(a) if isinstance(a, list) else "",
)
def test_rows_that_cannot_be_read_or_written_are_one_line(ivg, base, tmp_path, monkeypatch, arguments, line):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "good.jsonl", [{"prompt": "One"}])
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "words.txt").write_text("One\n")
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "café"}\n'.encode("latin-1"))
    (tmp_path / "wide.jsonl").write_bytes('{"prompt": "café"}\n'.encode("utf-16"))
    code, out, err = ivg("generate", *arguments, *base)
    assert (code, out) == (2, "")
    (said,) = (text.removeprefix("error: ") for text in err.splitlines() if not text.startswith("answered 0, "))
    assert said.startswith(line) if line.endswith(": ") else said == line


def test_rollouts_go_on_only_with_what_made_them(ivg, hub, tmp_path):
    pytest.importorskip("trl")
    (tmp_path / "rules.py").write_text("def score(prompt, response):\n    return len(response)\n")
    (tmp_path / "prompts.csv").write_text("prompt,topic\nOne,x\nTwo\nThree,y\n" + "long " * 40 + ",z\n")
    out = tmp_path / "out.jsonl"
    models = ["--base", hub / "base", "--reward", f"{tmp_path}/rules.py:score", *LENGTH]
    arguments = ["train", "rollout", "--out", out, "--samples", 2, *models]
    code, _, err = ivg(*arguments, "--prompts", tmp_path / "prompts.csv", "--failed", tmp_path / "failed.jsonl")
    assert code == 1
    assert f"{out}: 2 of 6 responses failed: prompt of" in err
    assert "prompts.csv, line 3: expected 2 fields, got 1" in err
    assert "read 3, left out 1" in err
    assert err.endswith(f"done: {out}: answered 4, failed 2\n")
    assert [row["text"] for row in rows_of(tmp_path / "failed.jsonl")] == ["Two"]
    before, meta = out.read_bytes(), json.loads((tmp_path / "out.jsonl.meta.json").read_text())
    assert meta["sampling"]["choice"] == [], "as version 0.2.0 wrote it, whose files are taken up"
    assert ivg(*arguments, "--prompts", tmp_path / "prompts.csv")[0] == 1  # no answer of those two yet
    for change, says in (
        (["--dtype", "bfloat16"], 'dtype is "bfloat16", was "float32"'),
        (["--template", "base=Q: {prompt}"], "templates is"),
        (["--temperature", "0.5"], "temperature is 0.5, was not set"),
    ):
        code, _, err = ivg(*arguments, *change, "--prompts", tmp_path / "prompts.csv")
        assert (code, says in err) == (2, True)
    (tmp_path / "prompts.txt").write_text("New\nOne\nThree\n")
    code, _, err = ivg(*arguments, "--prompts", tmp_path / "prompts.txt", "--format", "text")
    assert (code, "row 1: answers another prompt than this run" in err) == (2, True)
    (tmp_path / "rules.py").write_text("def score(prompt, response):\n    return -len(response)\n")
    code, _, err = ivg(*arguments, "--prompts", tmp_path / "prompts.csv")
    assert (code, "weights.reward is " in err) == (2, True)
    assert out.read_bytes() == before
