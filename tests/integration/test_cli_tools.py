"""``ivg config show``, ``ivg completion`` and ``ivg data check``."""

import io
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from ivg.cli.completion import SCRIPTS, completions, line_completions
from ivg.search.methods import method_names
from ivg.settings.recipe import Recipe
from ivg.testing import byte_tokenizer
from ivg.training.data import read_sft_examples
from ivg.training.data_check import Lengths, check_data
from ivg.training.encoding import encode_sft

# ivg config show


def shown(ivg, *arguments):
    code, out, err = ivg("config", "show", "--json", *arguments)
    assert code == 0, err
    return {f"{row['table']}.{row['setting']}": (row["value"], row["source"], row.get("note", "")) for row in json.loads(out)}


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(
        """[models]
base = "embedded:base"
tuned = { path = "embedded:tuned", template = "raw" }
untuned = "embedded:untuned"
[search]
beta = 0.5
width = 3
[sampling]
temperature = 0.9
[endpoint]
model = "x"
[serve]
api_keys = ["secret-key-1"]
"""
    )
    return path


def test_each_setting_says_where_it_comes_from(ivg, recipe):
    found = shown(ivg, "--recipe", recipe, "--beta", 2, "--top-k", 5, "--set", "run.n=2", "--template", "base=chat")
    file = f"recipe {recipe}"
    assert found["search.beta"] == (2.0, "command line", "")
    assert found["sampling.temperature"] == (0.9, file, "")
    assert found["sampling.top_k"] == (5, "command line", "")
    assert found["sampling.top_p"] == (1.0, "default", "")
    assert found["run.n"] == (2, "command line", "") and found["run.seed"] == (0, "default", "")
    assert found["models.base"] == ({"path": "embedded:base", "template": "chat"}, "command line", "")
    assert found["models.tuned"] == ({"path": "embedded:tuned", "template": "raw"}, file, "")
    assert found["models.untuned"] == ("embedded:untuned", file, "")
    assert found["search.method"] == ("eft", "default", "what the models allow")
    assert found["search.token"] == ("implicit", "method eft", "")
    value, source, note = found["search.width"]
    assert (value, source) == (3, file) and note.startswith("ignored: the method eft selects among nothing")
    assert found["endpoint.model"] == ("x", file, "") and found["serve.api_keys"] == ("***", file, "")
    assert "vllm.guides" not in found


def test_what_is_shown_is_what_runs(ivg, recipe):
    """Every setting of the search has the value of the method that would run."""
    found = shown(ivg, "--reward", "embedded:gold", "--method", "cbs-explicit", "-W", 2)
    assert found["search.width"] == (2, "command line", "")
    assert found["search.select"] == ("reward", "method cbs-explicit", "in place of explicit, which no model gives")
    assert found["search.method"] == ("cbs-explicit", "command line", "")
    rows = [name for name in found if name.startswith("sampling.")]
    assert len(rows) == len(Recipe().sampling.model_fields_set or type(Recipe().sampling).model_fields)


def test_no_embedded_models_beside_an_endpoint(ivg):
    found = shown(ivg, "--engine", "http://localhost:8000/v1", "--set", "endpoint.model=x", "--method", "cbs-explicit")
    assert "models.base" not in found and found["endpoint.model"] == ("x", "command line", "")
    assert shown(ivg)["models.base"] == ("embedded:base", "default", "with the embedded guides")


def test_defaults_of_the_checkpoint_are_named(ivg, tmp_path):
    folder = tmp_path / "base"
    byte_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "generation_config.json").write_text('{"do_sample": true, "top_k": 7}')
    assert shown(ivg, "--base", folder)["sampling.top_k"] == (7, "generation_config.json of the base", "")
    assert shown(ivg, "--base", folder, "--generation-config", "ignore")["sampling.top_k"][:2] == (0, "default")


@pytest.mark.parametrize("columns", ["", "80"], ids=["pipe", "terminal"])
def test_the_table_cuts_nothing_off(ivg, recipe, columns):
    """The path of a recipe is long: it once left no place for the values."""
    code, out, _ = ivg("config", "show", "--recipe", recipe, "--method", "cbs-explicit", columns=columns)
    assert code == 0 and "…" not in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if "." in line.split()[0]}
    assert rows["search.method"][0] == "cbs-explicit" and rows["search.width"][0] == "3"
    assert (str(recipe) in out) == (not columns)  # in a terminal it goes on in the next line
    assert max(map(len, out.splitlines())) <= int(columns or 1000)


