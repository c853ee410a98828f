"""Two networks of one shape in one forward pass: each row gives what its network gives alone, and what cannot is read separately."""

import gc
import re
import threading
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import naive
from architectures import tiny
from benchmarks import shared_passes
from ivg import GuidedModel
from ivg.factory.recipe import load_models
from ivg.models import packed_linear
from ivg.models.cached_lm import CachedLM
from ivg.models.loading import LoadOptions
from ivg.models.packed_linear import packed_layers
from ivg.models.runner import ModelRunner
from ivg.models.shared import SharedNetworks
from ivg.models.shared_passes import share_passes
from ivg.models.stacked import StackedNetworks, find_difference
from ivg.settings.models import ModelRef
from ivg.settings.recipe import Recipe
from ivg.testing import byte_tokenizer, hypothesis, tiny_model
from ivg.types import Prompt
from ivg.values.implicit import ImplicitValue, share_pair_passes

pytestmark = pytest.mark.numerics

FLOAT32 = LoadOptions(device="cpu", dtype="float32")
PROMPTS = ["The movie was", "I", "What a long prompt this one is"]
SIZES = {"max_new_tokens": 8, "temperature": 1.0, "seed": 3}


def write(folder, architecture="llama"):
    """``base`` (of another shape), and ``untuned``, ``tuned`` and ``other``, which have one shape and nothing else in common."""
    for seed, (name, hidden) in enumerate({"base": 48, "untuned": 32, "tuned": 32, "other": 32}.items(), 1):
        tiny_model(architecture, seed, context=128, hidden=hidden).save_pretrained(folder / name)
        byte_tokenizer(chat=True).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def three(llama):
    return load(llama)


def load(folder, *, base="base", untuned="untuned", together=True):
    """A model with the pairs ``implicit`` (tuned) and ``second`` (other)."""
    paths = {name: str(folder / name) for name in {base, untuned, "tuned", "other"}}
    if together:
        recipe = {
            "models": {"base": paths[base], "tuned": paths["tuned"], "untuned": paths[untuned]},
            "values": {"second": {"tuned": {"path": paths["other"]}, "untuned": {"path": paths[untuned]}}},
            "run": {"dtype": "float32", "device": "cpu"},
        }
        return load_models(Recipe.parse(recipe))
    lms = {
        role: SharedNetworks().load(paths[name], role, FLOAT32)
        for role, name in {"tuned": "tuned", "untuned": untuned, "second.tuned": "other", "second.untuned": untuned, "base": base}.items()
    }
    pairs = {
        "implicit": ImplicitValue(lms["tuned"], lms["untuned"]),
        "second": ImplicitValue(lms["second.tuned"], lms["second.untuned"], "second"),
    }
    return GuidedModel(lms["base"], pairs)


def runners(model):
    return {lm.model for value in model.values.values() for lm in value.cached_lms()}


def passes(network):
    """A list that grows by the number of rows of each forward pass of ``network``."""
    counts = []
    network.register_forward_pre_hook(lambda _, args, given: counts.append(len(given["input_ids"])), with_kwargs=True)
    return counts


# Exactness


def test_the_networks_differ(llama):
    """Or nothing here could tell which one a row reads with."""
    ids, model = torch.tensor([[1, 2, 3]]), load(llama)
    with torch.no_grad():
        a, b, c = (lm.network(input_ids=ids).logits for lm in (*model.values["implicit"].cached_lms(), model.values["second"].tuned))
    assert min((x - y).abs().max() for x, y in ((a, b), (a, c), (b, c))) > 1


