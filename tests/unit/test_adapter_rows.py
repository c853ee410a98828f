"""Rows with different adapters in one forward pass: each gives what it gives alone, and what cannot is read in passes of its own."""

import json
import shutil
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ivg.diagnostics.logits import response_beam, response_logits
from ivg.errors import ModelError
from ivg.factory.recipe import load_models
from ivg.models.cached_lm import read_with_guides
from ivg.models.loading import LoadOptions
from ivg.models.row_weights import row_order
from ivg.models.shared import SharedNetworks
from ivg.settings.models import ModelRef
from ivg.settings.recipe import Recipe
from ivg.testing import byte_tokenizer, tiny_model
from ivg.types import Prompt

peft = pytest.importorskip("peft", reason="no peft: pip install -c constraints.txt -e '.[train]'")

FLOAT32 = LoadOptions(device="cpu", dtype="float32")
PROMPTS = ["The movie was", "I", "What a long prompt this one is"]
SIZES = {"max_new_tokens": 8, "temperature": 1.0, "seed": 3}


def write(folder, architecture, **own):
    """``base``, ``first`` and ``second`` (adapters), ``first-merged``, ``second-merged``."""
    network = tiny_model(architecture, 1, context=128)
    network.save_pretrained(folder / "base")
    for seed, name in enumerate(("first", "second"), 5):
        own = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **own}
        made = peft.get_peft_model(tiny_model(architecture, 1, context=128), peft.LoraConfig(**own))
        torch.manual_seed(seed)  # here: tiny_model seeds, too
        for parameter_name, parameter in made.named_parameters():
            if "lora_" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.2)
        made.save_pretrained(folder / name)
        made.merge_and_unload().save_pretrained(folder / f"{name}-merged")
    for name in ("base", "first-merged", "second-merged"):
        byte_tokenizer(chat=True).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write(tmp_path_factory.mktemp("llama"), "llama")


def two_adapters(folder, *, merged):
    """A model with the pairs ``implicit`` (first) and ``second``."""
    base = str(folder / "base")
    tuned = {
        name: {"path": str(folder / f"{name}-merged")} if merged else {"path": base, "adapter": str(folder / name)}
        for name in ("first", "second")
    }
    recipe = {
        "models": {"base": base, "tuned": tuned["first"], "untuned": base},
        "values": {"second": {"tuned": tuned["second"], "untuned": {"path": base}}},
        "run": {"dtype": "float32", "device": "cpu"},
    }
    return load_models(Recipe.parse(recipe))


def passes(model):
    """A list that grows by the number of rows of each forward pass of the base's network."""
    counts = []
    model.base.network.register_forward_pre_hook(lambda _, args, given: counts.append(len(given["input_ids"])), with_kwargs=True)
    return counts


# Exactness


def test_the_two_adapters_differ(llama):
    """Or nothing here could tell which one a row reads with."""
    network, rows = adapter_rows(llama)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        found = []
        for name in (None, "ivg0", "ivg1"):
            with rows.using([name]):
                found.append(network(input_ids=ids).logits)
    assert min((a - b).abs().max() for a, b in ((found[0], found[1]), (found[0], found[2]), (found[1], found[2]))) > 1


@pytest.mark.parametrize(
    ("architecture", "shared"),
    [("llama", True), ("gpt2", True), ("gemma3_text", True), ("mistral", True), ("mixtral", None)],
)
def test_answers_are_those_of_merged_models(architecture, shared, tmp_path):
    folder = write(tmp_path, architecture)
    together, apart = two_adapters(folder, merged=False), two_adapters(folder, merged=True)
    methods = [
        {"method": "eft"},
        {"method": "custom", "token": "second", "beta": 0.5},
        {"method": "eft", "gate": 1.0},
        {"method": "cbs-implicit"},
    ]
    for method in [*methods, {"method": "eft", "draft": 3}]:
        expected = [c.token_ids for c in apart.generate(PROMPTS, **method, **SIZES)]
        assert [c.token_ids for c in together.generate(PROMPTS, **method, **SIZES)] == expected, method
    if shared is not None:
        assert (together.values["implicit"].tuned.model is together.base.model) == shared


