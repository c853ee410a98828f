"""The command line on tiny models in hub layout: what is printed, what is written, what happens to bad input."""

import json
import subprocess
import sys

import pytest
import torch

from ivg import GuidedModel
from ivg.errors import OutputError
from ivg.models.loading import LoadOptions
from ivg.search.searcher import Searcher
from ivg.testing import byte_tokenizer, tiny_model, tiny_value

LENGTH = ["--max-new-tokens", "6", "--ignore-eos", "--dtype", "float32", "--device", "cpu"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Directories of tiny models: base, tuned, untuned, value, reward, other (another tokenizer), permuted, nan."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    folder = tmp_path_factory.mktemp("hub")
    other, permuted = byte_tokenizer([("t", "h"), ("a", "n")]), byte_tokenizer(permute=True)
    plan = {"base": None, "tuned": None, "untuned": None, "other": other, "permuted": permuted, "nan": None}
    for seed, (name, tokenizer) in enumerate(plan.items()):
        tokenizer = tokenizer or byte_tokenizer()
        network = tiny_model("llama", seed, vocab_size=len(tokenizer), context=128)
        if name == "nan":
            torch.nn.init.constant_(network.lm_head.weight, float("nan"))
        network.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    tiny_value("vocabulary", seed=7).save_pretrained(folder / "value")
    tiny_value("scalar", seed=8, tokenizer=other).save_pretrained(folder / "other-value")
    config = DistilBertConfig(vocab_size=257, dim=16, hidden_dim=32, n_layers=1, n_heads=2, num_labels=1, max_position_embeddings=128)
    DistilBertForSequenceClassification(config).save_pretrained(folder / "reward")
    byte_tokenizer().save_pretrained(folder / "reward")
    return folder


@pytest.fixture
def models(hub):
    return [x for name in ("base", "tuned", "untuned", "value") for x in (f"--{name}", str(hub / name))] + LENGTH


def write_rows(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_prompt(ivg, models):
    code, out, err = ivg("generate", "The movie was", *models, "--seed", 3)
    assert code == 0
    assert out.startswith("The movie was")
    assert len(out) > len("The movie was") + 1
    assert "ivg · score" in err
    assert "base" in err
    assert ivg("generate", "The movie was", *models, "--seed", 3)[1] == out
    assert ivg("generate", "The movie was", *models, "--seed", 4)[1] != out


def test_an_instruction_chooses_the_method(ivg, hub):
    base = ["--base", str(hub / "base"), *LENGTH]
    code, out, err = ivg("generate", "The movie was", *base, "--contrast", "Be kind.", "--beta", 2, "--seed", 3)
    assert code == 0
    assert "contrast · " in err
    model = GuidedModel.from_pretrained(hub / "base", options=LoadOptions(device="cpu", dtype="float32"))
    settings = {"contrast": "Be kind.", "beta": 2.0, "seed": 3, "max_new_tokens": 6, "ignore_eos": True}
    assert model.generate("The movie was", "contrast", **settings).text.strip() in out
    code, out, err = ivg("generate", "The movie was", *base, "--method", "base", "--contrast", "Be kind.")
    assert code == 0
    assert "note: contrast=Be kind. ignored: the method base does not use the value contrast (method=contrast does)" in err


def test_file_to_file(ivg, models, tmp_path):
    source = write_rows(tmp_path / "in.jsonl", [{"id": "a", "prompt": "One"}, {"id": 7, "prompt": "Two"}, {"prompt": "Three"}])
    code, _, _ = ivg("generate", "--input", source, "--output", tmp_path / "out.jsonl", *models, "--n", 2, "--batch-size", 2, "-W", 2)
    rows = rows_of(tmp_path / "out.jsonl")
    assert code == 0
    own = next(r["id"] for r in rows if r["prompt"] == "Three")
    assert sorted((str(r["id"]), r["index"]) for r in rows) == sorted((str(i), k) for i in ("a", 7, own) for k in range(2))
    for r in rows:
        assert {"id", "prompt", "text", "score", "usage", "method", "seed", "finish_reason", "token_ids"} <= set(r)
        assert r["usage"]["forward_tokens"]["base"] > 0
        assert r["settings"]["width"] == 2
    assert len({r["text"] for r in rows}) == 6


def test_standard_input(ivg, models, monkeypatch, tmp_path):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO('{"id": 1, "prompt": "One"}\n'))
    assert ivg("generate", "--input", "-", "--output", tmp_path / "out.jsonl", *models)[0] == 0
    assert rows_of(tmp_path / "out.jsonl")[0]["id"] == 1


def test_resumes_by_id_and_removes_an_incomplete_line(ivg, models, tmp_path):
    source = write_rows(tmp_path / "in.jsonl", [{"id": i, "prompt": f"Prompt {i}"} for i in range(4)])
    arguments = ["generate", "--input", source, "--output", tmp_path / "out.jsonl", *models]
    ivg(*arguments)
    whole = {r["id"]: r["text"] for r in rows_of(tmp_path / "out.jsonl")}
    lines = (tmp_path / "out.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out.jsonl").write_text(lines[0] + lines[1] + lines[2][:20])
    code, _, _ = ivg(*arguments)
    assert code == 0
    again = rows_of(tmp_path / "out.jsonl")
    assert [r["id"] for r in again[:2]] == [json.loads(line)["id"] for line in lines[:2]]
    assert {r["id"]: r["text"] for r in again} == whole
    assert len(again) == 4


def test_answers_of_other_settings_are_not_mixed(ivg, models, tmp_path):
    source = write_rows(tmp_path / "in.jsonl", [{"id": 1, "prompt": "One"}])
    ivg("generate", "--input", source, "--output", tmp_path / "out.jsonl", *models)
    code, _, err = ivg("generate", "--input", source, "--output", tmp_path / "out.jsonl", *models, "--method", "base")
    assert code == 2
    assert "use another --output" in err
    (tmp_path / "out.jsonl").write_text('{"x": 1}\n')
    code, _, err = ivg("generate", "--input", source, "--output", tmp_path / "out.jsonl", *models)
    assert code == 2
    assert "did not write" in err


def test_unreadable_rows_are_reported_and_the_others_done(ivg, models, tmp_path):
    (tmp_path / "in.jsonl").write_text(
        '{"id": 1, "prompt": "One"}\nnot json\n{"id": 3}\n{"id": 4, "prompt": ""}\n{"id": 5, "prompt": "Five"}\n'
    )
    code, _, err = ivg("generate", "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", *models)
    assert code == 1
    assert [r["id"] for r in rows_of(tmp_path / "out.jsonl")] == [1, 5]
    assert "line 2: expected" in err
    assert "line 3: expected" in err
    assert "line 4: empty prompt" in err
    assert err.count("error:") == 3
    assert err.endswith("answered 2, skipped 0, failed 3, already done 0\n")


def test_messages(ivg, models, hub, tmp_path):
    row = {"id": 1, "messages": [{"role": "user", "content": "Hi"}]}
    source = write_rows(tmp_path / "in.jsonl", [row])
    code, _, err = ivg("generate", "--input", source, "--output", tmp_path / "out.jsonl", *models)
    assert code == 2
    assert "no chat template" in err
    templates = [x for role in ("base", "tuned", "untuned", "value") for x in ("--template", role + "=Q: {prompt} A:")]
    code, _, err = ivg("generate", "--input", source, "--output", tmp_path / "out.jsonl", *models, *templates)
    assert (code, err) == (0, "answered 1, skipped 0, failed 0, already done 0\n")
    assert rows_of(tmp_path / "out.jsonl")[0]["prompt"] == row["messages"]


def test_interrupt_keeps_what_is_done(ivg, models, monkeypatch, tmp_path):
    source = write_rows(tmp_path / "in.jsonl", [{"id": i, "prompt": f"Prompt {i}"} for i in range(6)])
    real, done = Searcher.step, []

    def step(self):
        if len(done) >= 2:
            raise KeyboardInterrupt
        steps = real(self)
        done.extend(s for s in steps if s.completion)
        return steps

    monkeypatch.setattr(Searcher, "step", step)
    arguments = ["generate", "--input", source, "--output", tmp_path / "out.jsonl", *models, "--batch-size", 1]
    code, _, err = ivg(*arguments)
    assert code == 130
    assert "stopped" in err
    assert len(rows_of(tmp_path / "out.jsonl")) == 2
    monkeypatch.setattr(Searcher, "step", real)
    assert ivg(*arguments)[0] == 0
    assert sorted(r["id"] for r in rows_of(tmp_path / "out.jsonl")) == list(range(6))


def test_trace_is_one_page_without_network(ivg, models, tmp_path):
    code, _, _ = ivg("generate", "A </script> prompt", *models, "--trace", tmp_path / "deep" / "trace.html", "-L", 2)
    page = (tmp_path / "deep" / "trace.html").read_text()
    assert code == 0
    assert "http" not in page
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    (answer,) = data["answers"]
    assert answer["prompt"] == "A </script> prompt"
    assert [len(nodes) for nodes in answer["rounds"]] == [16, 16, 16]
    assert all(sum(n["kept"] for n in nodes) == 4 for nodes in answer["rounds"])
    first = {n["id"] for n in answer["rounds"][0] if n["kept"]}
    assert all(n["parent"] in first and len(n["tokens"]) == 2 for n in answer["rounds"][1])
    assert any(shift for n in answer["rounds"][0] for _, shift in n["tokens"])
    best = max((n for n in answer["rounds"][-1]), key=lambda n: n["score"])
    assert best["kept"]


def test_recipe_file_and_options_over_it(ivg, hub, tmp_path):
    (tmp_path / "recipe.toml").write_text(
        f"""
        [models]
        base = "{hub}/base"
        expert = "{hub}/tuned"
        antiexpert = {{ path = "{hub}/untuned", template = "{{prompt}}" }}
        [search]
        method = "eft"
        alpha = 2.0
        [sampling]
        max_new_tokens = 5
        ignore_eos = true
        [run]
        dtype = "float32"
        """
    )
    source = write_rows(tmp_path / "in.jsonl", [{"id": 1, "prompt": "One"}])
    assert ivg("generate", "--input", source, "--output", tmp_path / "a.jsonl", "--recipe", tmp_path / "recipe.toml")[0] == 0
    (row,) = rows_of(tmp_path / "a.jsonl")
    assert (row["method"], row["settings"]["beta"], len(row["token_ids"])) == ("eft", 2.0, 5)
    ivg("generate", "--input", source, "--output", tmp_path / "b.jsonl", "--recipe", tmp_path / "recipe.toml", "--beta", 0.5)
    assert rows_of(tmp_path / "b.jsonl")[0]["settings"]["beta"] == 0.5
    (tmp_path / "recipe.toml").write_text("[search]\nwidht = 3\n")
    code, _, err = ivg("generate", "x", "--recipe", tmp_path / "recipe.toml")
    assert code == 2
    assert "unknown setting search.widht" in err


def test_reward_only(ivg, hub):
    code, _, err = ivg("generate", "One", "--base", hub / "base", "--reward", hub / "reward", "--method", "bon", "-K", 3, *LENGTH)
    assert code == 0
    assert "reward" in err


def test_guide_with_another_tokenizer(ivg, hub):
    shared = ["generate", "One", "--base", hub / "base", "--value", hub / "other-value", *LENGTH]
    code, _, err = ivg(*shared, "--method", "args", "--guide-candidates", 4)
    assert (code, "args ·" in err) == (0, True)
    assert ivg(*shared, "--method", "cbs-explicit", "-W", 2, "-K", 2, "-L", 3)[0] == 0


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["generate"], "give prompts, or --input"),
        (["generate", "x", "--base", "/no/such/model"], "cannot load"),
        (["generate", "x", "--tuned", "HUB/tuned"], "got no untuned model"),
        (["generate", "x", "--base", "HUB/base", "--tuned", "HUB/tuned"], "no untuned model"),
        (["generate", "x", "--base", "HUB/base", "--method", "ivg"], "needs the value explicit and implicit"),
        (["generate", "x", "--base", "HUB/permuted", "--tuned", "HUB/tuned", "--untuned", "HUB/untuned", "--method", "eft"], "id 1: "),
        (["generate", "x", "--base", "HUB/nan", "--method", "base"], "the base model gave NaN or infinity after 0 tokens"),
        (["generate", "", "--base", "HUB/base", "--method", "base"], "empty prompt"),
        (["generate", "long " * 40, "--base", "HUB/base", "--method", "base"], "context of base (128)"),
        (["generate", "x", "-W", "0"], "width (W) must be at least 1, got 0"),
        (["generate", "x", "-K", "0"], "successors (K) must be at least 1, got 0"),
        (["generate", "x", "-L", "-2"], "chunk_length (L) must be at least 1, got -2"),
        (["generate", "x", "--method", "ivgg"], "unknown method 'ivgg'"),
        (["generate", "x", "--n", "0"], "run.n must be at least 1, got 0"),
        (["generate", "x", "--dtype", "int4"], "run.dtype"),
        (["generate", "x", "--base", "HUB/base", "--device", "nowhere"], "device 'nowhere' is not usable"),
        (["generate", "x", "--template", "base"], "expected ROLE=TEMPLATE"),
        (["generate", "--input", "/no/such/file.jsonl"], "no such file"),
        (["generate", "x", "--recipe", "/no/such.toml"], "cannot read recipe"),
        (["generate", "x", "--temperature", "-1", "--base", "HUB/base", "--method", "base"], "temperature must be"),
        (["generate", "x", "--frobnicate"], "No such option"),
        (["compare", "x", "--methods", "base,nope"], "unknown method 'nope'"),
    ],
    ids=lambda a: " ".join(a)[:40] if isinstance(a, list) else None,
)
def test_bad_input_is_one_clear_line(ivg, hub, arguments, words):
    code, out, err = ivg(*(a.replace("HUB", str(hub)) for a in arguments))
    assert code == 2
    assert words in err
    assert out == ""
    assert "Traceback" not in err
    if "option" not in words:
        assert err.count("\n") == 1
        assert err.startswith("error: ")


