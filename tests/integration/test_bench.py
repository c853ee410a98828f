"""Benchmarks: the rival is really IVG, rounds resume, figures are what their definitions say, the command prints them."""

import json
import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest

import naive
from ivg.bench import baselines, report, runner, slot_utilization, targets
from ivg.bench.settings import Settings, from_mapping
from ivg.bench.shapes import SHAPES, build, networks, prompts, tokenizer_of
from ivg.cli import main
from ivg.errors import ConfigError, MissingDependencyError
from ivg.model import GuidedModel
from ivg.models.chat_template import encode
from ivg.testing import byte_tokenizer, tiny_lm, tiny_value
from ivg.utils.rng import child_rng_path, mix, uniform
from ivg.values.implicit import ImplicitValue

TINY = Settings(shape="tiny", prompts=2, prompt_tokens=8, new_tokens=7, rounds=2, dtype="float32", device="cpu")


@pytest.fixture
def ivg(monkeypatch, capsys):
    """Run a command line; (standard output, standard error)."""

    def call(line, code=0):
        monkeypatch.setattr(sys, "argv", ["ivg", *line.split()])
        with pytest.raises(SystemExit) as end:
            main()
        out = capsys.readouterr()
        assert (end.value.code or 0) == code, out.err
        return out

    return call


# The naive rival


@pytest.fixture(scope="module")
def steered():
    """Distributions far from flat, so that answers differ and end."""
    implicit = ImplicitValue(tiny_lm("tuned", seed=1), tiny_lm("untuned", seed=2))
    return GuidedModel(tiny_lm("base"), {"implicit": implicit, "explicit": tiny_value(seed=3)})


def path_draws(seed, chunk, count):
    """What ivg draws for the hypothesis that was child number path[i] of its parent at chunk i."""

    def draw(path, position):
        rng_path = 0
        for i, k in enumerate(path):
            rng_path = child_rng_path(rng_path, i * chunk, k)
        return uniform(mix(seed, 0), rng_path, position)

    return draw


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize(("width", "successors", "chunk"), [(2, 3, 2), (1, 4, 3), (3, 1, 4)])
def test_the_rival_is_ivg(steered, guided, width, successors, chunk):
    """Token for token the search of tests/naive.py and of the engine, ends included, with the same draws."""
    code, nets = baselines.naive_module(), networks(steered)
    models = code.Models(nets["base"], *((nets["tuned"], nets["untuned"]) if guided else (None, None)), nets["value"])
    plain = {"implicit": naive.Implicit(nets["tuned"], nets["untuned"]), "explicit": naive.QHead(nets["value"])}
    sizes = {"width": width, "successors": successors, "chunk_length": chunk, "token": "implicit" if guided else "none", "original": True}
    search = steered.get_method("ivg", **sizes)
    for seed in range(4):
        ids = list(steered.base.tokenizer("I am").input_ids)
        draw = path_draws(seed, chunk, width * successors)
        found = code.answer(models, ids, width=width, successors=successors, chunk=chunk, new_tokens=9, eos=0, draw=draw)
        tokens, score = naive.search(nets["base"], plain, search, ids, seed, 0.7, 9)
        ours = steered.generate("I am", search, seed=seed, max_new_tokens=9, temperature=0.7)
        assert found.token_ids == tokens == list(ours.token_ids)
        assert found.score == pytest.approx(score, abs=1e-3)


def test_the_rival_ends(steered):
    """A base that likes to end: finished hypotheses are padded, compete with their copies, and one of them is the answer."""
    code, nets = baselines.naive_module(), networks(steered)

    class Ending:
        def __init__(self, network):
            self.network, self.parameters = network, network.parameters

        def __call__(self, **given):
            out = self.network(**given)
            out.logits[..., 0] += 4
            return out

    base = Ending(nets["base"])
    models = code.Models(base, nets["tuned"], nets["untuned"], nets["value"])
    plain = {"implicit": naive.Implicit(nets["tuned"], nets["untuned"]), "explicit": naive.QHead(nets["value"])}
    search = steered.get_method("ivg", width=2, successors=2, chunk_length=3, original=True)
    ids, lengths = list(steered.base.tokenizer("I am").input_ids), set()
    for seed in range(8):
        found = code.answer(models, ids, width=2, successors=2, chunk=3, new_tokens=12, eos=0, draw=path_draws(seed, 3, 4))
        tokens, _ = naive.search(base, plain, search, ids, seed, 0.7, 12)
        assert found.token_ids == tokens
        lengths.add(len(tokens))
    assert len(lengths) > 1, "no answer ended early: the test shows nothing"
    assert min(lengths) < 12