@pytest.mark.parametrize(
    ("architecture", "shared"),
    [("llama", True), ("gpt2", True), ("gemma3_text", True), ("mistral", True), ("qwen3", True), ("mixtral", False)],
)
def test_answers_are_those_of_separate_networks(architecture, shared, tmp_path):
    write(tmp_path, architecture)
    together, apart = load(tmp_path), load(tmp_path, together=False)
    assert (len(runners(together)), len(runners(apart))) == (1 if shared else 3, 4)
    methods = [
        {"method": "eft"},
        {"method": "custom", "token": "second", "beta": 0.5},
        {"method": "eft", "gate": 1.0},
        {"method": "eft", "kl_budget": 0.5},
        {"method": "cbs-implicit"},
        {"method": "custom", "token": "implicit", "select": "second", "width": 2, "successors": 2, "chunk_length": 3},
        {"method": "eft", "draft": 3},
    ]
    for method in methods:
        expected = apart.generate(PROMPTS, **method, **SIZES)
        found = together.generate(PROMPTS, **method, **SIZES)
        assert [c.token_ids for c in found] == [c.token_ids for c in expected], method
        if "draft" not in method:  # how many tokens are drafted depends on the time that they take
            assert [c.usage.forward_tokens for c in found] == [c.usage.forward_tokens for c in expected], method
    assert together.base.model.live_rows == sum(runner.live_rows for runner in runners(together)) == 0


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("batched", [0, 1 << 20])
def test_packed_layers(architecture, batched, tmp_path, monkeypatch):
    """Layers that oneDNN has packed, beside plain ones of up to ``batched`` weights that are multiplied together."""
    monkeypatch.setattr(packed_linear, "MIN_WEIGHTS", {torch.float32: 2000})
    monkeypatch.setattr("ivg.models.stacked.MAX_BATCHED_WEIGHTS", batched)
    write(tmp_path, architecture)
    together, apart = load(tmp_path), load(tmp_path, together=False)
    assert len(runners(together)) == 1
    assert all(packed_layers(lm.network) for lm in together.values["implicit"].cached_lms())
    expected = [c.token_ids for c in apart.generate(PROMPTS, "cbs-implicit", **SIZES)]
    assert [c.token_ids for c in together.generate(PROMPTS, "cbs-implicit", **SIZES)] == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    first, second = lm(tiny_model("llama", 1).to(dtype)), lm(tiny_model("llama", 2).to(dtype))
    expected = [reading(one) for one in (first, second)]
    assert share_passes(first, second)
    for one, want in zip((first, second), expected, strict=True):
        torch.testing.assert_close(reading(one), want, atol=0.05, rtol=0.05)


def test_values_are_those_of_plain_passes(llama):
    """Scores and deltas of the pair against the naive implementation."""
    model = load(llama)
    value, base = model.values["implicit"], model.base
    reference = naive.Implicit(value.tuned.network, value.untuned.network)
    assert value.tuned.model is value.untuned.model
    for prompt in PROMPTS:
        beam = base.root(Prompt(prompt), 8)
        ids = list(base.prompt_ids(beam.prompt))
        expected = naive.outputs(reference.tuned, ids)[-1] - naive.outputs(reference.untuned, ids)[-1]
        torch.testing.assert_close(value.deltas([beam])[0], expected, atol=1e-4, rtol=1e-4)
        value.release([beam.key])
        answer = hypothesis(prompt, " a good one", base, end=True)
        assert value.score([answer]) == pytest.approx([reference.score(ids, list(answer.token_ids))], abs=1e-3)


@given(
    names=st.lists(st.sampled_from([None, "network001", "network002"]), min_size=1, max_size=6),
    lengths=st.lists(st.integers(1, 4), min_size=6, max_size=6),
    more=st.lists(st.integers(1, 2), min_size=6, max_size=6),
)
@settings(max_examples=40, deadline=None)
def test_each_row_reads_as_alone(names, lengths, more, three):
    """Rows of any of three networks, of any lengths, in two passes."""
    lms = {lm.weights: lm for value in three.values.values() for lm in value.cached_lms()}
    assert lms.keys() == {None, "network001", "network002"}
    (model,) = runners(three)
    texts = [[(7 * i + 3 * k) % 257 for k in range(n + m)] for i, (n, m) in enumerate(zip(lengths, more, strict=True))][: len(names)]
    rows = [model.open(text[:n], weights=name) for name, text, n in zip(names, texts, lengths, strict=False)]
    for last in (False, True):
        new = [text[len(row.ids) : None if last else n] for row, text, n in zip(rows, texts, lengths, strict=False)]
        some = [i for i, tokens in enumerate(new) if tokens]
        got = model.last_outputs([rows[i] for i in some], [new[i] for i in some])
        for k, i in enumerate(some):
            torch.testing.assert_close(got[k], naive.outputs(lms[names[i]].network, rows[i].ids)[-1], atol=1e-4, rtol=1e-4)
    for row in rows:
        model.free(row)


