"""``ivg bench``: systems run in turn, rounds resume, figures follow their definitions, the command prints them."""

import json
from dataclasses import replace

import pytest

from bench_rows import row
from ivg.bench import report, runner
from ivg.bench.named_shapes import SHAPES
from ivg.bench.settings import BenchSettings
from ivg.bench.shapes import build_model, make_prompts, model_config, networks, tokenizer_of_size
from ivg.bench.systems import VLLMSampling
from ivg.errors import ConfigError, MissingDependencyError
from ivg.models.chat_template import encode
from ivg.testing import byte_tokenizer

TINY = BenchSettings(shape="tiny", prompts=2, prompt_tokens=8, new_tokens=7, rounds=2, dtype="float32", device="cpu")


# Shapes


@pytest.mark.parametrize("size", [257, 400, 16384, 50257])
def test_tokenizers_have_their_size(size):
    tokenizer = tokenizer_of_size(size)
    assert len(tokenizer) == size
    assert tokenizer.decode(tokenizer("Good day, world").input_ids) == "Good day, world"


def test_a_tokenizer_without_bytes_is_refused():
    with pytest.raises(ConfigError, match="at least 257"):
        tokenizer_of_size(100)


@pytest.mark.parametrize("tokens", [8, 31])
@pytest.mark.parametrize("tokenizer", [tokenizer_of_size(16384), byte_tokenizer(bos=True)])
def test_prompts_have_their_length(tokenizer, tokens):
    """In the base's tokens, and in those of guides, which read the text."""
    found = make_prompts(tokenizer, 5, tokens)
    assert len({p.content for p in found}) == 5
    for p in found:
        assert len(p.token_ids) == tokens
        assert encode(replace(p, token_ids=None), tokenizer, None) == list(p.token_ids)


def test_published_sizes():
    """Parameters as published, without making the weights."""
    import torch
    from transformers import AutoModelForCausalLM

    published = {
        "gpt2-small": 124.4,
        "gpt2-large": 774.0,
        "llama-7b": 6738.4,
        "llama-1b": 1100.0,
        "gpt2-small-16k": 98.4,
        "guide-17m": 17.33,
    }
    for name, millions in published.items():
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(model_config(SHAPES[name], SHAPES[name].vocabulary))
        assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, rel=0.001), name


@pytest.mark.parametrize("shape", ["tiny", "tiny-llama"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_models_are_built_in_their_dtype(shape, dtype):
    model = build_model(shape, dtype=dtype, device="cpu")
    assert {str(p.dtype) for n in networks(model).values() for p in n.parameters()} == {f"torch.{dtype}"}
    assert model.base.vocabulary.same_as(model.values["implicit"].vocabulary)
    same = build_model(shape, dtype=dtype, device="cpu")
    for a, b in zip(networks(model).values(), networks(same).values(), strict=True):
        assert all(x.equal(y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_unknown_shapes_are_refused():
    with pytest.raises(ConfigError, match="gpt2-small-16k"):
        build_model("gpt5")
    with pytest.raises(ConfigError, match="guides of their own"):
        build_model("embedded", "tiny")


# Rounds


def test_systems_run_in_turn_and_count_what_they_read():
    rows = runner.run(TINY)
    assert [(r["round"], r["label"]) for r in rows] == [(n, s) for n in (0, 1) for s in ("transformers", "ivg")]
    plain, method = rows[:2]
    assert plain["forward_tokens"] == {"base": 2 * 16 * (8 + 6)}
    assert set(method["forward_tokens"]) == {"base", "tuned", "untuned", "explicit"}
    assert method["forward_tokens"]["base"] < plain["forward_tokens"]["base"]
    assert all(r["answers"] == 2 and r["tokens"] == 14 and 0 < r["first_text_seconds"] <= r["seconds"] for r in rows)
    sizes = method["sizes"]
    assert method["flops"] == 2 * sum(sizes[m] * n for m, n in method["forward_tokens"].items())
    assert method["caches"] > 0


def test_products_are_counted_where_a_network_multiplies():
    """Of a linear layer, of GPT-2's transposed one, and of a packed one; none after the context."""
    import torch
    from transformers.pytorch_utils import Conv1D

    from ivg.bench.roofline import Product, count_products, seconds

    network = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), Conv1D(7, 5))
    with count_products([network, network]) as found:
        network(torch.ones(2, 4, 3))
        network(torch.ones(1, 3))
    network(torch.ones(1, 3))
    assert found == {Product(8, 3, 5): 1, Product(8, 5, 7): 1, Product(1, 3, 5): 1, Product(1, 5, 7): 1}
    assert sum(p.flops * n for p, n in found.items()) == 2 * 9 * (3 * 5 + 5 * 7)
    inner, outer = torch.nn.Linear(3, 5), torch.nn.Linear(3, 5)
    outer.forward = lambda x: torch.cat([x[:1] @ outer.weight.T, inner(x[1:])])  # as one that does the rows of two networks
    with count_products([inner, outer]) as shared:
        outer(torch.ones(4, 3))
        inner(torch.ones(2, 3))
    assert shared == {Product(4, 3, 5): 1, Product(2, 3, 5): 1}
    cpu = torch.device("cpu")
    assert seconds({}, torch.float32, cpu) == 0 < seconds(found, torch.bfloat16, cpu)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_roofline_counts_what_the_models_read(dtype, monkeypatch):
    """generate reads the prompts of all rows, then one token of each; logits are of the last token. The packed layers count too."""
    from ivg.bench import roofline

    counted = []
    monkeypatch.setattr(roofline, "seconds", lambda products, *_: counted.append(products) or 1.0)
    rows = runner.run(replace(TINY, shape="tiny-llama", dtype=dtype, rounds=1))
    assert [r["roofline"] for r in rows] == [1.0, 1.0]
    plain, method = counted
    heads = {p.rows: n for p, n in plain.items() if p.outputs == 400}
    assert heads == {32: 7}  # W·K = 16 samples of 2 prompts, 7 tokens
    read = sum(p.rows * n for p, n in plain.items() if (p.inputs, p.outputs) == (64, 32))  # one product in each of two layers
    assert read == 2 * rows[0]["forward_tokens"]["base"]
    read = sum(p.rows * n for p, n in method.items() if (p.inputs, p.outputs) == (64, 32))
    assert read == 2 * sum(rows[1]["forward_tokens"].values())


@pytest.mark.parametrize("method", ["bon", "cbs-explicit", "cards"])
def test_any_method(method):
    rows = runner.run(replace(TINY, method=method, baselines=(), rounds=1))
    assert [r["tokens"] for r in rows] == [14]


@pytest.mark.long
def test_interrupted_rounds_resume(tmp_path, monkeypatch):
    file, real = tmp_path / "rows.jsonl", runner.Session.measure
    made = []

    def measure(self, case, number, **more):
        made.append((case.label, number))
        if len(made) == 6:  # two to warm up, then into the second round
            raise KeyboardInterrupt
        return real(self, case, number, **more)

    monkeypatch.setattr(runner.Session, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        runner.run(TINY, file)
    before = file.read_text()
    assert len(before.splitlines()) == 3
    rows = runner.run(TINY, file)
    assert file.read_text().startswith(before)
    assert [(r["label"], r["round"]) for r in rows][3:] == made[-1:] == [("ivg", 1)]
    made.clear()
    assert runner.run(TINY, file) == rows
    assert runner.run(replace(TINY, rounds=1), file) == rows[:2]
    assert not made
    with pytest.raises(ConfigError, match="new_tokens"):
        runner.run(replace(TINY, new_tokens=8), file)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"baselines": ("transformers", "theirs")}, "expected some of transformers, vllm"),
        ({"baselines": ("transformers", "transformers")}, "each once"),
    ],
)
def test_unusable_settings(wrong, message):
    with pytest.raises(ConfigError, match=message):
        BenchSettings(**wrong)


