"""One set of weights for several models: equal paths, instructions of their own, and PEFT adapters that are switched for each pass."""

import json
import re
import shutil

import pytest
import torch

import naive
from benchmarks import one_network
from ivg import GuidedModel
from ivg.diagnostics.cost import parameters
from ivg.errors import ConfigError, MissingDependencyError, ModelError
from ivg.factory.engines import inner_guides
from ivg.factory.recipe import default_sampling, load_models
from ivg.models.hub import adapter_at
from ivg.models.loading import LoadOptions
from ivg.models.shared import SharedNetworks
from ivg.search.methods import get_method
from ivg.settings.models import ModelRef
from ivg.settings.recipe import Recipe
from ivg.testing import byte_tokenizer, tiny_model
from ivg.values.implicit import ImplicitValue

peft = pytest.importorskip("peft", reason="no peft: pip install -c constraints.txt -e '.[train]'")

FLOAT32 = LoadOptions(device="cpu", dtype="float32")
PROMPTS = ["The movie was", "I", "What a long prompt this one is"]
KIND = "Be kind."
EXACT = {"dtype": "float32", "device": "cpu"}


def write_adapter(folder, base, seed, **settings):
    """A LoRA adapter with random weights that move the outputs."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **settings})
    made = peft.get_peft_model(network, config)
    for name, parameter in made.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """base, other (two networks), adapter, second (of base), scaled (merged by hand at 0.5), merged."""
    folder = tmp_path_factory.mktemp("hub")
    for seed, name in enumerate(("base", "other")):
        tiny_model("llama", seed + 1, context=128).save_pretrained(folder / name)
        byte_tokenizer(chat=True).save_pretrained(folder / name)
    write_adapter(folder / "adapter", folder / "base", 5)
    write_adapter(folder / "second", folder / "base", 6)
    from transformers import AutoModelForCausalLM

    for name, scale in (("merged", 1.0), ("scaled", 0.5), ("second-merged", 1.0)):
        network = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        with_adapter = peft.PeftModel.from_pretrained(network, folder / ("second" if "second" in name else "adapter"))
        for module in with_adapter.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                module.scaling = {key: value * scale for key, value in module.scaling.items()}
        with_adapter.merge_and_unload().save_pretrained(folder / name)
        byte_tokenizer(chat=True).save_pretrained(folder / name)
    return folder


def weights(model):
    """Bytes of distinct storages of all networks, and whether every tensor of the base is among each reader's."""
    found = {}
    for lm in model.readers:
        for tensor in (*lm.network.parameters(), *lm.network.buffers()):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(found.values())


def answers(model, method="eft", **settings):
    done = model.generate(PROMPTS, method, seed=3, temperature=1.0, max_new_tokens=8, **settings)
    assert all(runner.live_rows == 0 for runner in {lm.model for lm in model.readers})
    return [c.token_ids for c in done]


# Equal paths


def test_models_of_one_path_are_one_network(hub):
    base, tuned = str(hub / "base"), ModelRef(path=str(hub / "base"), system=KIND)
    model = GuidedModel.from_pretrained(base, tuned=tuned, untuned=base, options=FLOAT32)
    alone = GuidedModel.from_pretrained(base, options=FLOAT32)
    assert len({id(lm.model) for lm in model.readers}) == 1
    assert [lm.name for lm in model.readers[:3]] == ["base", "tuned", "untuned"]
    assert weights(model) == weights(alone)
    assert answers(model) == answers(alone, "contrast", contrast=KIND)


def test_other_options_are_another_network(hub):
    networks, base = SharedNetworks(), hub / "base"
    first = networks.load(base, "base", FLOAT32)
    assert networks.load(str(base), "tuned", LoadOptions(device="cpu", dtype="float32"), "{prompt}").model is first.model
    assert networks.load(base, "tuned", LoadOptions(device="cpu", dtype="bfloat16")).model is not first.model
    assert networks.load(ModelRef(path=str(base), attention="eager"), "tuned", FLOAT32).model is not first.model
    assert networks.load(hub / "other", "tuned", FLOAT32).model is not first.model