def test_compare(ivg, models):
    code, out, _ = ivg("compare", "The movie was", *models)
    assert code == 0
    for method in ("base", "bon", "eft", "token-explicit", "cbs-implicit", "cbs-explicit", "ivg"):
        assert f"│ {method} " in out
    assert "value: score by explicit" in out
    assert "gold" not in out


def test_compare_fits_a_narrow_terminal(ivg, models):
    _, out, _ = ivg("compare", "The movie was", *models, "--methods", "base,cbs-implicit", columns=80)
    head = out.splitlines()[1]
    assert max(map(len, out.splitlines())) <= 80
    assert "The movie was …" in head
    assert "tokens ┃" in head
    assert "│ cbs-implicit │" in out


def test_compare_offers_only_what_the_models_allow(ivg, hub):
    code, out, _ = ivg("compare", "x", "--base", hub / "base", "--reward", hub / "reward", *LENGTH)
    assert code == 0
    assert "base" in out
    assert "ivg" not in out


def test_compare_lists_failures_below_the_table(ivg, hub, tmp_path):
    """One bad score costs no other cell."""
    (tmp_path / "rules.py").write_text("def score(prompt, response):\n    raise KeyError('a long story ' * 20)\n")
    given = ("compare", "Words", "--base", hub / "base", "--reward", f"{tmp_path}/rules.py:score", "--methods", "base,bon", *LENGTH)
    code, out, err = ivg(*given, columns=80)
    assert code == 1
    assert "│ base   │" in out and out.count("(failed)") == 2 and "KeyError" not in out
    assert [line.partition(" '")[0] for line in err.splitlines()] == [
        f"error: {m}: the value reward raised KeyError:" for m in ("base", "bon")
    ]