def test_greedy_and_what_the_rival_reads(steered):
    code, nets = baselines.naive_module(), networks(steered)
    models = code.Models(nets["base"], nets["tuned"], nets["untuned"], nets["value"])
    ids = list(steered.base.tokenizer("The film").input_ids)
    found = code.answer(models, ids, width=2, successors=2, chunk=3, new_tokens=8, temperature=0)
    ours = steered.generate("The film", max_new_tokens=8, temperature=0, ignore_eos=False, width=2, successors=2, chunk_length=3)
    n, rows = len(ids), 4
    if 0 not in ours.token_ids:
        assert found.token_ids == list(ours.token_ids)
    each = rows * (n + 7)
    assert found.forward_tokens == Counter(base=each, tuned=each, untuned=each, value=rows * (3 * n + 3 + 6 + 8))


def test_the_rival_runs_alone(monkeypatch, capsys):
    code = baselines.naive_module()
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
    code.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["answers_per_second"] == pytest.approx(1 / sum(found["seconds"]))
    text = (baselines.Path(code.__file__)).read_text()
    assert "import ivg" not in text
    assert "from ivg" not in text


def test_a_missing_rival_is_told(tmp_path):
    with pytest.raises(ConfigError, match="floor,ours"):
        baselines.naive_module([tmp_path / "naive.py"])


# Shapes


@pytest.mark.parametrize("size", [257, 400, 16384, 50257])
def test_tokenizers_have_their_size(size):
    tokenizer = tokenizer_of(size)
    assert len(tokenizer) == size
    assert tokenizer.decode(tokenizer("Good day, world").input_ids) == "Good day, world"


def test_a_tokenizer_without_bytes_is_refused():
    with pytest.raises(ConfigError, match="at least 257"):
        tokenizer_of(100)


@pytest.mark.parametrize("tokens", [8, 31])
@pytest.mark.parametrize("tokenizer", [tokenizer_of(16384), byte_tokenizer(bos=True)])
def test_prompts_have_their_length(tokenizer, tokens):
    """In the base's tokens, and in those of guides, which read the text."""
    found = prompts(tokenizer, 5, tokens)
    assert len({p.content for p in found}) == 5
    for p in found:
        assert len(p.token_ids) == tokens
        assert encode(replace(p, token_ids=None), tokenizer, None) == list(p.token_ids)


