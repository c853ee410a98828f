"""Values that are heads on the base's own network: nothing is loaded twice, nothing is read twice, and the answers stay as they are."""

import json
import threading
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from architectures import tiny
from benchmarks import head_on_base
from ivg import GuidedModel
from ivg.diagnostics.cost import flops, parameters
from ivg.evaluation.base_samples import sample_tokens
from ivg.factory.recipe import load_models
from ivg.models.head_reader import HeadReader
from ivg.models.hidden_states import gives_states
from ivg.models.loading import LoadOptions
from ivg.models.shared import SharedNetworks
from ivg.models.state_cache import StateCache
from ivg.search.methods import get_method
from ivg.settings.recipe import Recipe
from ivg.testing import byte_tokenizer, check_value, hypothesis, tiny_model
from ivg.training.kept_adapter import save_head
from ivg.types import Prompt
from ivg.values.explicit import ExplicitValue

FLOAT32 = LoadOptions(device="cpu", dtype="float32")
PROMPTS = ["The movie was", "I", "What a long prompt this one is"]
KINDS = ("vocabulary", "compact", "scalar")
SIZES = {"max_new_tokens": 12, "temperature": 1.3, "seed": 3, "stop_token_ids": tuple(range(60, 80))}


def write_network(folder, network):
    network.generation_config.eos_token_id = network.config.eos_token_id = 0
    network.save_pretrained(folder)
    byte_tokenizer(chat=True).save_pretrained(folder)
    return folder


def write_head(folder, base, kind, template=None, hidden=32, seed=7):
    """A value on the network in ``base``: a random head beside its name."""
    torch.manual_seed(seed)
    folder.mkdir()
    head = {"vocabulary": {"score_head.weight": (257, hidden)}, "scalar": {"score.weight": (1, hidden)}}
    head["compact"] = {"score_head.shared": (hidden,), "score_head.map": (hidden, hidden)}
    notes = {"head": "scalar" if kind == "scalar" else "vocabulary", "template": template}
    save_head(folder, base, {"ivg_value": notes}, {name: 0.3 * torch.randn(shape) for name, shape in head[kind].items()})
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """``base``, and a head of each kind on it; ``other-template``: one that reads prompts otherwise."""
    folder = tmp_path_factory.mktemp("hub")
    write_network(folder / "base", tiny_model("llama", 1))
    for kind in KINDS:
        write_head(folder / kind, folder / "base", kind)
    write_head(folder / "other-template", folder / "base", "vocabulary", "<{prompt}>")
    return folder


def on_base(hub, value, **more):
    return GuidedModel.from_pretrained(hub / "base", value=hub / value, options=FLOAT32, **more)


def apart(hub, value):
    """The same value as a network of its own."""
    model = GuidedModel.from_pretrained(hub / "base", options=FLOAT32)
    model.add_value("explicit", ExplicitValue.from_pretrained(hub / value, options=FLOAT32))
    return model


@pytest.fixture(scope="module")
def both(hub):
    """Of a kind of value: the model with it on the base, and with a network of its own; loaded once, and holding nothing."""
    load = cache(lambda kind: (on_base(hub, kind), apart(hub, kind)))

    def empty(kind):
        for model in load(kind):
            model.reset_caches()
        return load(kind)

    return empty


def weights(model):
    """Bytes of distinct storages of all networks."""
    networks = [network for _, network in [("", model.base.network), *(n for value in model.values.values() for n in value.networks())]]
    tensors = [tensor for network in networks for tensor in network.parameters()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def passes(model):
    """A list that grows by the tokens of each forward pass of the base's network."""
    counts = []
    model.base.network.register_forward_pre_hook(lambda _, args, given: counts.append(given["input_ids"].numel()), with_kwargs=True)
    return counts


def answers(model, method, prompts=PROMPTS, **more):
    done = model.generate(prompts, method, **{**SIZES, **more})
    assert all(lm.model.live_rows == 0 for lm in model.readers)
    assert not model.base.states
    return done


def check_same(found, expected):
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]
    assert [c.score for c in found] == pytest.approx([c.score for c in expected], abs=1e-4, nan_ok=False)