def test_requests_with_different_guides_share_passes(llama):
    """Two pairs, one request without guidance, one whose budget is soon spent: each has the answer that it has alone."""
    together, apart = load(llama), load(llama, together=False)

    def requests(model):
        kinds = [
            {"method": "eft"},
            {"method": "custom", "token": "second"},
            {"method": "base"},
            {"method": "eft", "beta": 0.3},
            {"method": "eft", "kl_budget": 0.1},
        ]
        return [model.request("The movie was", **kind, seed=i, max_new_tokens=8, ignore_eos=True) for i, kind in enumerate(kinds)]

    expected = {i: next(apart.searcher().run([request]))[1].token_ids for i, request in enumerate(requests(apart))}
    counts = passes(together.values["implicit"].untuned.network)
    assert {i: c.token_ids for i, c in together.searcher().run(requests(together))} == expected
    assert set(counts) == {2}


# Passes


def test_a_pair_is_read_in_one_pass_a_token(llama):
    model = load(llama)
    counts = passes(model.values["implicit"].untuned.network)
    model.generate("The movie was", "eft", **SIZES, ignore_eos=True)
    assert counts == [2] * 8


def test_a_pair_with_the_base_is_read_in_the_bases_pass(llama):
    """Proxy tuning of a base by another of its shape: it is the untuned one itself."""
    together, apart = load(llama, base="untuned"), load(llama, base="untuned", together=False)
    assert runners(together) == {together.base.model}
    expected = [c.token_ids for c in apart.generate(PROMPTS, "eft", **SIZES)]
    assert [c.token_ids for c in together.generate(PROMPTS, "eft", **SIZES)] == expected
    counts = passes(together.base.network)
    together.reset_caches()
    together.generate("The movie was", "eft", **SIZES, ignore_eos=True)
    assert counts == [2] * 8


def test_passes_of_many_rows_are_separate(llama):
    """They would take longer together."""
    model, apart = load(llama), load(llama, together=False)
    counts = passes(model.values["implicit"].untuned.network)
    for n, most in ((20, 40), (40, 40)):
        counts.clear()
        found, expected = (m.generate("I", "eft", n=n, **SIZES) for m in (model, apart))
        assert [c.token_ids for c in found] == [c.token_ids for c in expected]
        assert max(counts) == most


def test_passes_of_other_threads_are_plain(llama):
    """The user's own, of a network whose shared pass runs."""
    model = load(llama)
    pair = model.values["implicit"]
    ids, found = torch.tensor([[1, 2, 3], [4, 5, 6]]), []

    @torch.no_grad()
    def own():
        found.extend(lm.network(input_ids=ids).logits for lm in (pair.untuned, pair.tuned))

    own()
    with pair.tuned.model.row_weights.using([None, pair.tuned.weights]):
        thread = threading.Thread(target=own)
        thread.start()
        thread.join()
        own()
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    assert not torch.allclose(found[0], found[4])  # here a row reads with the other


def test_a_model_names_its_own_network(llama):
    model = load(llama)
    value = model.values["implicit"]
    assert value.tuned.title.endswith(f"{llama / 'tuned'})") and value.untuned.title.endswith(f"{llama / 'untuned'})")
    assert [name for name, _ in value.networks()] == ["tuned", "untuned"]
    assert [network.config.name_or_path for _, network in value.networks()] == [str(llama / "tuned"), str(llama / "untuned")]


def test_weights_are_not_copied(llama):
    model, apart = load(llama), load(llama, together=False)
    found = []
    for pair in (model.values["implicit"], apart.values["implicit"]):
        tensors = [parameter.untyped_storage() for lm in (pair.tuned, pair.untuned) for parameter in lm.network.parameters()]
        found.append(sum({storage.data_ptr(): storage.nbytes() for storage in tensors}.values()))
    third = sum(p.numel() * 4 for p in model.values["second"].tuned.network.parameters())
    assert found[1] <= found[0] <= found[1] + third  # that of the third lies beside the two


def test_a_pair_alone_shares_passes(llama):
    value = ImplicitValue.from_pretrained(llama / "tuned", llama / "untuned", options=FLOAT32)
    assert value.tuned.model is value.untuned.model
    model = GuidedModel.from_pretrained(llama / "base", tuned=llama / "tuned", untuned=llama / "untuned", options=FLOAT32)
    assert len(runners(model)) == 1 and runners(model) != {model.base.model}