def test_published_sizes():
    """Parameters as published, without making the weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from ivg.bench.shapes import _config

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
            network = AutoModelForCausalLM.from_config(_config(SHAPES[name], SHAPES[name].vocabulary))
        assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, rel=0.001), name


@pytest.mark.parametrize("shape", ["tiny", "tiny-llama"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_models_are_built_in_their_dtype(shape, dtype):
    model = build(shape, dtype=dtype, device="cpu")
    assert {str(p.dtype) for n in networks(model).values() for p in n.parameters()} == {f"torch.{dtype}"}
    assert model.base.vocabulary.same_as(model.values["implicit"].vocabulary)
    twin = build(shape, dtype=dtype, device="cpu")
    for a, b in zip(networks(model).values(), networks(twin).values(), strict=True):
        assert all(x.equal(y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_unknown_shapes_are_told():
    with pytest.raises(ConfigError, match="gpt2-small-16k"):
        build("gpt5")
    with pytest.raises(ConfigError, match="guides of their own"):
        build("embedded", "tiny")


# Rounds


def test_contestants_in_turn_and_what_they_read():
    rows = runner.run(TINY)
    assert [(r["round"], r["label"]) for r in rows] == [(n, c) for n in (0, 1) for c in ("floor", "naive", "ours")]
    floor, naive_row, ours = rows[:3]
    assert floor["forward_tokens"] == {"base": 2 * 16 * (8 + 6)}
    assert naive_row["forward_tokens"] == dict.fromkeys(("base", "tuned", "untuned"), 2 * 16 * 14) | {"explicit": 2 * 16 * (13 + 15)}
    assert set(ours["forward_tokens"]) == {"base", "tuned", "untuned", "explicit"}
    assert ours["forward_tokens"]["base"] < naive_row["forward_tokens"]["base"]
    assert all(r["answers"] == 2 and r["tokens"] == 14 and 0 < r["first"] <= r["seconds"] for r in rows)
    sizes = ours["sizes"]
    assert ours["flops"] == 2 * sum(sizes[m] * n for m, n in ours["forward_tokens"].items())
    assert ours["caches"] > 0


@pytest.mark.parametrize("method", ["bon", "cbs-explicit", "cards"])
def test_any_strategy(method):
    known = method in ("bon", "cbs-explicit")
    wanted = ("floor", "naive", "ours") if known else ("floor", "ours")
    rows = runner.run(replace(TINY, method=method, contestants=wanted, rounds=1, naive_prompts=1))
    assert [r["tokens"] for r in rows] == ([14, 7, 14] if known else [14, 14])
    if not known:
        with pytest.raises(ConfigError, match="--contestants floor,ours"):
            replace(TINY, method=method)


@pytest.mark.long
def test_interrupted_rounds_go_on(tmp_path, monkeypatch):
    file, real = tmp_path / "rows.jsonl", runner.Bench.measure
    made = []

    def measure(self, entry, number):
        made.append((entry.label, number))
        if len(made) == 8:  # three to warm up, then into the second round
            raise KeyboardInterrupt
        return real(self, entry, number)

    monkeypatch.setattr(runner.Bench, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        runner.run(TINY, file)
    before = file.read_text()
    assert len(before.splitlines()) == 4
    rows = runner.run(TINY, file)
    assert file.read_text().startswith(before)
    assert [(r["label"], r["round"]) for r in rows][4:] == made[-2:] == [("naive", 1), ("ours", 1)]
    made.clear()
    assert runner.run(TINY, file) == rows
    assert runner.run(replace(TINY, rounds=1), file) == rows[:3]
    assert not made
    with pytest.raises(ConfigError, match="new_tokens"):
        runner.run(replace(TINY, new_tokens=8), file)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"contestants": ("ours", "theirs")}, "floor, naive, ours, vllm"),
        ({"contestants": ("ours", "ours")}, "each once"),
        ({"method": "fudge"}, "naive rival"),
        ({"method": "nothing"}, "unknown method"),
    ],
)
def test_unusable_settings(wrong, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping(wrong)


def test_vllm_is_asked_for_by_name():
    with pytest.raises(MissingDependencyError, match="vllm"):
        baselines.contestant("vllm", TINY, build("tiny", device="cpu"))


# Figures


def row(label, number, seconds, answers=2, **more):
    facts = {"new_tokens": 10, "first": seconds / 2, "tokens": 10 * answers, "peak": 300, "before": 100, "flops": 8e12, "dtype": "float32"}
    facts |= {
        "device": "cpu",
        "threads": 2,
        "commit": "c",
        "others": 0.0,
        "forward_tokens": {"base": 5},
        "sizes": {"base": 100, "tuned": 25},
    }
    return {"label": label, "round": number, "seconds": seconds, "answers": answers, **facts, **more}


def test_ratios_are_medians_of_rounds():
    """The second round ran at half speed for all: no ratio moves."""
    times = {"floor": (4.0, 8.0, 4.0), "naive": (10.0, 20.0, 16.0), "ours": (6.0, 12.0, 6.0)}
    extra = {"floor": {}, "naive": {"answers": 1}, "ours": {"forward_tokens": {"base": 5, "tuned": 5}}}
    rows = [row(c, n, times[c][n], **extra[c]) for n in range(3) for c in times]
    found = report.summary(TINY, rows, {"command": "ivg bench", "machine": {"cores": 2}, "commit": "c"})
    assert found["ratios"] == pytest.approx(
        {"throughput_over_naive": 10 / 3, "flop_ratio": 1.25, "time_over_floor": 1.5, "time_over_floor_per_flop": 1.2}
    )
    ours = found["contestants"]["ours"]
    assert (ours["seconds"], ours["answers_per_second"], ours["tokens_per_second"]) == pytest.approx((6.0, 1 / 3, 20 / 6))
    assert (ours["peak_bytes"], ours["peak_above_bytes"]) == (300, 200)
    assert any("measured on 1" in line for line in report.lines(found))
    assert not report.disturbed(found)
    assert "disturbed" in report.disturbed(report.how([row("ours", 0, 1.0, others=0.3)]))[0]


def test_pages_keep_one_table_for_each_benchmark(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Benchmarks\n\ntext\n\n<!-- bench: a -->\nold\n<!-- /bench -->\n\nmore\n")
    report.publish(page, "a", r"new \1")
    report.publish(page, "b", "other")
    report.publish(page, "b", "another")
    text = page.read_text()
    assert text == (
        "# Benchmarks\n\ntext\n\n<!-- bench: a -->\nnew \\1\n<!-- /bench -->\n\nmore\n\n<!-- bench: b -->\nanother\n<!-- /bench -->\n"
    )
    page.write_text("<!-- bench: a -->\n")
    with pytest.raises(ConfigError, match="has no <!-- /bench -->"):
        report.publish(page, "a", "new")
    with pytest.raises(ConfigError, match="no page"):
        report.publish(tmp_path / "none.md", "a", "new")


@pytest.mark.parametrize(
    ("key", "measured", "verdict"),
    [
        ("over_naive_50", 4.0, "stretch"),
        ("over_naive_50", 3.99, "pass"),
        ("over_naive_50", 2.79, "falls short"),
        ("over_floor_per_flop", 1.0, "stretch"),
        ("over_floor_per_flop", 1.15, "pass"),
        ("over_floor_per_flop", 1.16, "falls short"),
        ("waiting", 0.11, "falls short"),
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
    """Made-up seconds: 3x, 6x, 12x and 2x over naive; 1.5 x the floor at 1.25 x its FLOPs; 1.1 x per token at 512."""
    read = {"base": 1, "tuned": 1}
    seconds = {"short": (1.125, 6.0, 16), "middle": (12.0, 32.0, 16), "long": (60.0, 80.0, 16), "one": (2.0, 1.0, 1)}
    rows = {
        name: [row("naive", 0, theirs, 1), row("ours", 0, ours, n, forward_tokens=read), row("floor", 0, 4.0, 16)]
        for name, (theirs, ours, n) in seconds.items()
    }
    rows["flat"] = [row("ours-64", 0, 10.0, tokens=256), row("ours-512", 0, 88.0, tokens=2048)]
    assert targets.figures(targets.Plan(TINY), rows) == pytest.approx(
        {"over_naive_50": 3, "over_naive_256": 6, "over_naive_512": 12, "over_naive_one": 2, "over_floor_per_flop": 1.2, "flat": 1.1}
    )


def test_groups_are_those_of_the_table():
    groups = targets.plan(Settings()).groups()
    found = {name: [(e.label, e.prompts, e.new_tokens) for e in entries] for name, (_, entries) in groups.items()}
    assert found == {
        "short": [("floor", 16, 50), ("naive", 2, 50), ("ours", 16, 50)],
        "one": [("naive", 1, 50), ("ours", 1, 50)],
        "flat": [("ours-64", 4, 64), ("ours-512", 4, 512)],
        "middle": [("naive", 1, 256), ("ours", 16, 256)],
        "long": [("naive", 1, 512), ("ours", 16, 512)],
    }
    assert all((s.shape, s.guide, s.hypotheses) == ("gpt2-small-16k", "guide-17m", 16) for s, _ in groups.values())


def test_lost_places_are_counted():
    """Two rounds: one of three passes with 5 of 12 tokens lost while a request waits, one of one pass behind it."""
    parent = SimpleNamespace(token_ids=())

    def children(*lengths):
        return [SimpleNamespace(token_ids=(0,) * n) for n in lengths]

    engine = SimpleNamespace(vocabulary=None, unsupported={}, name="fake", extend=lambda orders: [children(*o.gives) for o in orders])
    counted = slot_utilization.CountingEngine(engine, 4)
    counted.searcher = SimpleNamespace(waiting_requests=1)
    counted.extend([SimpleNamespace(beam=parent, gives=(3, 1)), SimpleNamespace(beam=parent, gives=(3,))])
    counted.searcher.waiting_requests = 0
    counted.extend([SimpleNamespace(beam=parent, gives=(1,))])
    assert (counted.waiting.places, counted.waiting.tokens) == (12, 7)
    assert counted.waiting.lost == pytest.approx(5 / 12)
    assert counted.draining.lost == pytest.approx(3 / 4)


def test_waiting_is_measured():
    tiny = replace(TINY, max_beams=32)
    found = slot_utilization.measure(tiny, requests=5, least=3, most=9)
    assert found["tokens_with_end"] == 16 * sum(slot_utilization.lengths(5, 3, 9, 0))
    assert 0 <= found["lost"] < found["lost_with_end"] < 1
    assert sorted(slot_utilization.lengths(64, 16, 128, 0))[::63] == [16, 128]
    assert slot_utilization.lengths(64, 16, 128, 0) != sorted(slot_utilization.lengths(64, 16, 128, 0))
    with pytest.raises(ConfigError, match="nobody waits"):
        slot_utilization.measure(replace(tiny, max_beams=256), requests=2)


# The command


def test_command_prints_a_table_and_json(ivg, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Benchmarks\n")
    sizes = "--shape tiny --prompts 3 --prompt-tokens 8 --new-tokens 6 -W 2 -K 2 -L 3 --rounds 2"
    line = f"bench {sizes} --docs {page} --out {tmp_path / 'r.jsonl'}"
    out = ivg(line)
    found = json.loads(out.out.splitlines()[-1])
    assert set(found["contestants"]) == {"floor", "naive", "ours"}
    assert all(len(c["seconds_of_rounds"]) == 2 for c in found["contestants"].values())
    assert found["contestants"]["naive"]["prompts"] == 2
    assert {"throughput_over_naive", "time_over_floor_per_flop"} < set(found["ratios"])
    assert "processor" in found["made"]["machine"]
    assert "answers/s" in out.out
    assert "round 2/2  ours" in out.err
    assert "| ours | 3 |" in page.read_text()
    again = ivg(line)
    assert json.loads(again.out.splitlines()[-1])["contestants"] == found["contestants"]
    assert "round" not in again.err


@pytest.mark.long
def test_targets_rehearse_and_resume(ivg, tmp_path):
    out = ivg(f"bench --targets --quick --out {tmp_path / 'targets'}")
    found = json.loads(out.out.splitlines()[-1])
    assert set(found["figures"]) == set(found["verdicts"]) == {t.key for t in targets.TARGETS}
    assert found["rehearsal"]
    assert "mean nothing" in out.out
    memory = found["memory"]
    assert memory["ratio"] == pytest.approx(memory["peak"] / (memory["weights"] + memory["caches"]))
    files = {p.name: p.read_bytes() for p in (tmp_path / "targets").iterdir()}
    again = ivg(f"bench --targets --quick --out {tmp_path / 'targets'}")
    assert json.loads(again.out.splitlines()[-1])["figures"] == found["figures"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "targets").iterdir()} == files
    assert "other settings" in ivg(f"bench --targets --quick --seed 1 --out {tmp_path / 'targets'}", 2).err


def test_command_refuses(ivg, tmp_path):
    assert "--targets has settings of its own" in ivg("bench --targets --shape tiny", 2).err
    assert "--quick is for --targets" in ivg("bench --quick", 2).err
    assert "unknown shape" in ivg("bench --shape nothing --rounds 1", 2).err