def test_passes_of_other_threads_do_not_matter(hub):
    """The user's own passes of the base's network, while a value reads its states."""
    model, done, runs = on_base(hub, "vocabulary"), threading.Event(), []
    method = get_method("cbs-explicit", width=3, successors=2, chunk_length=4)
    expected = answers(model, method, max_new_tokens=24)

    @torch.no_grad()
    def own():
        while not done.is_set():
            runs.append(model.base.network(input_ids=torch.randint(1, 257, (18, 1))))

    thread = threading.Thread(target=own)
    thread.start()
    try:
        for _ in range(3):
            check_same(answers(model, method, max_new_tokens=24), expected)
    finally:
        done.set()
        thread.join()
    assert runs


def test_a_scalar_head_reads_as_much_beside_other_requests(hub):
    """Answers that end with their first token go on from the base's rows, whatever else is in the batch."""
    model = on_base(hub, "scalar")
    bon = get_method("bon", select="explicit", successors=4)
    request = model.request(PROMPTS[2], bon, **SIZES)
    alone = dict(model.searcher().run([request]))[0]
    model.reset_caches()
    chunks = get_method("cbs-explicit", width=2, successors=2, chunk_length=1)
    beside = dict(model.searcher().run([request, model.request("I", chunks, **SIZES)]))[0]
    assert alone.token_ids == beside.token_ids
    assert alone.usage.forward_tokens == beside.usage.forward_tokens
    assert alone.usage.forward_tokens["explicit"] <= 4


# Memory


@pytest.mark.parametrize("kind", KINDS)
def test_its_network_is_the_bases(hub, kind):
    model = on_base(hub, kind)
    explicit, alone = model.values["explicit"], GuidedModel.from_pretrained(hub / "base", options=FLOAT32)
    assert isinstance(explicit.model, HeadReader) and explicit.model.model is model.base.model
    assert explicit.network.backbone is model.base.network.base_model
    assert weights(model) == weights(alone) + 4 * sum(p.numel() for p in explicit.network.head.parameters())
    assert "ivg_value" not in vars(model.base.network.config)  # what the value's own configuration says is not the base's
    assert explicit.network.config.ivg_value["head"] == explicit.network.kind == ("scalar" if kind == "scalar" else "vocabulary")
    assert model.base.network.config.name_or_path == str(hub / "base") and explicit.network.config.name_or_path == str(hub / kind)


def test_other_options_or_networks_are_loaded_apart(hub, tmp_path):
    networks = SharedNetworks()
    base = networks.load(hub / "base", "base", FLOAT32)
    write_network(tmp_path / "other", tiny_model("llama", 2))
    write_head(tmp_path / "value", tmp_path / "other", "scalar")
    for path, options in ((hub / "scalar", LoadOptions(device="cpu", dtype="bfloat16")), (tmp_path / "value", FLOAT32)):
        found = networks.load_value(path, "explicit", options)
        assert not isinstance(found, HeadReader) and found.model is not base.model
    assert networks.load_value(hub / "scalar", "explicit", FLOAT32).model is base.model
    assert networks.load_value(hub / "base", "explicit", LoadOptions("cpu", "float32", adapter=str(hub / "scalar"))).model is base.model