def test_a_line_break_in_a_value_breaks_no_row(ivg):
    rows = [line.split() for line in ivg("config", "show", "--method", "prm", "--changed")[1].splitlines()]
    assert ["search.chunk_until", r'"\n"', "method", "prm"] in rows
    (row,) = (line.split() for line in ivg("models")[1].splitlines() if line.startswith("prm "))
    assert row[6:10] == ["chunk_until", r'"\n",', "step_aggregation", "last"]


def test_the_table_and_what_changed(ivg, recipe):
    code, out, _ = ivg("config", "show", "--recipe", recipe, "--changed")
    assert code == 0 and "search.beta" in out and "default" not in out.replace("what the models allow", "")
    assert ivg("config", "show", "--beta", "x")[0] == 2
    assert "unknown method 'nope'" in ivg("config", "show", "--method", "nope")[2]


# ivg completion


@pytest.mark.parametrize(
    "words, expected",
    [
        (["gen"], ["generate"]),
        (["generate", "--met"], ["--method"]),
        (["generate", "--method", "cbs-e"], ["cbs-explicit"]),
        (["compare", "--methods", "smc"], ["smc"]),
        (["generate", "--format", ""], ["jsonl", "json", "csv", "parquet", "text"]),
        (["generate", "--generation-config", "i"], ["ignore"]),
        (["generate", "--input", ""], []),
        (["generate", "x", "--quie"], ["--quiet"]),
        (["train", "s"], ["sft"]),
        (["train", "sft", "--out"], ["--out"]),
        (["config", "s"], ["show"]),
        (["--vers"], ["--version"]),
        (["pac"], []),
        (["generate", "--method=cbs-e"], ["--method=cbs-explicit"]),
        (["eval", "sentiment", "--methods", "base,ef"], ["base,eft", "base,eft-gated", "base,eft-kl"]),
        (["compare", "--methods", "eft,base,eft"], ["eft,base,eft-gated", "eft,base,eft-kl"]),
        (["serve", "--base", "smo"], ["smollm2"]),
        (["generate", "--base", "embedded:b"], ["embedded:base"]),
        (["models", "add", ""], ["smollm2"]),
        (["eval", "su"], ["summarization"]),
        (["eval", "sentiment", ""], []),
        (["eval", "--stage", "s"], ["score"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
        (["bench", "--shape", "tiny"], ["tiny", "tiny-llama"]),
        (["bench", "--con"], []),
        (["train", "value", "--target", ""], ["fudge", "td", "cd-q", "binary"]),
        (["train", "sft", "--mode", "l"], ["lora"]),
        (["generate", "--", "--met"], []),
    ],
)
def test_words_that_may_follow(words, expected):
    assert completions(words) == expected


def test_a_line_with_an_open_quotation_mark():
    assert line_completions('ivg generate "An open --metho', "=:") == ["--method"]
    assert {"chat", "generate"} <= set(line_completions("ivg "))


def test_completion_imports_no_torch():
    """Who presses Tab waits for it."""
    asked = [["bench", "--shape", ""], ["eval", ""], ["eval", "--stage", ""], ["train", "value", "--mode", ""], ["generate", "--base", ""]]
    code = f"import sys; from ivg.cli.completion import completions; assert all(map(completions, {asked}))"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], check=True)


def test_all_methods_and_verbs_are_completed():
    assert completions(["generate", "-m", ""]) == method_names()
    assert {"chat", "generate", "completion", "data", "config"} <= set(completions([""])) and "pack" not in completions([""])


@pytest.mark.parametrize("shell", SCRIPTS)
def test_scripts_are_valid(ivg, shell, tmp_path):
    code, out, _ = ivg("completion", shell)
    assert (code, out) == (0, SCRIPTS[shell])
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    script = tmp_path / "script"
    script.write_text(out)
    assert subprocess.run([shell, "-n", script], capture_output=True).returncode == 0


CALLS = {
    "bash": ["line", "--", "ivg generate --method cbs-e", "\"'><=;|&(:"],
    "zsh": ["words", "--", "generate", "--method", "cbs-e"],
    "fish": ["words", "--", "generate", "--method", "cbs-e"],
}
"""What each shell's script calls where that line is typed."""


@pytest.mark.parametrize("shell", CALLS)
def test_what_a_shell_calls(ivg, shell):
    assert f"ivg completion {CALLS[shell][0]} -- " in SCRIPTS[shell]
    assert ivg("completion", *CALLS[shell])[:2] == (0, "cbs-explicit\n")