def test_closed_streams_write_nothing_into_open_files(tmp_path):
    """Whoever closes a stream gives its number away: a library's warnings would go into the next file that is opened."""
    (tmp_path / "rules.py").write_text("""
import os

def score(prompt, response):
    for stream in (1, 2):
        assert os.path.samestat(os.fstat(stream), os.stat(os.devnull))
        os.write(stream, b"noise")
    return len(response)
""")
    command = [sys.executable, "-m", "ivg", "generate", "I", "--output", "out.jsonl", "--method", "bon", "--reward", "rules.py:score"]
    subprocess.run(["sh", "-c", '"$0" "$@" >&- 2>&-', *command, *LENGTH], cwd=tmp_path, check=True)
    (row,) = map(json.loads, (tmp_path / "out.jsonl").read_bytes().splitlines())
    assert row["text"]


def test_a_closed_standard_output_is_an_error(monkeypatch):
    from ivg.jobs.store import open_rows

    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(OutputError, match="cannot write standard output: it is closed"), open_rows("-", [], {}, pytest.fail):
        pass


def test_no_bar_where_standard_error_is_closed(monkeypatch, capsys):
    from ivg.cli.progress import progress

    monkeypatch.setattr(sys, "stderr", None)
    with progress(3, "answers") as advance:
        advance()
    assert capsys.readouterr() == ("", "")