def test_a_recipe_shares_with_named_values(hub):
    base = str(hub / "base")
    recipe = Recipe.parse(
        {
            "models": {"base": base, "tuned": {"path": base, "system": KIND}, "untuned": base},
            "values": {"rude": {"tuned": {"path": base, "system": "Be rude."}, "untuned": {"path": base}}, "writer": {"arm": base}},
            "run": EXACT,
        }
    )
    model = load_models(recipe)
    assert len({id(lm.model) for lm in model.readers}) == 1
    made = get_method("custom", weights={"implicit": 1.0, "rude": -0.5})
    ids = byte_tokenizer()
    kind, rude = (naive.Contrast(model.base.network, ids(f"{text}\n\n").input_ids, []) for text in (KIND, "Be rude."))

    class Both(naive.Implicit):
        def __init__(self):
            pass

        def deltas(self, prompt, y):
            return kind.deltas(prompt, y) - 0.5 * rude.deltas(prompt, y)

    expected = [
        naive.search(model.base.network, {"both": Both()}, get_method("custom", token="both"), ids(p).input_ids, 3, 1.0, 8)[0]
        for p in PROMPTS
    ]
    assert [list(tokens) for tokens in answers(model, made)] == expected


# Adapters


def merged(hub, tuned, method="eft", **settings):
    return answers(GuidedModel.from_pretrained(hub / "base", tuned=hub / tuned, untuned=hub / "base", options=FLOAT32), method, **settings)


@pytest.mark.parametrize(("scale", "tuned"), [(None, "merged"), (0.5, "scaled")])
@pytest.mark.parametrize("settings", [{}, {"draft": 3}, {"select": "implicit", "successors": 3, "chunk_length": 3, "beta": 0.5}])
def test_an_adapter_equals_the_merged_model(hub, scale, tuned, settings):
    base = str(hub / "base")
    guide = ModelRef(path=base, adapter=str(hub / "adapter"), scale=scale)
    model = GuidedModel.from_pretrained(base, tuned=guide, untuned=base, options=FLOAT32)
    assert answers(model, **settings) == merged(hub, tuned, **settings) != merged(hub, "base", **settings)


def test_an_adapter_adds_its_own_weights_alone(hub):
    base, guide = str(hub / "base"), ModelRef(path=str(hub / "base"), adapter=str(hub / "adapter"))
    alone = weights(GuidedModel.from_pretrained(base, options=FLOAT32))
    model = GuidedModel.from_pretrained(base, tuned=guide, untuned=base, options=FLOAT32)
    three = GuidedModel.from_pretrained(base, tuned=hub / "merged", untuned=hub / "other", options=FLOAT32)
    own = sum(p.numel() * 4 for name, p in model.base.network.named_parameters() if "lora_" in name)
    assert weights(model) == alone + own
    assert own < alone / 4
    assert weights(three) == 3 * alone
    counted = parameters(model)
    assert counted["base"] == counted["untuned"] == parameters(three)["base"]
    assert counted["tuned"] == counted["base"] + own // 4
    pointers = {p.data_ptr() for name, p in model.values["implicit"].tuned.network.named_parameters() if "lora_" not in name}
    assert pointers == {p.data_ptr() for name, p in model.values["implicit"].untuned.network.named_parameters() if "lora_" not in name}


def test_several_adapters_of_one_network(hub):
    base = str(hub / "base")
    recipe = Recipe.parse(
        {
            "models": {"base": base, "tuned": {"path": base, "adapter": str(hub / "adapter")}, "untuned": base},
            "values": {
                "half": {"tuned": {"path": base, "adapter": str(hub / "adapter"), "scale": 0.5}, "untuned": {"path": base}},
                "second": {"tuned": {"path": base, "adapter": str(hub / "second")}, "untuned": {"path": base}},
                "writer": {"arm": str(hub / "second")},
            },
            "run": EXACT,
        }
    )
    model = load_models(recipe)
    assert len({id(lm.network) for lm in model.readers}) == 1
    assert answers(model) == merged(hub, "merged")
    assert answers(model, "custom", token="half") == merged(hub, "scaled")
    assert answers(model, "custom", token="second") == merged(hub, "second-merged")
    writer = GuidedModel.from_pretrained(hub / "base", arm=hub / "second-merged", options=FLOAT32)
    assert answers(model, "custom", token="writer", normalise=True) == answers(writer, "genarm")
    assert answers(model, "base") == answers(writer, "base")
    assert answers(model, "contrast", contrast=KIND) == answers(writer, "contrast", contrast=KIND)
    assert answers(model) == merged(hub, "merged")