def test_requests_with_different_adapters_share_passes(llama):
    """Two tenants and one without guidance, at once: each has the answer that it has alone, and no token costs a second pass."""
    together, apart = two_adapters(llama, merged=False), two_adapters(llama, merged=True)

    def requests(model):
        kinds = [{"method": "eft"}, {"method": "custom", "token": "second"}, {"method": "base"}, {"method": "eft", "beta": 0.3}]
        return [model.request("The movie was", **kind, seed=i, max_new_tokens=8, ignore_eos=True) for i, kind in enumerate(kinds)]

    expected = {i: next(apart.searcher().run([request]))[1].token_ids for i, request in enumerate(requests(apart))}
    list(together.searcher().run(requests(together)))
    together.reset_caches()
    counts = passes(together)
    found = {i: c.token_ids for i, c in together.searcher().run(requests(together))}
    assert found == expected
    # a pass for the prompt, which all but one of the requests copy, then one for each token: four of the base and three of the adapters
    assert counts[-7:] == [7] * 7 and len(counts) <= 8 + 3
    assert together.base.model.live_rows == 0


@given(names=st.lists(st.sampled_from([None, "ivg0", "ivg1"]), min_size=1, max_size=6), length=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_each_row_reads_as_alone(names, length, llama):
    network, rows = adapter_rows(llama)
    names = sorted(names, key=row_order)
    ids = torch.arange(len(names) * length).view(len(names), length) % 257
    with torch.no_grad(), rows.using(names):
        together = network(input_ids=ids, use_cache=False).logits
    for place, name in enumerate(names):
        with torch.no_grad(), rows.using([name]):
            alone = network(input_ids=ids[place : place + 1], use_cache=False).logits[0]
        torch.testing.assert_close(together[place], alone, atol=1e-4, rtol=1e-4)


def adapter_rows(folder, _made={}):  # noqa: B006 (the cache)
    if folder not in _made:
        networks = SharedNetworks()
        lms = [
            networks.load(ModelRef(path=str(folder / "base"), adapter=str(folder / name)), name, FLOAT32) for name in ("first", "second")
        ]
        assert [lm.open_row([1]).weights for lm in lms] == ["ivg0", "ivg1"]
        _made[folder] = lms[0].network, lms[0].model.row_weights
    return _made[folder]


def test_outside_of_a_pass_no_adapter_acts(llama):
    network, rows = adapter_rows(llama)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        plain = network(input_ids=ids).logits
        with pytest.raises(RuntimeError, match="stop"), rows.using(["ivg0"]):
            assert not torch.equal(network(input_ids=ids).logits, plain)
            raise RuntimeError("stop")
        assert torch.equal(network(input_ids=ids).logits, plain)


def test_diagnostics_read_with_the_adapter(llama):
    """The logits of a given response, as ``ivg check`` compares them."""
    together, apart = two_adapters(llama, merged=False), two_adapters(llama, merged=True)
    found = []
    for model in (together, apart):
        beam = response_beam(model.base, Prompt("The movie was"), " a good one")
        found.append([torch.cat(list(response_logits(lm, beam))) for lm in model.values["implicit"].cached_lms()])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(*found[0])


# What cannot share


@pytest.mark.parametrize("own", [{"use_dora": True}, {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}])
def test_other_kinds_are_read_in_passes_of_their_own(own, tmp_path):
    folder = write(tmp_path, "llama", **own)
    together, apart = two_adapters(folder, merged=False), two_adapters(folder, merged=True)
    assert together.values["implicit"].tuned.model is not together.base.model
    assert together.values["implicit"].tuned.network is together.base.network
    for method in ({"method": "eft"}, {"method": "custom", "token": "second"}):
        expected = [c.token_ids for c in apart.generate(PROMPTS, **method, **SIZES)]
        assert [c.token_ids for c in together.generate(PROMPTS, **method, **SIZES)] == expected


def test_plain_and_other_kinds_of_one_network(llama, tmp_path):
    """One adapter shares the base's passes, the other is switched on for its own; each in turn, and with neither."""
    dora = write(tmp_path, "llama", use_dora=True)
    networks = SharedNetworks()
    base = networks.load(str(llama / "base"), "base", FLOAT32)
    plain = networks.load(ModelRef(path=str(llama / "base"), adapter=str(llama / "first")), "plain", FLOAT32)
    other = networks.load(ModelRef(path=str(llama / "base"), adapter=str(dora / "first")), "other", FLOAT32)
    assert plain.model is base.model is not other.model and other.open_row([1]).weights is None
    alone = [SharedNetworks().load(str(path), "alone", FLOAT32) for path in (llama / "base", llama / "first-merged", dora / "first-merged")]
    for _ in range(2):
        for lm, expected in zip((base, plain, other), alone, strict=True):
            rows = [one.open_row([5, 6, 7]) for one in (lm, expected)]
            got, want = (
                one.model.last_outputs([row], [[5, 6, 7][len(row.ids) :]])[0] for one, row in zip((lm, expected), rows, strict=True)
            )
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
            for one, row in zip((lm, expected), rows, strict=True):
                one.model.free(row)
            lm.reset_cache()


@pytest.mark.parametrize(
    "mixed",
    [lambda plain, x: plain(x.flatten(0, 1)).view_as(x), lambda plain, x: plain(x.flip(0)).flip(0)],
    ids=["all tokens in one list, as experts get them", "rows in another order"],
)
def test_layers_that_mix_the_rows_are_found(mixed, llama, monkeypatch):
    """Of a network that gives a layer other than one row for each text, in order: the trial refuses, and the answers stay right."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    plain = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: mixed(partial(plain, self), x))
    together, apart = two_adapters(llama, merged=False), two_adapters(llama, merged=True)
    assert together.values["implicit"].tuned.model is not together.base.model
    assert [c.token_ids for c in together.generate(PROMPTS, "eft", **SIZES)] == [
        c.token_ids for c in apart.generate(PROMPTS, "eft", **SIZES)
    ]


def test_a_row_keeps_its_adapter(llama):
    """Prompts of other adapters are never taken over, and forks and reopened rows read with the same one."""
    networks = SharedNetworks()
    base = networks.load(str(llama / "base"), "base", FLOAT32)
    first = networks.load(ModelRef(path=str(llama / "base"), adapter=str(llama / "first")), "first", FLOAT32)
    model = base.model
    with_adapter = first.open_row([1, 2, 3, 4])
    model.last_outputs([with_adapter], [[1, 2, 3, 4]])
    model.free(with_adapter)
    assert model.open([1, 2, 3, 4]).ids == []
    again = first.open_row([1, 2, 3, 4])
    assert again.ids == [1, 2, 3] and model.fork(again).weights == first.weights
    model.cache.reopen(again, [9, 9], 0)
    assert again.weights == first.weights


def refused(folder, where, change):
    """A copy of an adapter with other settings, or weights."""
    shutil.copytree(folder, where)
    change(where)
    return where


def without_a_weight(where):
    tensors = load_file(where / "adapter_model.safetensors")
    save_file(dict(list(tensors.items())[1:]), where / "adapter_model.safetensors")


def with_settings(where, **own):
    config = json.loads((where / "adapter_config.json").read_text())
    (where / "adapter_config.json").write_text(json.dumps(config | own))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_a_weight, "1 weights differ"),
        (partial(with_settings, r=8), "does not fit"),
        (partial(with_settings, layer_replication=[[0, 2], [0, 2]]), "repeats layers"),
        (partial(with_settings, alora_invocation_tokens=[1, 2]), "aLoRA"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_refused_adapter_changes_nothing(change, message, first, llama, tmp_path):
    """Neither the base nor an adapter that was loaded before or comes after."""
    networks = SharedNetworks()
    base = networks.load(str(llama / "base"), "base", FLOAT32)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        plain = base.network(input_ids=ids).logits
    good = ModelRef(path=str(llama / "base"), adapter=str(llama / "second"))
    if not first:
        networks.load(good, "tuned", FLOAT32)
    bad = ModelRef(path=str(llama / "base"), adapter=str(refused(llama / "first", tmp_path / "bad", change)))
    with pytest.raises(ModelError, match=message):
        networks.load(bad, "tuned", FLOAT32)
    with torch.no_grad():
        torch.testing.assert_close(base.network(input_ids=ids).logits, plain)
    lm = networks.load(good, "tuned", FLOAT32)
    alone = SharedNetworks().load(str(llama / "second-merged"), "alone", FLOAT32)
    got, expected = (one.model.last_outputs([one.open_row([1, 2, 3])], [[1, 2, 3]]) for one in (lm, alone))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_layers_that_something_else_has_wrapped_are_wrapped_again(llama):
    """accelerate puts its own ``forward`` on modules, and may restore peft's."""
    networks = SharedNetworks()
    refs = {name: ModelRef(path=str(llama / "base"), adapter=str(llama / name)) for name in ("first", "second")}
    network = networks.load(refs["first"], "first", FLOAT32).network
    for layer in network.modules():
        if isinstance(layer, peft.tuners.lora.Linear):
            layer.forward = partial(type(layer).forward, layer)
    second = networks.load(refs["second"], "second", FLOAT32)
    assert second.open_row([1]).weights == "ivg1"
    alone = SharedNetworks().load(str(llama / "second-merged"), "alone", FLOAT32)
    got, expected = (one.model.last_outputs([one.open_row([1, 2, 3])], [[1, 2, 3]]) for one in (second, alone))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


# Reading with the base


def test_guides_that_are_asked_for_other_texts_read_them(llama):
    """A guide whose outputs were read ahead for some hypotheses, asked for others, or for the same ones twice."""
    model = two_adapters(llama, merged=False)
    tuned, base = model.values["implicit"].tuned, model.base
    beams = [base.root(model.request(prompt, "eft").prompt, 4) for prompt in PROMPTS]
    expected = tuned.outputs(beams).clone()
    tuned.release([beam.key for beam in beams])
    read_with_guides(base, beams, {tuned: beams[:2]})
    counts = passes(model)
    assert torch.allclose(tuned.outputs(beams[1:2]), expected[1:2], atol=1e-4) and counts == []
    assert torch.allclose(tuned.outputs(beams[:2]), expected[:2], atol=1e-4) and counts  # one of them was given already
    read_with_guides(base, beams, {tuned: beams})
    counts.clear()
    assert torch.allclose(tuned.outputs(beams[::-1]), expected.flip(0), atol=1e-4) and counts == []


def test_a_spent_budget_of_divergence_reads_no_guide(llama):
    settings = {"kl_budget": 0.05, "candidates": 3, "max_new_tokens": 24, "ignore_eos": True, "seed": 1}
    read = []
    for merged in (False, True):
        done = two_adapters(llama, merged=merged).generate(PROMPTS, "eft", **settings)
        read.append([sum(c.usage.forward_tokens[name] for c in done) for name in ("base", "tuned")])
    assert read[0][1] == read[1][1] < read[0][0] == read[1][0]


def test_a_guide_that_follows_the_base_reads_nothing_ahead(llama):
    model = two_adapters(llama, merged=False)
    done = model.generate("The movie was", "eft", max_new_tokens=6, ignore_eos=True, seed=1)
    read = done.usage.forward_tokens
    assert read["base"] == read["tuned"] and read.get("untuned", 0) == 0


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_no_guide_reads_ahead_where_it_has_no_weight(beta, llama):
    model = two_adapters(llama, merged=False)
    read = model.generate("The movie was", "eft", beta=beta, max_new_tokens=6, ignore_eos=True, seed=1).usage.forward_tokens
    assert bool(read.get("tuned")) == bool(beta)