def test_check_reports_compatibility(ivg, models):
    code, out, _ = ivg("check", *models[:8], *LENGTH[3:])
    assert code == 0
    assert out.count("same as base") == 3
    assert "KL(tuned‖untuned)" in out
    assert "ivg" in out.splitlines()[-1]


def test_check_names_what_does_not_fit(ivg, hub):
    code, out, _ = ivg("check", "--base", hub / "permuted", "--tuned", hub / "tuned", "--untuned", hub / "untuned", *LENGTH[3:])
    assert code == 1
    assert "ids differ" in out
    assert "id 1: " in out


def test_models_and_version(ivg):
    import ivg as package

    code, out, _ = ivg("models")
    assert code == 0
    for name in ("base", "tuned", "untuned", "value", "gold", "cbs-implicit", "genarm"):
        assert name in out
    assert ivg("--version")[1].strip() == package.__version__


def test_models_shows_what_methods_set(ivg):
    """Each method with its settings that differ from the defaults; the first words of the lines survive a narrow terminal."""
    found = {row["name"]: row["settings"] for row in json.loads(ivg("models", "--json")[1])["methods"]}
    assert found["vas"] == {"beta": 3.0, "candidates": 20, "transform": "centered"}
    assert found["adaptive"] == {"decay": 0.8}
    assert found["ivg"] == found["base"] == {}
    out = ivg("models")[1]
    for text in ("beta 3", "decay 0.8", "gate 3", "rule reject", "normalise true"):
        assert text in out