def test_vllm_needs_its_extra():
    with pytest.raises(MissingDependencyError, match="vllm"):
        VLLMSampling(TINY, build_model("tiny", device="cpu"))


# Figures


def test_ratios_are_medians_of_rounds():
    """The second round ran at half speed for all: no ratio changes."""
    times = {"transformers": (4.0, 8.0, 4.0), "ivg": (6.0, 12.0, 6.0)}
    extra = {"transformers": {}, "ivg": {"forward_tokens": {"base": 5, "tuned": 5}}}
    rows = [row(c, n, times[c][n], **extra[c]) for n in range(3) for c in times]
    found = report.summary(TINY, rows, {"command": "ivg bench", "machine": {"cores": 2}, "commit": "c"})
    assert found["ratios"] == pytest.approx({"flop_ratio": 1.25, "time_over_transformers": 1.5, "time_over_transformers_per_flop": 1.2})
    method = found["systems"]["ivg"]
    assert (method["seconds"], method["answers_per_second"], method["tokens_per_second"]) == pytest.approx((6.0, 1 / 3, 20 / 6))
    assert (method["peak_bytes"], method["peak_above_bytes"]) == (300, 200)
    assert (method["roofline_seconds"], method["over_roofline"]) == (3.0, 2.0)
    assert not report.contention_warning(found)
    assert "idle machine" in report.contention_warning(report.conditions([row("ivg", 0, 1.0, others=0.3)]))[0]


# The command


def test_command_prints_a_table_and_json(ivg, tmp_path):
    sizes = "--shape tiny --prompts 3 --prompt-tokens 8 --new-tokens 6 -W 2 -K 2 -L 3 --rounds 2"
    arguments = ["bench", *sizes.split(), "--out", tmp_path / "r.jsonl"]
    code, out, err = ivg(*arguments)
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    assert set(found["systems"]) == {"transformers", "ivg"}
    assert all(len(c["seconds_of_rounds"]) == 2 for c in found["systems"].values())
    assert "time_over_transformers_per_flop" in found["ratios"]
    assert "processor" in found["made"]["machine"]
    assert "answers/s" in out
    assert "round 2/2  ivg" in err
    code, out, err = ivg(*arguments)
    assert (code, json.loads(out.splitlines()[-1])["systems"]) == (0, found["systems"])
    assert "round" not in err


def test_the_old_option_names_the_new_one(ivg):
    sizes = "--shape tiny --prompts 1 --prompt-tokens 8 --new-tokens 4 -W 1 -K 2 -L 2 --rounds 1"
    code, out, err = ivg("bench", *sizes.split(), "--contestants", "floor,ours")
    assert code == 0 and "use --baselines" in err
    assert set(json.loads(out.splitlines()[-1])["systems"]) == {"transformers", "ivg"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--contestants", "naive,ours"], "benchmarks.compare_naive"),
        (["--shape", "nothing", "--rounds", "1"], "unknown shape"),
        (["--method", "nothing"], "unknown method"),
    ],
)
def test_command_refuses(ivg, arguments, words):
    code, _, err = ivg("bench", *arguments)
    assert code == 2 and words in err
