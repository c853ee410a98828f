"""Scripts of ``benchmarks/``: the naive baseline is IVG, the targets are computed as defined, pages keep one table for each benchmark."""

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import naive
from bench_rows import row
from benchmarks import docs_page, slot_utilization, targets
from benchmarks import naive as baseline
from benchmarks.compare_naive import ALL_SYSTEMS, NaiveSearch, cases
from benchmarks.compare_naive import main as compare
from ivg.bench import runner
from ivg.bench.settings import BenchSettings
from ivg.bench.shapes import networks
from ivg.errors import ConfigError
from ivg.model import GuidedModel
from ivg.testing import tiny_lm, tiny_value
from ivg.utils.rng import child_rng_path, mix, uniform
from ivg.values.implicit import ImplicitValue

TINY = BenchSettings(shape="tiny", prompts=2, prompt_tokens=8, new_tokens=7, rounds=2, dtype="float32", device="cpu")

# benchmarks/naive.py


@pytest.fixture(scope="module")
def guided_model():
    """Distributions far from flat, so that answers differ and end."""
    implicit = ImplicitValue(tiny_lm("tuned", seed=1), tiny_lm("untuned", seed=2))
    return GuidedModel(tiny_lm("base"), {"implicit": implicit, "explicit": tiny_value(seed=3)})


def path_draws(seed, chunk, count):
    """The random numbers of ivg for the beam that was child number path[i] of its parent at chunk i."""

    def draw(path, position):
        rng_path = 0
        for i, k in enumerate(path):
            rng_path = child_rng_path(rng_path, i * chunk, k)
        return uniform(mix(seed, 0), rng_path, position)

    return draw


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize(("width", "successors", "chunk"), [(2, 3, 2), (1, 4, 3), (3, 1, 4)])
def test_naive_is_ivg(guided_model, guided, width, successors, chunk):
    """Token for token the search of tests/naive.py and of the engine, ends included, with the same draws."""
    nets = networks(guided_model)
    models = baseline.Models(nets["base"], *((nets["tuned"], nets["untuned"]) if guided else (None, None)), nets["value"])
    plain = {"implicit": naive.Implicit(nets["tuned"], nets["untuned"]), "explicit": naive.QHead(nets["value"])}
    sizes = {"width": width, "successors": successors, "chunk_length": chunk, "token": "implicit" if guided else "none", "original": True}
    search = guided_model.get_method("ivg", **sizes)
    for seed in range(4):
        ids = list(guided_model.base.tokenizer("I am").input_ids)
        draw = path_draws(seed, chunk, width * successors)
        found = baseline.answer(models, ids, width=width, successors=successors, chunk=chunk, new_tokens=9, eos=0, draw=draw)
        tokens, score = naive.search(nets["base"], plain, search, ids, seed, 0.7, 9)
        found_by_ivg = guided_model.generate("I am", search, seed=seed, max_new_tokens=9, temperature=0.7)
        assert found.token_ids == tokens == list(found_by_ivg.token_ids)
        assert found.score == pytest.approx(score, abs=1e-3)


def test_naive_ends_beams(guided_model):
    """A base with likely ends: finished beams are padded, compete with their copies, and one of them is the answer."""
    nets = networks(guided_model)

    class Ending:
        def __init__(self, network):
            self.network, self.parameters = network, network.parameters

        def __call__(self, **given):
            out = self.network(**given)
            out.logits[..., 0] += 4
            return out

    base = Ending(nets["base"])
    models = baseline.Models(base, nets["tuned"], nets["untuned"], nets["value"])
    plain = {"implicit": naive.Implicit(nets["tuned"], nets["untuned"]), "explicit": naive.QHead(nets["value"])}
    search = guided_model.get_method("ivg", width=2, successors=2, chunk_length=3, original=True)
    ids, lengths = list(guided_model.base.tokenizer("I am").input_ids), set()
    for seed in range(8):
        found = baseline.answer(models, ids, width=2, successors=2, chunk=3, new_tokens=12, eos=0, draw=path_draws(seed, 3, 4))
        tokens, _ = naive.search(base, plain, search, ids, seed, 0.7, 12)
        assert found.token_ids == tokens
        lengths.add(len(tokens))
    assert len(lengths) > 1, "no answer ended early: this test checks nothing"
    assert min(lengths) < 12