def test_a_recipe_shares_named_values(hub):
    models = {"base": str(hub / "base"), "value": str(hub / "vocabulary")}
    values = {"second": {"value": {"path": str(hub / "base"), "adapter": str(hub / "scalar")}}}
    model = load_models(Recipe.parse({"models": models, "values": values, "run": {"dtype": "float32", "device": "cpu"}}))
    assert {lm.model for lm in model.readers} == {model.base.model}
    expected = apart(hub, "vocabulary")
    expected.add_value("second", ExplicitValue.from_pretrained(hub / "scalar", options=FLOAT32))
    method = get_method("custom", select_weights={"explicit": 1.0, "second": 0.5}, width=2, successors=2, chunk_length=3)
    check_same(answers(model, method), answers(expected, method))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_saved_whole(hub, tmp_path, kind):
    model = on_base(hub, kind)
    model.values["explicit"].save_pretrained(tmp_path / "whole")
    whole = ExplicitValue.from_pretrained(tmp_path / "whole", options=FLOAT32)
    rows = [hypothesis(p, "a movie", model.base) for p in PROMPTS]
    assert whole.score(rows) == pytest.approx(model.values["explicit"].score(rows), abs=1e-5)
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["ivg_value"]["head"] == whole.head


def test_it_obeys_the_laws_of_values(hub):
    for kind in KINDS:
        check_value(lambda kind=kind: on_base(hub, kind).values["explicit"], chains(on_base(hub, kind).base))


def chains(base):
    out = []
    for prompt, text in zip(PROMPTS, ["a bad", "good ", "so 12"], strict=True):
        chain = [hypothesis(prompt, text[:1], base)]
        for n in range(2, len(text) + 1):
            chain.append(hypothesis(prompt, text[:n], base, chain[-1]))
        out.append(chain)
    return out


# Answers

METHODS = {
    "ivg": {"method": "ivg", "token": "explicit", "width": 2, "successors": 2, "chunk_length": 3, "beta": 0.5},
    "cbs-explicit": {"method": "cbs-explicit", "width": 3, "successors": 2, "chunk_length": 4},
    "one token a chunk": {"method": "cbs-explicit", "width": 2, "successors": 3, "chunk_length": 1},
    "token-explicit": {"method": "token-explicit", "beta": 0.5},
    "gated": {"method": "token-explicit", "beta": 0.5, "gate": 4.0},
    "budget": {"method": "token-explicit", "beta": 0.5, "kl_budget": 2.0},
    "candidates": {"method": "token-explicit", "beta": 0.5, "candidates": 5},
    "bon": {"method": "bon", "select": "explicit", "successors": 5},
    "smc": {"method": "smc", "select": "explicit", "width": 4, "chunk_length": 3},
    "mcts": {"method": "mcts", "select": "explicit", "chunk_length": 3},
    "adaptive": {"method": "adaptive", "select": "explicit"},
    "gsi": {"method": "cbs-soft", "select": "explicit", "width": 2, "successors": 2, "chunk_length": 3},
}


def supports(kind, name):
    return kind != "scalar" or name not in ("ivg", "token-explicit", "gated", "budget")


def make(name):
    given_settings = dict(METHODS[name])
    return get_method(given_settings.pop("method"), **given_settings)


@pytest.mark.numerics
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in METHODS if supports(kind, name)])
def test_answers_are_those_of_a_network_of_its_own(both, kind, name):
    shared, own = both(kind)
    found = answers(shared, make(name))
    check_same(found, answers(own, make(name)))
    assert len({c.token_ids for c in found}) == 3


def test_responses_of_these_tests_end_early(hub):
    lengths = {len(c.token_ids) for name in ("bon", "cbs-explicit", "mcts") for c in answers(on_base(hub, "vocabulary"), make(name))}
    assert min(lengths) < 12 == max(lengths)


@pytest.mark.numerics
@pytest.mark.parametrize("kind", KINDS)
def test_any_search(hub, kind):
    shared, own = on_base(hub, kind), apart(hub, kind)

    @settings(max_examples=6, deadline=None, derandomize=True)
    @given(
        st.integers(1, 3),
        st.integers(1, 3),
        st.integers(1, 5),
        st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=4),
        st.sets(st.integers(1, 256), max_size=60),
        st.integers(0, 3),
    )
    def search(width, successors, chunk, prompts, stop, seed):
        method = get_method("cbs-explicit", width=width, successors=successors, chunk_length=chunk)
        more = {"stop_token_ids": tuple(stop), "seed": seed}
        check_same(answers(shared, method, prompts, **more), answers(own, method, prompts, **more))

    search()