def test_the_base_may_have_an_adapter(hub):
    guide = ModelRef(path=str(hub / "base"), adapter=str(hub / "adapter"))
    model = GuidedModel.from_pretrained(guide, tuned=guide, untuned=hub / "base", options=FLOAT32)
    other = GuidedModel.from_pretrained(hub / "merged", tuned=hub / "merged", untuned=hub / "base", options=FLOAT32)
    assert answers(model, beta=0.7) == answers(other, beta=0.7)
    assert answers(model, "contrast", contrast=KIND) == answers(other, "contrast", contrast=KIND)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_adapter_of_packed_weights(dtype, hub, tmp_path, monkeypatch):
    from ivg.models import kernels, packed_linear

    if not kernels.has_packed_linear(getattr(torch, dtype)):
        pytest.skip(f"this PyTorch does not pack {dtype} on this CPU")
    monkeypatch.setattr(kernels, "has_packed_linear", lambda kind: str(kind) == f"torch.{dtype}")
    monkeypatch.setitem(packed_linear.MIN_WEIGHTS, torch.float32, 0)
    base, options = str(hub / "base"), LoadOptions(device="cpu", dtype=dtype)
    networks = SharedNetworks()
    first = networks.load(base, "base", options)
    assert packed_linear.packed_layers(first.network)
    guide = networks.load(ModelRef(path=base, adapter=str(hub / "adapter")), "tuned", options)
    assert guide.network is first.network
    assert packed_linear.packed_layers(first.network), "packed again around the adapter"
    assert not [name for name, layer in first.network.named_modules() if "lora_" in name and hasattr(layer, "packed")]
    other = ModelRef(path=base, adapter=str(write_adapter(tmp_path / "dora", hub / "base", 9, use_dora=True)))
    networks.load(other, "dora", options)
    assert not packed_linear.packed_layers(first.network), "another kind than LoRA reads plain weights"
    assert guide.model is first.model


# Directories


def test_a_bare_adapter_finds_its_network(hub, tmp_path, monkeypatch):
    for named, place in (("../base", "inside/adapter"), ("base", "elsewhere/adapter"), (str(hub / "base"), "adapter")):
        root = tmp_path / place.partition("/")[0]
        folder = tmp_path / place
        shutil.copytree(hub / "adapter", folder)
        if named == "../base":
            shutil.copytree(hub / "base", root / "base")
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": named}))
        monkeypatch.chdir(hub)
        model = GuidedModel.from_pretrained(hub / "base", tuned=folder, untuned=hub / "base", options=FLOAT32)
        assert answers(model) == merged(hub, "merged")
        shared = model.values["implicit"].tuned.network is model.base.network
        assert shared == (named != "../base")


def test_a_tokenizer_beside_the_adapter_is_used(hub, tmp_path):
    folder = shutil.copytree(hub / "adapter", tmp_path / "adapter")
    other = byte_tokenizer(chat=True)
    other.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    other.save_pretrained(folder)
    networks = SharedNetworks()
    with_own = networks.load(ModelRef(path=str(hub / "base"), adapter=str(folder)), "tuned", FLOAT32)
    without = networks.load(ModelRef(path=str(hub / "base"), adapter=str(hub / "adapter")), "tuned", FLOAT32)
    assert with_own.tokenizer.chat_template == other.chat_template
    assert without.tokenizer is networks.load(hub / "base", "base", FLOAT32).tokenizer
    ImplicitValue(with_own, without)