SHELLS = {
    "bash": """COMP_LINE="$LINE"; COMP_POINT=${#COMP_LINE}; COMP_WORDBREAKS='=:'; _ivg; printf '%s\\n' "${COMPREPLY[@]}" """,
    "zsh": """words=("${(@s: :)LINE}"); CURRENT=$#words; _files() { echo files }; compadd() { print -l -- $found }; _ivg""",
    "fish": """complete -C "$LINE" """,
}
"""Print what the shell completes behind ``$LINE``."""


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    "line, expected",
    [
        ("ivg gen", "generate"),
        ("ivg generate --met", "--method"),
        ("ivg generate --method cbs-e", "cbs-explicit"),
        ("ivg generate --method=cbs-e", "--method=cbs-explicit"),
        ("ivg compare --methods base,mc", "base,mcts"),
        ("ivg generate --base embedded:un", "embedded:untuned"),
    ],
)
def test_shells_complete(tmp_path, shell, line, expected):
    """The shell asks a real ``ivg``; bash puts behind ``=`` and ``:`` only what follows them."""
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    (tmp_path / "ivg").write_text(f'#!/bin/sh\nexec {sys.executable} -m ivg "$@"\n')
    (tmp_path / "ivg").chmod(0o755)
    setup = "compdef() { : }\n" if shell == "zsh" else ""
    script = f"{setup}{SCRIPTS[shell]}\n{SHELLS[shell]}"
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "LINE": line, "HOME": str(tmp_path)}
    done = subprocess.run([shell, *(["-f"] if shell == "zsh" else []), "-c", script], capture_output=True, text=True, check=True, env=env)
    if shell == "bash":
        expected = re.split("[=:]", expected)[-1]
    assert done.stdout.split() == [expected]


def test_an_unknown_shell(ivg):
    assert "no completion for 'tcsh' - expected one of: bash, zsh, fish" in ivg("completion", "tcsh")[2]


# ivg data check


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_an_empty_pipe_has_a_name(ivg, monkeypatch):
    for verb in (["data", "check"], ["winrate"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
        code, _, err = ivg(*verb, "-")
        assert code == 2 and re.match("error: standard input (is empty|has no judgements)", err)


def test_half_a_pair_is_no_prompt(ivg, tmp_path):
    """Without the column ``chosen`` such rows were counted as prompts, and nothing was said."""
    path = write(tmp_path / "pairs.jsonl", [{"prompt": "One", "rejected": "bad"}])
    code, out, err = ivg("data", "check", path)
    assert (code, out) == (2, "") and "has the columns prompt, rejected - preferences need prompt, chosen, rejected" in err


def test_preferences(ivg, tmp_path):
    rows = [
        {"prompt": "One", "chosen": "good and long", "rejected": "bad"},
        {"prompt": "One", "chosen": "bad", "rejected": "good and long"},
        {"prompt": "Two", "chosen": "yes", "rejected": "no no no"},
        {"prompt": "Two", "chosen": "yes", "rejected": "no no no"},
        {"prompt": "Three", "chosen": "same", "rejected": "same"},
        {"prompt": "", "chosen": "a", "rejected": "b"},
        {"prompt": "Four", "chosen": "a", "rejected": ""},
    ]
    path = write(tmp_path / "pairs.jsonl", rows)
    with path.open("a") as file:
        file.write("{oops\n")
    code, out, err = ivg("data", "check", path, "--json")
    found = json.loads(out)
    assert code == 1 and err == "" and not found["fine"]
    assert (found["form"], found["items"], found["prompts"], found["chats"]) == ("preferences", 5, 3, 0)
    assert [place for place, _ in found["unusable"]] == [f"{path}, line {n}" for n in (5, 6, 8)]
    assert "same text" in found["unusable"][0][1]
    assert found["counts"] == {
        "the same as an earlier one": 1,
        "contradicted by a pair the other way round": 2,
        "without a response": 1,
    }
    assert found["shares"] == {"pairs whose chosen response is longer": 2 / 5}
    assert found["lengths"]["chosen"] == {"min": 1, "median": 3, "p95": 13, "max": 13, "empty": 0}
    assert found["lengths"]["rejected"]["empty"] == 1
    _, out, _ = ivg("data", "check", path)
    assert "5 preferences to 3 different prompts" in out and "pairs whose chosen response is longer: 40%" in out
    assert "rows that cannot be used: 3" in out and f"{path}, line 5: chosen and rejected are the same text" in out
    path.write_text('{"prompt": "E", "chosen": "x", "rejected": "y"}\n{"prompt": "E", "chosen": "x"}\n')
    assert "line 2: no rejected - got prompt, chosen\n" in ivg("data", "check", path)[1]


def test_rated_responses(tmp_path):
    rows = [("One", "a", 1.0), ("One", "b", 1.0), ("One", "c", 2.0), ("Two", "a", 0.0), ("Two", "b", 0.0), ("Three", "x", 1.0)]
    rows += [("One", "a", 1.0), ("Three", "x", 2.0)]
    report = check_data(write(tmp_path / "rated.jsonl", [{"prompt": p, "response": r, "score": s} for p, r, s in rows]))
    assert report.form == "rated responses" and report.fine
    assert report.counts == {
        "the same as an earlier one": 1,
        "alone with its prompt, so without a pair": 0,
        "of a prompt whose responses all have one score": 2,
        "the same response to one prompt with another score": 1,
        "without a response": 0,
    }
    assert report.shares == {"ties among pairs of responses to one prompt": (3 + 1 + 0) / (6 + 1 + 1)}


@pytest.mark.parametrize(
    "row, form",
    [
        ({"prompt": "x"}, "prompts"),
        ({"messages": [{"role": "user", "content": "x"}]}, "prompts"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, "SFT examples"),
        ({"prompt": "x", "completion": "y"}, "SFT examples"),
        ({"prompt": "x", "chosen": "y"}, "SFT examples"),
        ({"text": "y"}, "SFT examples"),
        ({"prompt": "x", "responses": ["a", "b"], "scores": [1, 2], "chosen": 1}, "rated responses"),
        ({"chosen": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
          "rejected": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "z"}]}, "preferences"),
    ],
)  # fmt: skip
def test_forms(row, form, tmp_path):
    report = check_data(write(tmp_path / "rows.jsonl", [row]))
    assert report.form == form and report.fine and report.chats == int("messages" in row or form == "preferences")