def test_requests_of_other_methods_run_beside(hub):
    """Some rows of the base's passes have their states taken, others not."""
    shared, own = on_base(hub, "vocabulary"), apart(hub, "vocabulary")
    found = []
    for model in (shared, own):
        requests = [model.request(PROMPTS[i % 3], make(name), seed=i, max_new_tokens=9, temperature=1.2) for i, name in enumerate(METHODS)]
        found.append([c for _, c in sorted(model.searcher().run(requests), key=lambda pair: pair[0])])
    check_same(*found)
    assert not shared.base.states


@pytest.mark.numerics
@pytest.mark.parametrize("architecture", ["gpt2", "gemma3_text", "mistral", "mixtral"])
@pytest.mark.parametrize("kind", ["vocabulary", "scalar"])
def test_other_networks(tmp_path, architecture, kind):
    write_network(tmp_path / "base", tiny_model(architecture, 1))
    write_head(tmp_path / kind, tmp_path / "base", kind)
    model = on_base(tmp_path, kind)
    assert isinstance(model.values["explicit"].model, HeadReader)
    own = apart(tmp_path, kind)
    for name in ("cbs-explicit", "token-explicit", "candidates"):
        if supports(kind, name):
            check_same(answers(model, make(name)), answers(own, make(name)))


@pytest.mark.parametrize("architecture", ["mamba", "bloom"])
@pytest.mark.parametrize("kind", ["vocabulary", "scalar"])
def test_networks_with_caches_of_transformers_own(tmp_path, architecture, kind):
    network = tiny(architecture, 1)
    write_network(tmp_path / "base", network)
    write_head(tmp_path / kind, tmp_path / "base", kind, hidden=network.config.hidden_size)
    model = on_base(tmp_path, kind)
    assert isinstance(model.base.model.cache, StateCache) and isinstance(model.values["explicit"].model, HeadReader)
    own = apart(tmp_path, kind)
    for name in ("cbs-explicit", "one token a chunk", "token-explicit"):
        if supports(kind, name):
            check_same(answers(model, make(name), max_new_tokens=7), answers(own, make(name), max_new_tokens=7))


def test_a_network_that_does_not_give_its_states_is_loaded_twice(tmp_path):
    """OPT's language model calls a part of its body."""
    network = tiny("opt", 1)
    assert not gives_states(network)
    write_network(tmp_path / "base", network)
    write_head(tmp_path / "vocabulary", tmp_path / "base", "vocabulary", hidden=network.config.hidden_size)
    model = on_base(tmp_path, "vocabulary")
    assert not isinstance(model.values["explicit"].model, HeadReader)
    check_same(answers(model, make("ivg")), answers(apart(tmp_path, "vocabulary"), make("ivg")))


def test_states_that_change_within_the_pass_are_refused():
    network = tiny_model("llama", 1)
    assert gives_states(network)
    calls = []

    def alone_otherwise(_, args, output):
        calls.append(1)
        output.last_hidden_state = output.last_hidden_state * len(calls)

    network.base_model.register_forward_hook(alone_otherwise)
    assert not gives_states(network)


# Adapters