def test_greedy_tokens_and_what_naive_reads(guided_model):
    nets = networks(guided_model)
    models = baseline.Models(nets["base"], nets["tuned"], nets["untuned"], nets["value"])
    ids = list(guided_model.base.tokenizer("The film").input_ids)
    found = baseline.answer(models, ids, width=2, successors=2, chunk=3, new_tokens=8, temperature=0)
    found_by_ivg = guided_model.generate(
        "The film", max_new_tokens=8, temperature=0, ignore_eos=False, width=2, successors=2, chunk_length=3
    )
    n, rows = len(ids), 4
    if 0 not in found_by_ivg.token_ids:
        assert found.token_ids == list(found_by_ivg.token_ids)
    each = rows * (n + 7)
    assert found.forward_tokens == Counter(base=each, tuned=each, untuned=each, value=rows * (3 * n + 3 + 6 + 8))


def test_naive_runs_alone(monkeypatch, capsys):
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "naive.py",
            "--layers",
            "1",
            "--vocabulary",
            "50",
            "--prompts",
            "1",
            "--prompt-tokens",
            "4",
            "--new-tokens",
            "6",
            "--dtype",
            "float32",
        ],
    )
    baseline.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["answers_per_second"] == pytest.approx(1 / sum(found["seconds"]))
    text = Path(baseline.__file__).read_text()
    assert "import ivg" not in text
    assert "from ivg" not in text


def test_naive_as_a_system():
    rows = runner.run(replace(TINY, prompts=3, rounds=1), None, cases(replace(TINY, prompts=3)), systems=ALL_SYSTEMS)
    assert [(r["label"], r["answers"], r["tokens"]) for r in rows] == [("transformers", 3, 21), ("naive", 2, 14), ("ivg", 3, 21)]
    read = rows[1]["forward_tokens"]
    assert read == dict.fromkeys(("base", "tuned", "untuned"), 2 * 16 * 14) | {"explicit": 2 * 16 * (13 + 15)}
    assert rows[2]["forward_tokens"]["base"] / 3 < read["base"] / 2


def test_methods_that_naive_lacks_are_refused(guided_model):
    for method in ("fudge", "cards"):
        with pytest.raises(ConfigError, match="does not implement"):
            NaiveSearch(replace(TINY, method=method), guided_model)


def test_comparison_prints_its_ratio(monkeypatch, capsys):
    options = "--shape tiny --prompts 1 --prompt-tokens 8 --new-tokens 4 --width 2 --successors 2 --chunk-length 2 --rounds 1"
    monkeypatch.setattr(sys, "argv", ["compare_naive.py", *options.split()])
    compare()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found["systems"]) == {"transformers", "naive", "ivg"}
    assert found["ratios"]["throughput_over_naive"] > 0


# Pages