def test_rows_that_are_too_long_in_the_tokens_that_will_be_read(ivg, tmp_path):
    tokenizer = byte_tokenizer(chat=True)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = [{"messages": [{"role": "user", "content": "x" * n}, {"role": "assistant", "content": "y" * 5}]} for n in (1, 10, 20)]
    path = write(tmp_path / "rows.jsonl", rows)
    frame = len(tokenizer.apply_chat_template([{"role": "user", "content": ""}], add_generation_prompt=True).input_ids)
    code, out, _ = ivg("data", "check", path, "--tokenizer", tmp_path / "tokenizer", "--max-length", frame + 10 + 5 + 1, "--json")
    found = json.loads(out)
    assert (code, found["unit"], found["counts"]["too long"]) == (1, "tokens", 1)
    assert found["lengths"]["prompt"]["max"] == frame + 20 and found["lengths"]["response"]["min"] == 5
    assert ivg("data", "check", path, "--tokenizer", tmp_path / "tokenizer", "--max-length", 1000)[0] == 0
    for longest in (frame + 10 + 5, frame + 10 + 5 + 1):  # an end-of-sequence token follows, in training, too
        report, kept = (check_data(path, None, tokenizer, longest), encode_sft(read_sft_examples(path), tokenizer, None, longest))
        assert report.counts["too long"] == 3 - len(kept)
    assert "--max-length counts tokens" in ivg("data", "check", path, "--max-length", 5)[2]


def test_other_columns_and_standard_input(ivg, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"question": "x", "answer": "y"}\n'))
    code, out, _ = ivg("data", "check", "-", "--columns", "prompt=question,response=answer")
    assert code == 0 and "1 SFT examples to 1 different prompts" in out and "rows that cannot be used: none" in out
    assert "no such file" in ivg("data", "check", tmp_path / "nothing.jsonl")[2].lower()
    code, _, err = ivg("data", "check", write(tmp_path / "rows.jsonl", [{"a": 1}]))
    assert code == 2 and "has the columns a" in err


def test_lengths_by_hand():
    assert Lengths.of([3]) == Lengths(3, 3, 3, 3, 0)
    assert Lengths.of([*range(100)]) == Lengths(0, 49.5, 94, 99, 1)


def test_no_torch_is_imported(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "x", "chosen": "a", "rejected": "b"}])
    for arguments in (["completion", "words", "--", "generate", "--"], ["data", "check", str(path)]):
        code = f"import sys; sys.argv = ['ivg', *{arguments!r}]\nfrom ivg.cli import main\n"
        code += "try: main()\nfinally: assert 'torch' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