@pytest.mark.parametrize("place", ["tuned", "base"])
def test_rows_with_adapters_have_other_states(hub, tmp_path, place):
    """The adapter is tuned's, and the value follows the base; or the base's own, and the value reads by itself, without it."""
    peft = pytest.importorskip("peft", reason="no peft: pip install -c constraints.txt -e '.[train]'")
    made = peft.get_peft_model(tiny_model("llama", 1), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    torch.manual_seed(5)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    made.save_pretrained(tmp_path / "adapter")
    base = {"path": str(hub / "base"), "adapter": str(tmp_path / "adapter")}
    models = {"base": str(hub / "base"), "tuned": base, "untuned": str(hub / "base")} if place == "tuned" else {"base": base}
    run = {"dtype": "float32", "device": "cpu"}
    model = load_models(Recipe.parse({"models": {**models, "value": str(hub / "vocabulary")}, "run": run}))
    expected = load_models(Recipe.parse({"models": models, "run": run}))
    expected.add_value("explicit", ExplicitValue.from_pretrained(hub / "vocabulary", options=FLOAT32))
    explicit = model.values["explicit"]
    assert isinstance(explicit.model, HeadReader) and explicit.model.model is model.base.model
    for name, more in (("ivg", {"token": "implicit"} if place == "tuned" else {}), ("token-explicit", {})):
        method = make(name).with_settings(**more)
        check_same(answers(model, method), answers(expected, method))
    done = answers(model, make("cbs-explicit"))
    assert ("explicit" in done[0].usage.forward_tokens) == (place == "base")
    explicit.save_pretrained(tmp_path / "whole")
    rows = [hypothesis(p, "a movie", model.base) for p in PROMPTS]
    whole = ExplicitValue.from_pretrained(tmp_path / "whole", options=FLOAT32)
    assert whole.score(rows) == pytest.approx(explicit.score(rows), abs=1e-5)


def test_beside_guides_of_the_bases_shape(hub, tmp_path):
    """Tuned has the base's shape, and untuned is the base: whatever reads them in one pass, the value has the base's states."""
    write_network(tmp_path / "tuned", tiny_model("llama", 2))
    guides = {"tuned": tmp_path / "tuned", "untuned": hub / "base"}
    model = on_base(hub, "vocabulary", **guides)
    expected = GuidedModel.from_pretrained(hub / "base", **guides, options=FLOAT32)
    expected.add_value("explicit", ExplicitValue.from_pretrained(hub / "vocabulary", options=FLOAT32))
    for name, more in (("ivg", {"token": "implicit"}), ("cbs-explicit", {})):
        method = make(name).with_settings(**more)
        check_same(answers(model, method), answers(expected, method))


# Cost


@pytest.mark.parametrize("kind", ["vocabulary", "compact"])
@pytest.mark.parametrize("name", ["cbs-explicit", "one token a chunk", "bon", "mcts", "smc", "ivg", "token-explicit", "candidates"])
def test_it_reads_nothing(both, kind, name):
    model, expected = both(kind)
    counts, wanted = passes(model), passes(expected)
    found, reference = answers(model, make(name)), answers(expected, make(name))
    assert counts == wanted
    for a, b in zip(found, reference, strict=True):
        assert "explicit" not in a.usage.forward_tokens and "explicit" in b.usage.forward_tokens
        assert a.usage.forward_tokens["base"] == b.usage.forward_tokens["base"]


def test_a_scalar_head_reads_last_tokens_alone(hub):
    """One pass for each chunk, behind what the base's rows hold."""
    model, expected = on_base(hub, "scalar"), apart(hub, "scalar")
    counts, wanted = passes(model), passes(expected)
    method = get_method("bon", select="explicit", successors=5)
    (found,), (reference,) = answers(model, method, PROMPTS[:1]), answers(expected, method, PROMPTS[:1])
    check_same([found], [reference])
    assert counts == [*wanted, 5] and found.usage.forward_tokens["explicit"] == 5 < reference.usage.forward_tokens["explicit"]
    assert found.usage.forward_tokens["base"] == reference.usage.forward_tokens["base"]
    method = make("one token a chunk")
    first, second = answers(model, method, PROMPTS[:1])[0], answers(model, method)[0]
    assert first.usage.forward_tokens == second.usage.forward_tokens  # whatever else is in the batch
    scored = {node.key for step in answers(model, method, PROMPTS[:1], trace=True)[0].trace for node in (*step.kept, *step.dropped)}
    assert first.usage.forward_tokens["explicit"] == len(scored)  # each when it was new, those that ended with their first token, too


def test_the_head_alone_is_counted(hub):
    model = on_base(hub, "vocabulary")
    assert parameters(model)["explicit.head"] == 257 * 32
    guided, selected = (answers(model, make(name)) for name in ("token-explicit", "cbs-explicit"))
    for done in guided:
        assert done.usage.forward_tokens["explicit.head"] == len(done.token_ids)
        assert done.usage.total_forward_tokens == done.usage.forward_tokens["base"]
        costs = flops(done.usage.forward_tokens, parameters(model)) - flops({"base": done.usage.forward_tokens["base"]}, parameters(model))
        assert costs == 2 * 257 * 32 * len(done.token_ids)
    assert all(set(done.usage.forward_tokens) == {"base"} for done in selected)


def test_another_template_is_read_in_the_bases_passes(hub):
    model, expected = on_base(hub, "other-template"), apart(hub, "other-template")
    assert model.values["explicit"].model.template == "<{prompt}>"
    for name in ("ivg", "token-explicit", "cbs-explicit", "candidates"):
        counts, wanted = passes(model), passes(expected)
        found, reference = answers(model, make(name)), answers(expected, make(name))
        check_same(found, reference)
        assert [c.usage.forward_tokens["explicit"] for c in found] == [c.usage.forward_tokens["explicit"] for c in reference]
        if name == "token-explicit":  # as many rows of the value in each pass, but for the prompts, whose lengths differ
            assert counts[2:] == [2 * n for n in wanted[1:]]
        model.reset_caches()
        expected.reset_caches()


@pytest.mark.parametrize("kind", KINDS)
def test_given_responses_are_read(hub, kind):
    model = on_base(hub, kind)
    texts = ["good", "", "a much longer answer"]
    assert model.score(PROMPTS[0], texts) == pytest.approx(apart(hub, kind).score(PROMPTS[0], texts), abs=1e-4)
    assert model.base.model.live_rows == 0
    rows = [hypothesis("x", "yes", model.base)]
    model.values["explicit"].score(rows)
    assert rows[0].token_counter.forward_tokens["explicit"] == 4 - (kind != "scalar")


def test_states_are_not_those_of_another_text(hub):
    """A hypothesis of the same key and length that has other tokens, or another prompt, is read anew."""
    from dataclasses import replace

    model = on_base(hub, "vocabulary")
    explicit, h = model.values["explicit"], hypothesis(PROMPTS[0], "good", model.base)
    model.base.outputs([replace(h, token_ids=h.token_ids[:-1])])
    others = [h, replace(h, token_ids=(65, *h.token_ids[1:])), replace(h, prompt=Prompt("Another"))]
    fresh = on_base(hub, "vocabulary").values["explicit"]
    for other in others:
        counts = passes(model)
        found = explicit.score([other])
        assert (not counts) == (other is h)
        assert found == pytest.approx(fresh.score([replace(other, key=-1 - len(counts))]), abs=1e-4)
        explicit.release([other.key])
        fresh.release([-1 - len(counts)])


@pytest.mark.parametrize(("value", "own"), [("vocabulary", {}), ("other-template", {"explicit": 4}), ("scalar", {"explicit": 5})])
def test_best_of_n_of_stored_samples_costs_as_much(hub, value, own):
    model = on_base(hub, value)
    _, counts = sample_tokens(model, model.values["explicit"], [hypothesis(PROMPTS[0], "movie", model.base)])
    assert counts == [{"base": 4, **own}]


def test_the_benchmark(hub, tmp_path):
    head_on_base.write(tmp_path / "value", str(hub / "base"))
    models = [head_on_base.load(str(hub / "base"), tmp_path / "value", shared=shared) for shared in (True, False)]
    shared, own = (head_on_base.measure(model, "cbs-explicit", 2, 6) for model in models)
    assert shared["answers"] == own["answers"] and shared["read"] < own["read"]
    assert head_on_base.weights(models[0]) < head_on_base.weights(models[1])


def test_reset_caches_forgets(hub):
    model = on_base(hub, "vocabulary")
    model.base.outputs([hypothesis(PROMPTS[0], "good", model.base)])
    assert len(model.base.states) == 1
    model.reset_caches()
    assert not model.base.states and model.base.model.live_rows == 0