# What stays separate


def reading(lm):
    """What ``lm`` gives behind a text."""
    lm.reset_cache()
    row = lm.open_row([5, 6, 7])
    out = lm.model.last_outputs([row], [[5, 6, 7]])[0]
    lm.model.free(row)
    return out


def lm(network, name="lm"):
    return CachedLM(ModelRunner(network, name), byte_tokenizer())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda: tiny_model("llama", 2, hidden=64), "head_dim|hidden_size"),
        (lambda: tiny_model("llama", 2, vocab_size=300), "vocab_size"),
        (lambda: tiny_model("llama", 2, context=128), "max_position_embeddings"),
        (lambda: tiny_model("mistral", 2), "class"),
        (lambda: tiny_model("llama", 2).to(torch.bfloat16), "dtype"),
        (lambda: with_config(rms_norm_eps=0.1), "rms_norm_eps"),
        (lambda: with_config(rope_parameters={"rope_type": "default", "rope_theta": 50.0}), "rope"),
        (lambda: with_constant(), "constants"),
        (lambda: with_own_forward(), "forward method"),
    ],
)  # fmt: skip
def test_networks_that_compute_otherwise_are_read_separately(change, reason):
    first, second = lm(tiny_model("llama", 1), "first"), lm(change(), "second")
    why = find_difference(first.network, second.network)
    assert why is not None and re.search(reason, why)
    assert not share_passes(first, second) and second.model is not first.model
    assert first.model.row_weights is None is second.model.row_weights


def with_config(**changed):
    network = tiny_model("llama", 2)
    made = type(network)(type(network.config).from_dict(network.config.to_dict() | changed))
    made.load_state_dict(network.state_dict())
    return made.eval()


def with_constant():
    network = tiny_model("llama", 2)
    network.model.rotary_emb.inv_freq.mul_(2)
    return network


def with_own_forward():
    network = tiny_model("llama", 2)
    layer = network.model.layers[1].mlp.up_proj
    layer.forward = partial(type(layer).forward, layer)
    return network


def test_settings_without_effect_do_not_matter():
    second = tiny_model("llama", 2)
    second.config.update({"use_cache": False, "pad_token_id": 5, "eos_token_id": 3, "_name_or_path": "elsewhere"})
    first, second = lm(tiny_model("llama", 1)), lm(second)
    assert share_passes(first, second) and second.model is first.model


def test_networks_whose_embedding_takes_more_are_as_they_were(tmp_path):
    """OPT looks up its positions by an embedding that takes the mask, too."""
    network, other = (tiny("opt", seed=seed) for seed in (1, 2))
    assert "may not read row by row" in find_difference(network, other)
    ids = torch.tensor([[5, 6, 7]])
    expected = network(input_ids=ids).logits
    readers = [lm(network, "untuned"), lm(other, "tuned")]
    assert not share_passes(*readers)
    assert torch.equal(network(input_ids=ids).logits, expected)


def test_a_refused_trial_leaves_the_networks_as_they_were(monkeypatch):
    network, other = (tiny("llama", seed=seed) for seed in (1, 2))
    ids = torch.tensor([[5, 6, 7]])
    expected = [net(input_ids=ids).logits for net in (network, other)]
    sizes = [sum(p.untyped_storage().nbytes() for p in net.parameters()) for net in (network, other)]
    monkeypatch.setattr(StackedNetworks, "using", raising)
    assert not share_passes(lm(network), lm(other))
    assert not [module for net in (network, other) for module in net.modules() if "forward" in module.__dict__]
    assert all(torch.equal(net(input_ids=ids).logits, logits) for net, logits in zip((network, other), expected, strict=True))
    assert [sum(p.untyped_storage().nbytes() for p in net.parameters()) for net in (network, other)] == sizes


def raising(*_):
    raise RuntimeError("a fault of the trial")


def test_one_network_is_no_pair():
    first = lm(tiny_model("llama", 1))
    assert not share_passes(first, first.sharing("second"))


def test_models_that_have_begun_to_read_stay_as_they_are(llama):
    first, second = lm(tiny_model("llama", 1)), lm(tiny_model("llama", 2))
    row = second.open_row([1, 2])
    assert not share_passes(first, second)
    second.model.free(row)
    assert share_passes(first, second)