def test_pages_keep_one_table_for_each_benchmark(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Benchmarks\n\ntext\n\n<!-- bench: a -->\nold\n<!-- /bench -->\n\nmore\n")
    docs_page.update_page(page, "a", r"new \1")
    docs_page.update_page(page, "b", "other")
    docs_page.update_page(page, "b", "another")
    text = page.read_text()
    assert text == (
        "# Benchmarks\n\ntext\n\n<!-- bench: a -->\nnew \\1\n<!-- /bench -->\n\nmore\n\n<!-- bench: b -->\nanother\n<!-- /bench -->\n"
    )
    page.write_text("<!-- bench: a -->\n")
    with pytest.raises(ConfigError, match="has no <!-- /bench -->"):
        docs_page.update_page(page, "a", "new")
    with pytest.raises(ConfigError, match="no page"):
        docs_page.update_page(tmp_path / "none.md", "a", "new")


# Targets


@pytest.mark.parametrize(
    ("key", "measured", "verdict"),
    [
        ("over_naive_50", 4.0, "stretch"),
        ("over_naive_50", 3.99, "pass"),
        ("over_naive_50", 2.79, "falls short"),
        ("over_transformers_per_flop", 1.0, "stretch"),
        ("over_transformers_per_flop", 1.15, "pass"),
        ("over_transformers_per_flop", 1.16, "falls short"),
        ("idle_slots", 0.11, "falls short"),
        ("memory", float("nan"), "falls short"),
    ],
)
def test_verdicts(key, measured, verdict):
    (target,) = (t for t in targets.TARGETS if t.key == key)
    assert target.verdict(measured) == verdict
    found = {t.key: t.target for t in targets.TARGETS} | {key: measured}
    assert targets.verdicts(found)[key] == verdict
    assert {c[-1] for c in targets.cells({t.key: t.target for t in targets.TARGETS})} == {"pass"}


def test_figures_of_the_table():
    """Made-up seconds: 3x, 6x, 12x and 2x over naive; 1.5 x transformers at 1.25 x its FLOPs; 1.1 x per token at 512."""
    read = {"base": 1, "tuned": 1}
    seconds = {"short": (1.125, 6.0, 16), "middle": (12.0, 32.0, 16), "long": (60.0, 80.0, 16), "one": (2.0, 1.0, 1)}
    rows = {
        name: [row("naive", 0, naive_seconds, 1), row("ivg", 0, ivg_seconds, n, forward_tokens=read), row("transformers", 0, 4.0, 16)]
        for name, (naive_seconds, ivg_seconds, n) in seconds.items()
    }
    rows["flat"] = [row("ivg-64", 0, 10.0, tokens=256), row("ivg-512", 0, 88.0, tokens=2048)]
    assert targets.figures(targets.Plan(TINY), rows) == pytest.approx(
        {"over_naive_50": 3, "over_naive_256": 6, "over_naive_512": 12, "over_naive_one": 2, "over_transformers_per_flop": 1.2, "flat": 1.1}
    )


def test_groups_are_those_of_the_table():
    groups = targets.make_plan(BenchSettings()).groups()
    found = {name: [(e.label, e.prompts, e.new_tokens) for e in entries] for name, (_, entries) in groups.items()}
    assert found == {
        "short": [("transformers", 16, 50), ("naive", 2, 50), ("ivg", 16, 50)],
        "one": [("naive", 1, 50), ("ivg", 1, 50)],
        "flat": [("ivg-64", 4, 64), ("ivg-512", 4, 512)],
        "middle": [("naive", 1, 256), ("ivg", 16, 256)],
        "long": [("naive", 1, 512), ("ivg", 16, 512)],
    }
    assert all((s.shape, s.guide, s.samples) == ("gpt2-small-16k", "guide-17m", 16) for s, _ in groups.values())


def test_idle_slots_are_counted():
    """Two steps: one of three passes with 5 of 12 slots idle while a request waits, one of one pass after it."""
    parent = SimpleNamespace(token_ids=())

    def children(*lengths):
        return [SimpleNamespace(token_ids=(0,) * n) for n in lengths]

    engine = SimpleNamespace(extend=lambda requests: [children(*r.gives) for r in requests])
    searcher = SimpleNamespace(waiting_requests=1, engine=engine)
    counter = slot_utilization.SlotCounter(searcher, 4)
    engine.extend([SimpleNamespace(beam=parent, gives=(3, 1)), SimpleNamespace(beam=parent, gives=(3,))])
    searcher.waiting_requests = 0
    engine.extend([SimpleNamespace(beam=parent, gives=(1,))])
    assert (counter.waiting.slots, counter.waiting.tokens) == (12, 7)
    assert counter.waiting.idle == pytest.approx(5 / 12)
    assert counter.draining.idle == pytest.approx(3 / 4)


def test_idle_slots_are_measured():
    tiny, lengths = replace(TINY, max_beams=32), slot_utilization.answer_lengths
    found = slot_utilization.measure(tiny, requests=5, least=3, most=9)
    assert found["tokens_with_end"] == 16 * sum(lengths(5, 3, 9, 0))
    assert 0 <= found["idle"] < found["idle_with_end"] < 1
    assert sorted(lengths(64, 16, 128, 0))[::63] == [16, 128]
    assert lengths(64, 16, 128, 0) != sorted(lengths(64, 16, 128, 0))
    with pytest.raises(ConfigError, match="none waits"):
        slot_utilization.measure(replace(tiny, max_beams=256), requests=2)


@pytest.mark.long
def test_targets_run_and_resume(capsys, tmp_path):
    line = ["--quick", "--out", str(tmp_path / "targets")]
    targets.main(line)
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    assert set(found["figures"]) == set(found["verdicts"]) == {t.key for t in targets.TARGETS}
    assert found["quick"]
    assert "mean nothing" in out
    memory = found["memory"]
    assert memory["ratio"] == pytest.approx(memory["peak"] / (memory["weights"] + memory["caches"]))
    files = {p.name: p.read_bytes() for p in (tmp_path / "targets").iterdir()}
    targets.main(line)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["figures"] == found["figures"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "targets").iterdir()} == files
    with pytest.raises(ConfigError, match="settings differ"):
        targets.main([*line, "--seed", "1"])