def test_a_recipe_finds_adapters_beside_it(hub):
    (hub / "recipe.toml").write_text(
        '[models]\nbase = "base"\ntuned = { path = "base", adapter = "adapter", scale = 0.5 }\nuntuned = "base"\n'
        '[run]\ndtype = "float32"\ndevice = "cpu"\n'
    )
    assert answers(load_models(Recipe.load(hub / "recipe.toml"))) == merged(hub, "scaled")


# The hub


@pytest.fixture
def cached(hub, tmp_path, monkeypatch):
    """The hub's cache with org/net and org/lora, an adapter of it, as the hub's client lays them out; nobody can be reached."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name, source in (("net", "base"), ("lora", "adapter")):
        place = tmp_path / f"models--org--{name}"
        for branch in ("main", *(["v2"] if name == "net" else [])):  # the adapter has no v2: a revision is the network's
            (place / "refs").mkdir(parents=True, exist_ok=True)
            (place / "refs" / branch).write_text(f"abc{branch}")
            shutil.copytree(hub / source, place / "snapshots" / f"abc{branch}")
    lora = tmp_path / "models--org--lora" / "snapshots" / "abcmain"
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/net"}))
    return lora


@pytest.mark.parametrize(
    "tuned",
    [
        {"path": "org/net", "adapter": "org/lora"},
        {"path": "org/net", "adapter": "org/lora", "revision": "v2"},
        {"path": "org/lora"},
        {"path": "org/lora", "revision": "v2"},
    ],
    ids=["adapter", "adapter-revision", "path", "path-revision"],
)
def test_adapters_of_the_hub_are_read_from_its_cache(hub, cached, tuned):
    model = GuidedModel.from_pretrained("org/net", tuned=ModelRef(**tuned), untuned="org/net", options=FLOAT32)
    assert answers(model) == merged(hub, "merged")
    shared = model.values["implicit"].tuned.network is model.base.network
    assert shared == (tuned.get("revision") != "v2")


def test_adapters_of_the_hub_in_recipes_and_on_the_command_line(hub, cached, ivg):
    recipe = Recipe.parse({"models": {"base": "org/net", "tuned": "org/lora", "untuned": "org/net"}, "run": EXACT})
    assert answers(load_models(recipe)) == merged(hub, "merged")
    (cached.parents[2] / "models--org--net" / "snapshots" / "abcmain" / "generation_config.json").write_text('{"top_k": 7}')
    assert default_sampling(Recipe.parse({"models": {"base": "org/lora"}})).top_k == 7
    settings = ["--base", "org/net", "--untuned", "org/net", "--dtype", "float32", "--max-new-tokens", 4]
    texts = [
        ivg("generate", "The movie was", *settings, *tuned)
        for tuned in (["--tuned", "org/lora"], ["--tuned", "org/net", "--adapter", "tuned=org/lora"])
    ]
    assert texts[0][0] == 0 and texts[0][1] == texts[1][1], texts
    code, _, err = ivg("generate", "The movie was", *settings, "--tuned", "org/net", "--adapter", "tuned=org/none")
    assert code == 2 and "cannot load the adapter of tuned 'org/none': no such directory here, not in the hub's cache, and HF_HUB" in err


def test_adapters_are_downloaded_where_the_hub_can_be_reached(hub, cached, monkeypatch):
    asked = []

    def download(name, **settings):
        asked.append((name, settings))
        return str(cached)

    monkeypatch.setattr("ivg.models.hub.reachable", lambda: True)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    options = LoadOptions(device="cpu", dtype="float32", revision="v2", extra={"token": "abc"})
    networks, found = SharedNetworks(), ModelRef(path=str(hub / "base"), adapter="org/lora")
    lm = networks.load(found, "tuned", options)
    assert lm.model is networks.load(ModelRef(path=str(hub / "base"), adapter=str(cached)), "tuned", options).model
    assert [name for name, _ in asked] == ["org/lora"] and asked[0][1]["token"] == "abc"
    assert "revision" not in asked[0][1] and "*.safetensors" in asked[0][1]["allow_patterns"]
    assert adapter_at("org/lora") == cached and adapter_at("org/net") is None


# Errors


def ref(hub, adapter="adapter", **settings):
    return ModelRef(path=str(hub / "base"), adapter=str(adapter if "/" in str(adapter) else hub / adapter), **settings)


def test_without_peft_the_error_names_the_extra(hub, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        MissingDependencyError, match=re.escape("tuned is a PEFT adapter, and the package peft is not installed\n  pip")
    ) as e:
        SharedNetworks().load(ref(hub), "tuned", FLOAT32)
    assert "ivg[train]" in str(e.value)


def test_what_cannot_be_switched_exactly_is_refused(hub, tmp_path):
    cases = {
        "bias": ({"bias": "lora_only"}, {}, ModelError, "trained biases of the network"),
        "pissa": ({"init_lora_weights": "pissa"}, {}, ModelError, r"changes the network itself \(init_lora_weights='pissa'\)"),
        "olora": ({"init_lora_weights": "olora"}, {}, ModelError, "changes the network itself"),
        "modules": ({"modules_to_save": ["lm_head"]}, {"scale": 0.5}, ConfigError, "holds whole modules .* which scale=0.5 does not reach"),
    }
    for name, (settings, own, error, message) in cases.items():
        folder = write_adapter(tmp_path / name, hub / "base", 7, **settings)
        with pytest.raises(error, match=message):
            SharedNetworks().load(ref(hub, folder, **own), "tuned", FLOAT32)


def test_modules_to_save_are_switched_too(hub, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = write_adapter(tmp_path / "adapter", hub / "base", 7, modules_to_save=["lm_head"])
    network = AutoModelForCausalLM.from_pretrained(hub / "base", dtype=torch.float32)
    whole = peft.PeftModel.from_pretrained(network, folder).merge_and_unload()
    whole.save_pretrained(tmp_path / "merged")
    byte_tokenizer(chat=True).save_pretrained(tmp_path / "merged")
    model = GuidedModel.from_pretrained(hub / "base", tuned=ref(hub, folder), untuned=hub / "base", options=FLOAT32)
    other = GuidedModel.from_pretrained(hub / "base", tuned=tmp_path / "merged", untuned=hub / "base", options=FLOAT32)
    assert answers(model) == answers(other)


def test_adapters_of_something_else(hub, tmp_path):
    with pytest.raises(ModelError, match=r"is no PEFT adapter: no adapter_config\.json there"):
        SharedNetworks().load(ref(hub, hub / "base"), "tuned", FLOAT32)
    tiny_model("gpt2", 3, context=64).save_pretrained(tmp_path / "gpt2")
    byte_tokenizer().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ModelError, match=r"tuned: the adapter .* does not fit the network"):
        SharedNetworks().load(ModelRef(path=str(tmp_path / "gpt2"), adapter=str(hub / "adapter")), "tuned", FLOAT32)
    folder = shutil.copytree(hub / "adapter", tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/nowhere/base"}))
    with pytest.raises(ModelError, match=r"is of '/nowhere/base', which is not there\n  give \{ path = NETWORK, adapter = ADAPTER \}"):
        SharedNetworks().load(folder, "tuned", FLOAT32)
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj"], "base_model_name_or_path": ""}))
    with pytest.raises(ModelError, match="does not name its network"):
        SharedNetworks().load(folder, "tuned", FLOAT32)
    with pytest.raises(ModelError, match=r"does not fit the network: .* weights differ"):
        SharedNetworks().load(ref(hub, folder), "tuned", FLOAT32)


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({"tuned": {"path": "x", "scale": 0.5}}, "models.tuned: scale is the factor of an adapter"),
        ({"value": {"path": "x", "scale": 2.0}}, "models.value: scale is the factor of an adapter"),
        ({"reward": {"path": "x", "system": "y"}}, "models: reward.system: only language models have it"),
        ({"tuned": {"path": "x", "system": " "}}, "system must be some text"),
    ],
)
def test_settings_that_make_no_sense(models, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Recipe.parse({"models": models})


def test_a_smaller_network_reads_the_instructions(hub):
    recipe = {"models": {"base": str(hub / "base")}, "values": {"contrast": {"contrast": str(hub / "other")}}, "run": EXACT}
    model = load_models(Recipe.parse(recipe))
    made, other = get_method("contrast", contrast=KIND, beta=1.5), model.values["contrast"].tuned.network
    assert other is not model.base.network
    prefix = byte_tokenizer()(f"{KIND}\n\n").input_ids
    for prompt, tokens in zip(PROMPTS, answers(model, made), strict=True):
        ids = byte_tokenizer()(prompt).input_ids
        expected, _ = naive.search(model.base.network, {"contrast": naive.Contrast(other, prefix, [])}, made, ids, 3, 1.0, 8)
        assert list(tokens) == expected
    with pytest.raises(ConfigError, match=r"values.kind: .*\n  call the table \[values.contrast\]"):
        load_models(Recipe.parse(recipe | {"values": {"kind": {"contrast": str(hub / "other")}}}))


# The command line, and other engines


def test_on_the_command_line(ivg, hub):
    base = str(hub / "base")
    common = ["--untuned", base, "--method", "eft", "--seed", 3, "--max-new-tokens", 8, "--dtype", "float32", "--device", "cpu"]
    texts = []
    for tuned in (
        ["--tuned", base, "--adapter", f"tuned={hub / 'adapter'}", "--adapter-scale", "tuned=0.5"],
        ["--tuned", str(hub / "scaled")],
        ["--tuned", str(hub / "adapter")],
        ["--tuned", str(hub / "merged")],
        ["--tuned", base, "--system", f"tuned={KIND}"],
    ):
        code, out, err = ivg("generate", "The movie was", "--base", base, *tuned, *common)
        assert code == 0, err
        texts.append(out)
    assert texts[0] == texts[1] != texts[2] == texts[3] != texts[4]
    code, out, _ = ivg("generate", "The movie was", "--base", str(hub / "adapter"), "--method", "base", *common[4:])
    assert code == 0
    assert ivg("generate", "The movie was", "--base", str(hub / "merged"), "--method", "base", *common[4:])[1] == out


def test_a_pair_of_one_model_is_noted(ivg, hub):
    base = str(hub / "base")
    common = ["generate", "The", "--base", base, "--tuned", base, "--untuned", base, "--max-new-tokens", 2]
    said = "note: tuned and untuned are the same model: the implicit value is 0 everywhere"
    assert said in ivg(*common)[2]
    for more in (["--system", f"tuned={KIND}"], ["--adapter", f"tuned={hub / 'adapter'}"]):
        code, _, err = ivg(*common, *more)
        assert code == 0 and said not in err


@pytest.mark.parametrize("own", [{"system": KIND}, {"adapter": "adapter"}])
def test_other_engines_refuse(hub, own):
    base = {"path": str(hub / "base")}
    own = {name: str(hub / text) if name == "adapter" else text for name, text in own.items()}
    if "system" in own:
        for role, what in (("base", "base"), ("tuned", "tuned of implicit")):
            models = {"base": base, "tuned": base, "untuned": base} | {role: base | own}
            with pytest.raises(ConfigError, match=rf"{what} has system = .*; inside vLLM .*\n  use the transformers engine"):
                inner_guides(Recipe.parse({"models": models, "search": {"method": "eft"}}), FLOAT32, every_guide=False)
    recipe = Recipe.parse({"models": {"base": base | own}, "run": {"engine": "http://127.0.0.1:1/v1"}})
    with pytest.raises(ConfigError, match=rf"base has {next(iter(own))} = .*; on http://127.0.0.1:1/v1"):
        load_models(recipe)


def test_the_benchmark_measures_one_set_of_weights(tmp_path):
    one_network.write(tmp_path, 32, 2)
    for kind in ("instruction", "adapter"):
        (three, tokens), (one, same) = (
            one_network.measure(one_network.load(tmp_path, kind, shared=shared), PROMPTS[:2], 6) for shared in (False, True)
        )
        assert tokens == same
        # tuned reads beside the base; the prompts of one with an instruction are longer, so they have a pass of their own
        assert (three["passes"], one["passes"]) == (18, 7 if kind == "instruction" else 6)
        assert one["weights MB"] < 0.5 * three["weights MB"]
        assert one["keys and values MB"] < three["keys and values MB"]