@pytest.mark.parametrize(
    ("mixed", "near"),
    [
        (lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x.flatten(0, 1))) * self.up_proj(x.flatten(0, 1))).view_as(x), False),
        (lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x.flip(0))) * self.up_proj(x.flip(0))).flip(0), True),
        (lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x)) * torch.nn.functional.linear(x, self.up_proj.weight)), False),
    ],
    ids=["all tokens in one list", "rows in another order", "weights without their module"],
)
@pytest.mark.parametrize("alike", [False, True])
def test_networks_that_mix_rows_or_go_around_modules_are_found(mixed, near, alike, monkeypatch):
    """By a trial, also where both have the same weights, so that outputs tell nothing (``near``: then it does not matter)."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    monkeypatch.setattr(LlamaMLP, "forward", mixed)
    first, second = lm(tiny_model("llama", 1)), lm(tiny_model("llama", 1 if alike else 2))
    expected = [naive.outputs(one.network, [5, 6, 7])[-1] for one in (first, second)]
    assert share_passes(first, second) is (alike and near)
    for one, want in zip((first, second), expected, strict=True):
        torch.testing.assert_close(reading(one), want, atol=1e-4, rtol=1e-4)


# Others


@pytest.mark.parametrize("dropped", ["tuned", "untuned"])
def test_when_one_goes_the_other_stays_right(dropped, llama):
    networks = SharedNetworks()
    lms = {name: networks.load(str(llama / name), name, FLOAT32) for name in ("untuned", "tuned")}
    networks.share_passes(lms["untuned"], lms["tuned"])
    assert lms["tuned"].model is lms["untuned"].model
    del lms[dropped], networks
    gc.collect()
    ((name, left),) = lms.items()
    alone = SharedNetworks().load(str(llama / name), name, FLOAT32)
    assert torch.equal(reading(left), reading(alone))


def test_other_readers_of_a_network_follow_it(llama):
    """Two roles with one network: both read it in the shared passes."""
    networks = SharedNetworks()
    untuned, tuned, again = (networks.load(str(llama / name), name, FLOAT32) for name in ("untuned", "tuned", "tuned"))
    networks.share_passes(untuned, tuned)
    assert again.model is tuned.model is untuned.model and again.weights == tuned.weights != untuned.weights


def test_a_network_with_an_adapter(llama, tmp_path):
    """One that has adapters is read separately; one that shares passes is not given any: it is loaded anew."""
    peft = pytest.importorskip("peft")
    made = peft.get_peft_model(tiny_model("llama", 2, context=128, hidden=32), peft.LoraConfig(r=4, target_modules="all-linear"))
    torch.manual_seed(5)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    made.save_pretrained(tmp_path / "adapter")
    ref = ModelRef(path=str(llama / "untuned"), adapter=str(tmp_path / "adapter"))
    alone = SharedNetworks().load(ref, "alone", FLOAT32)
    for first in (True, False):
        networks = SharedNetworks()
        adapted = networks.load(ref, "adapted", FLOAT32) if first else None
        untuned, tuned = (networks.load(str(llama / name), name, FLOAT32) for name in ("untuned", "tuned"))
        share_pair_passes([ImplicitValue(tuned, untuned)], networks)
        assert (tuned.model is untuned.model) == (not first)
        adapted = networks.load(ref, "adapted", FLOAT32) if adapted is None else adapted
        assert isinstance(untuned.model.row_weights, StackedNetworks) == (not first)
        for one, path in ((adapted, None), (untuned, "untuned"), (tuned, "tuned")):
            expected = alone if path is None else SharedNetworks().load(str(llama / path), "plain", FLOAT32)
            torch.testing.assert_close(reading(one), reading(expected), atol=1e-4, rtol=1e-4)


def test_the_benchmark_compares_the_two():
    models = [shared_passes.load(together=together) for together in (False, True)]
    assert [len({lm.model for lm in model.values["implicit"].cached_lms()}) for model in models] == [2, 1]
    apart, together = (shared_passes.measure(model, "eft", 2, 6, seed=1)[1] for model in models)
    assert apart == together and all(len(tokens) == 6 for tokens in apart)