def test_help_of_every_verb(ivg):
    for verb in ([], ["generate"], ["compare"], ["check"], ["models"]):
        code, out, _ = ivg(*verb, "--help")
        assert code == 0
        assert "Usage" in out


def test_resuming_with_another_engine_is_refused(tmp_path):
    from ivg.errors import ConfigError
    from ivg.jobs.prompts import Job
    from ivg.jobs.provenance import answer_provenance
    from ivg.jobs.store import open_rows
    from ivg.settings.recipe import Recipe

    recipes = [Recipe(), *(Recipe.parse({"run": {"engine": e}, "endpoint": {"model": m}}) for e, m in
               (("vllm", None), ("http://a/v1", "one"), ("http://a/v1", "two")))]  # fmt: skip
    made, job = [answer_provenance(recipe, "cpu") for recipe in recipes], Job(1, "p")
    for i, one in enumerate(made):
        file = tmp_path / f"{i}.jsonl"
        file.write_text(json.dumps({"id": 1, "prompt": "p", "index": 0, **one}) + "\n")
        for j, other in enumerate(made):
            if i == j:
                with open_rows(file, [job], other, print) as rows:
                    assert rows.done(job, 0)
            else:
                with pytest.raises(ConfigError, match="settings differ from those of its rows: e"), open_rows(file, [job], other, print):
                    pass
