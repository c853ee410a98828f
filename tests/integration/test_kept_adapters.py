"""Runs that end with an adapter: small, loaded wherever a model is named, with the outputs of the merged model."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import naive
from ivg import GuidedModel, testing
from ivg.diagnostics.training_overlap import training_overlap
from ivg.errors import ConfigError, ModelError
from ivg.factory.recipe import load_models
from ivg.jobs.fingerprints import fingerprint
from ivg.models.loading import LoadOptions
from ivg.models.slot_cache import SlotCache
from ivg.models.state_cache import StateCache
from ivg.models.training_rows import read_training_rows
from ivg.search.methods import get_method
from ivg.settings.models import ModelRef
from ivg.settings.recipe import Recipe
from ivg.settings.train import DPOSettings, RefineSettings, SFTSettings, TrainSettings, ValueSettings, ValueTrainSettings
from ivg.training.data import RatedResponse, SFTExample
from ivg.types import Preference, Prompt
from ivg.values.base import FunctionValue
from ivg.values.explicit import ExplicitValue
from ivg.values.implicit import ImplicitValue
from ivg.values.reward import RewardModel, load_reward

peft = pytest.importorskip("peft", reason="no peft: pip install -c constraints.txt -e '.[train]'")
pytest.importorskip("trl")
FLOAT32 = LoadOptions(device="cpu", dtype="float32")
LORA = {
    "mode": "lora",
    "lora_r": 4,
    "num_train_epochs": 2,
    "learning_rate": 2e-2,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "eval_share": 0.2,
    "evaluations": 1,
    "trainer_args": {"bf16": False},
}
PAIRS = [Preference(Prompt(f"p{i}"), f"{i}aa", f"{i}bb") for i in range(30)]
RATED = [
    RatedResponse(Prompt(f"p{i // 2}"), text, score, None, False) for i, (text, score) in enumerate(15 * [("aaba", 3.0), ("bbab", 1.0)])
]
TEXTS = ["p99aab", "p98b", "another prompt with aa"]
HEADS = {
    "vocabulary": ValueSettings(),
    "compact": ValueSettings(compact_head=True),
    "scalar": ValueSettings(head="scalar"),
}


def train(kind, model, out, *, keep=True, **more):
    from ivg.training import tune
    from ivg.training.value import train_value

    given = {**LORA, "keep_adapter": keep, **more}
    if kind == "reward":
        return tune.reward(model, PAIRS, out, TrainSettings(**given), sources=["pairs"])
    if kind == "dpo":
        return tune.dpo(model, PAIRS, out, DPOSettings(**given))
    if kind == "sft":
        return tune.sft(model, [SFTExample(p.prompt, p.chosen) for p in PAIRS], out, SFTSettings(**given))
    return train_value(model, RATED, out, ValueTrainSettings(**given), HEADS[kind])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """``model``, and for each kind a run that keeps its adapter and one (``-merged``) that merges it."""
    folder = tmp_path_factory.mktemp("runs")
    network = testing.tiny_model()
    network.config.pad_token_id = network.generation_config.pad_token_id = 7
    network.save_pretrained(folder / "model")
    testing.byte_tokenizer().save_pretrained(folder / "model")
    for kind in ("reward", "dpo", *HEADS):
        train(kind, folder / "model", folder / kind)
        train(kind, folder / "model", folder / f"{kind}-merged", keep=False)
    return folder


def values_of(value):
    reader = testing.tiny_lm()
    hypotheses = [testing.hypothesis("p1", text, reader) for text in ("a", "aab", "bbbab")]
    whole = value.deltas(hypotheses) if value.head == "vocabulary" else torch.zeros(1)
    return torch.tensor(value.score(hypotheses)), whole


def rewards_of(reward):
    return torch.tensor(reward.rewards(TEXTS)[0])


def by_peft(folder, auto_class):
    """The network with the adapter, by peft alone."""
    base = auto_class(json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"])
    return peft.PeftModel.from_pretrained(base, folder).eval()


@pytest.mark.parametrize("kind", ["reward", "dpo", *HEADS])
def test_a_run_holds_the_adapter_alone(runs, kind):
    names = {p.name for p in (runs / kind).iterdir() if not p.name.startswith(".")}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "run.json", "metrics.json", "training_rows.npy"} <= names
    assert not names & {"config.json", "model.safetensors", "tokenizer.json", "adapter", "checkpoints"}
    assert ("head.safetensors" in names) == (kind in HEADS)
    size = sum(p.stat().st_size for p in (runs / kind).glob("*.safetensors"))
    assert size < 70_000 < (runs / f"{kind}-merged" / "model.safetensors").stat().st_size
    assert json.loads((runs / kind / "adapter_config.json").read_text())["base_model_name_or_path"] == str(runs / "model")
    assert json.loads((runs / kind / "run.json").read_text())["keep_adapter"] is True
    assert "keep_adapter" not in json.loads((runs / f"{kind}-merged" / "run.json").read_text())  # as older runs, which resume
    assert "library_name: peft" in (runs / kind / "README.md").read_text()
    assert read_training_rows(runs / kind) is not None


def test_a_reward_is_what_peft_loads_and_near_the_merged_one(runs):
    loaded = RewardModel.from_pretrained(runs / "reward", options=FLOAT32)
    reference = by_peft(runs / "reward", lambda base: AutoModelForSequenceClassification.from_pretrained(base, num_labels=1))
    for text, found in zip(TEXTS, rewards_of(loaded), strict=True):
        with torch.no_grad():
            wanted = reference(input_ids=torch.tensor([loaded.ids(text)])).logits[0, 0]
        assert found.item() == pytest.approx(wanted.item(), abs=1e-5)
    merged = rewards_of(RewardModel.from_pretrained(runs / "reward-merged", options=FLOAT32))
    assert torch.allclose(rewards_of(loaded), merged, atol=0.02)  # of numbers around 1; float16 is what differs
    assert rewards_of(loaded).std() > 0.1
    metrics, before = (json.loads((runs / name / "metrics.json").read_text())["held_out"] for name in ("reward", "reward-merged"))
    assert metrics["eval_accuracy"] == before["eval_accuracy"] and metrics["eval_loss"] == pytest.approx(before["eval_loss"], abs=0.01)


@pytest.mark.parametrize("kind", HEADS)
def test_a_value_is_what_peft_loads_and_near_the_merged_one(runs, kind):
    from safetensors.torch import load_file

    loaded = ExplicitValue.from_pretrained(runs / kind, options=FLOAT32)
    body = by_peft(runs / kind, AutoModel.from_pretrained)
    head = {k: v.float() for k, v in load_file(runs / kind / "head.safetensors").items()}
    if kind == "compact":
        assert set(head) == {"score_head.shared", "score_head.map"}
        weight = head["score_head.shared"] + body.get_input_embeddings().weight @ head["score_head.map"]
    else:
        weight = head["score_head.weight" if kind == "vocabulary" else "score.weight"]
    ids = torch.tensor([loaded.model.tokenizer("p1aab").input_ids])
    with torch.no_grad():
        wanted = body(input_ids=ids).last_hidden_state @ weight.T
        assert torch.allclose(loaded.network(ids).logits, wanted, atol=1e-5)
    merged = ExplicitValue.from_pretrained(runs / f"{kind}-merged", options=FLOAT32)
    for a, b in zip(values_of(loaded), values_of(merged), strict=True):
        assert torch.allclose(a, b, atol=0.02)
    assert loaded.network.notes == merged.network.notes
    assert loaded.card and "Explicit value" in loaded.card


@pytest.fixture(scope="module")
def heads(runs):
    """For each kind of value a run on the frozen network that keeps its head alone, and one that writes the whole model."""
    for kind in HEADS:
        train(kind, runs / "model", runs / f"{kind}-head", mode="head")
        train(kind, runs / "model", runs / f"{kind}-head-whole", mode="head", keep=False)
    return runs


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_alone_is_the_whole_value(heads, kind):
    folder = heads / f"{kind}-head"
    names = {p.name for p in folder.iterdir()}
    assert {"head.safetensors", "head_config.json", "README.md", "run.json", "metrics.json"} <= names
    assert not names & {"config.json", "model.safetensors", "adapter_config.json", "tokenizer.json", "checkpoints"}
    assert "library_name: transformers" in (folder / "README.md").read_text()
    found = ExplicitValue.from_pretrained(folder, options=FLOAT32)
    whole = ExplicitValue.from_pretrained(heads / f"{kind}-head-whole", options=FLOAT32)
    for a, b in zip(values_of(found), values_of(whole), strict=True):
        assert torch.allclose(a, b, atol=0.02)  # float16 is what differs
    assert values_of(found)[0].abs().max() > 0.05
    assert found.network.notes == whole.network.notes
    body, plain = found.network.backbone.state_dict(), AutoModel.from_pretrained(heads / "model").state_dict()
    assert all(torch.equal(body[name], tensor) for name, tensor in plain.items())


@pytest.mark.parametrize("kind", ["vocabulary", "compact"])
def test_a_head_alone_guides_as_without_a_cache(heads, kind):
    guides_as_without_a_cache(heads / "model", heads / f"{kind}-head", SlotCache)


def test_a_head_alone_is_known_by_its_network(heads, tmp_path):
    """Its network is part of its fingerprint; it may be named in the recipe; as a language model or in place of itself it is refused."""
    folder = tmp_path / "head"
    shutil.copytree(heads / "scalar-head", folder)
    before = fingerprint(str(folder))
    shutil.copytree(heads / "model", tmp_path / "other")
    other = testing.tiny_model(seed=5)
    other.save_pretrained(tmp_path / "other")
    config = json.loads((folder / "head_config.json").read_text())
    (folder / "head_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "other")}))
    assert fingerprint(str(folder)) != before
    given = {"base": str(heads / "model"), "value": {"path": str(heads / "model"), "adapter": str(folder)}}
    named = load_models(Recipe.parse({"models": given, "run": {"dtype": "float32"}}))
    first = ExplicitValue.from_pretrained(heads / "scalar-head", options=FLOAT32)
    assert torch.allclose(values_of(named.values["explicit"])[0], values_of(first)[0])
    with pytest.raises(ModelError, match="not of a language model\n  give it as --value"):
        GuidedModel.from_pretrained(heads / "scalar-head")
    with pytest.raises(ConfigError, match="is an adapter"):
        train("scalar", heads / "scalar-head", tmp_path / "again")
    (folder / "head_config.json").write_text(json.dumps({"ivg_value": {"head": "scalar"}}))
    with pytest.raises(ModelError, match="does not name its network"):
        ExplicitValue.from_pretrained(folder)


def guides_as_without_a_cache(folder, value, cache):
    settings = {"token": "explicit", "width": 2, "successors": 2, "chunk_length": 3, "beta": 0.5}
    model = GuidedModel.from_pretrained(folder, value=value, options=FLOAT32)
    explicit = model.values["explicit"]
    ids = testing.byte_tokenizer()("p1").input_ids
    reference = {"explicit": naive.QHead(explicit.network)}
    wanted, *_ = naive.search(model.base.network, reference, get_method("ivg", **settings), ids, 3, 1.0, 8)
    done = model.generate("p1", "ivg", seed=3, temperature=1.0, max_new_tokens=8, **settings)
    assert isinstance(explicit.model.model.cache, cache)
    assert list(done.token_ids) == list(wanted)


@pytest.mark.parametrize("kind", ["vocabulary", "compact"])
def test_a_value_guides_as_without_a_cache(runs, kind):
    guides_as_without_a_cache(runs / "model", runs / kind, SlotCache)


def test_a_value_guides_as_without_a_cache_where_it_is_transformers_own(tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model("bloom", vocab_size=257, hidden_size=32, n_layer=2, n_head=4, eos_token_id=0, pad_token_id=0)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(tmp_path / "model")
    testing.byte_tokenizer().save_pretrained(tmp_path / "model")
    train("vocabulary", tmp_path / "model", tmp_path / "value")
    guides_as_without_a_cache(tmp_path / "model", tmp_path / "value", StateCache)


def test_they_load_wherever_a_model_is_named(runs):
    base = str(runs / "model")
    exact = {"dtype": "float32", "device": "cpu"}
    direct = Recipe.parse({"models": {"base": base, "value": str(runs / "scalar"), "reward": str(runs / "reward")}, "run": exact})
    named = {"value": {"path": base, "adapter": str(runs / "scalar")}, "reward": {"path": base, "adapter": str(runs / "reward")}}
    for recipe in (direct, Recipe.parse({"models": {"base": base, **named}, "run": exact})):
        model = load_models(recipe)
        assert torch.equal(
            values_of(model.values["explicit"])[0], values_of(ExplicitValue.from_pretrained(runs / "scalar", options=FLOAT32))[0]
        )
        assert torch.equal(rewards_of(model.values["reward"]), rewards_of(RewardModel.from_pretrained(runs / "reward", options=FLOAT32)))
    more = {"kind": {"value": named["value"]}, "good": {"reward": named["reward"]}}
    model = load_models(Recipe.parse({"models": {"base": base}, "values": more, "run": exact}))
    assert {"kind", "good"} <= set(model.values)
    half = load_reward(base, options=FLOAT32.of(ModelRef(path=base, adapter=str(runs / "reward"))))
    assert torch.equal(rewards_of(half), rewards_of(load_reward(runs / "reward", options=FLOAT32)))


def test_rows_that_it_was_trained_on_are_known(runs):
    pair = [Preference(Prompt("p1"), "1aa", "1bb"), Preference(Prompt("other"), "1aa", "1bb")]
    found = training_overlap(RewardModel.from_pretrained(runs / "reward", options=FLOAT32), pair)
    assert found.seen.tolist() == [True, False] and not found.unknown
    found = training_overlap(ExplicitValue.from_pretrained(runs / "compact", options=FLOAT32), [Preference(Prompt("p1"), "aaba", "x")])
    assert found.seen.tolist() == [True] and not found.unknown
    tuned = ImplicitValue.from_pretrained(runs / "dpo", runs / "model", options=FLOAT32)  # the network itself has no fingerprints
    assert training_overlap(tuned, pair).seen.tolist() == [True, False]


def test_a_reward_is_a_scalar_value(runs):
    value = ExplicitValue.from_pretrained(runs / "reward", options=FLOAT32)
    reward = RewardModel.from_pretrained(runs / "reward", options=FLOAT32)
    h = testing.hypothesis("p1", "aab", testing.tiny_lm())
    assert value.head == "scalar"
    assert value.score([h])[0] == pytest.approx(reward.rewards(["p1aab"])[0][0], abs=1e-5)


def test_a_tuned_guide_shares_the_network(runs):
    model = GuidedModel.from_pretrained(runs / "model", tuned=str(runs / "dpo"), untuned=runs / "model", options=FLOAT32)
    assert len({id(lm.network) for lm in model.readers}) == 1
    merged = GuidedModel.from_pretrained(runs / "model", tuned=runs / "dpo-merged", untuned=runs / "model", options=FLOAT32)
    h = testing.hypothesis("p1", "aa", testing.tiny_lm())
    assert model.values["implicit"].score([h])[0] == pytest.approx(merged.values["implicit"].score([h])[0], abs=0.02)


def test_names_are_kept_so_that_the_directory_travels(tmp_path, monkeypatch, runs):
    """An added model under its name, found in the cache of whichever machine."""
    for cache in ("here", "there"):
        place = tmp_path / cache / "models" / "smollm2"
        shutil.copytree(runs / "model", place)
    monkeypatch.setenv("IVG_CACHE", str(tmp_path / "here"))
    monkeypatch.chdir(tmp_path)
    train("scalar", "smollm2", tmp_path / "v")
    assert json.loads((tmp_path / "v" / "adapter_config.json").read_text())["base_model_name_or_path"] == "smollm2"
    first, mark = values_of(ExplicitValue.from_pretrained(tmp_path / "v", options=FLOAT32)), fingerprint(str(tmp_path / "v"))
    shutil.rmtree(tmp_path / "here")
    monkeypatch.setenv("IVG_CACHE", str(tmp_path / "there"))
    assert torch.equal(values_of(ExplicitValue.from_pretrained(tmp_path / "v", options=FLOAT32))[0], first[0])
    assert fingerprint(str(tmp_path / "v")) == mark
    shutil.rmtree(tmp_path / "there")
    with pytest.raises(ModelError, match=r"'smollm2': it is not on this machine .*\n  ivg models add smollm2"):
        ExplicitValue.from_pretrained(tmp_path / "v")
    assert fingerprint(str(tmp_path / "v")) != mark


def test_training_goes_on_from_an_adapter(tmp_path, runs):
    still = {"learning_rate": 1e-9, "num_train_epochs": 1}
    train("scalar", runs / "scalar", tmp_path / "v", keep=False, **still)
    a, b = (values_of(ExplicitValue.from_pretrained(f, options=FLOAT32))[0] for f in (runs / "scalar", tmp_path / "v"))
    assert torch.allclose(a, b, atol=1e-3)
    train("reward", runs / "reward", tmp_path / "r", keep=False, **still)
    a, b = (rewards_of(RewardModel.from_pretrained(f, options=FLOAT32)) for f in (runs / "reward", tmp_path / "r"))
    assert torch.allclose(a, b, atol=1e-3)
    train("scalar", runs / "dpo", tmp_path / "of-dpo", keep=False)  # a new head on the tuned network
    train("reward", runs / "dpo", tmp_path / "reward-of-dpo", keep=False)
    train("sft", runs / "dpo", tmp_path / "sft-of-dpo", keep=False)
    with pytest.raises(ConfigError, match="is an adapter, which training merges into its network"):
        train("scalar", runs / "scalar", tmp_path / "no")


def test_an_adapter_of_a_whole_value(tmp_path, runs):
    train("scalar", runs / "scalar-merged", tmp_path / "v", learning_rate=1e-9)
    a, b = (values_of(ExplicitValue.from_pretrained(f, options=FLOAT32))[0] for f in (runs / "scalar-merged", tmp_path / "v"))
    assert torch.allclose(a, b, atol=5e-3)
    with pytest.raises(ConfigError, match="has a head already"):
        train("compact", runs / "vocabulary-merged", tmp_path / "w")


def test_a_template_is_kept(tmp_path, runs):
    train("reward", runs / "model", tmp_path / "r", template="<{prompt}>")
    train("scalar", runs / "model", tmp_path / "v", template="<{prompt}>")
    assert RewardModel.from_pretrained(tmp_path / "r", options=FLOAT32).text(Prompt("p"), "r") == "<p>r"
    assert ExplicitValue.from_pretrained(tmp_path / "v", options=FLOAT32).model.template == "<{prompt}>"


@pytest.mark.parametrize("kind", ["reward", *HEADS])
def test_a_frozen_body_in_bfloat16(tmp_path, runs, kind, monkeypatch):
    """As on a GPU: heads and adapters are trained in float32, and what is stored was evaluated."""
    from ivg.training import trainer

    monkeypatch.setattr(trainer, "body_dtype", lambda mode: "bfloat16")
    for keep in (True, False):
        train(kind, runs / "model", tmp_path / str(keep), keep=keep, trainer_args={"bf16": True})
    with safe_open(tmp_path / "True" / "adapter_model.safetensors", "pt") as file:
        assert all(file.get_tensor(name).dtype == torch.float16 for name in file.keys())  # noqa: SIM118 - not a mapping
    load, read = (RewardModel, rewards_of) if kind == "reward" else (ExplicitValue, lambda value: values_of(value)[0])
    kept, merged, whole = (
        read(load.from_pretrained(f, options=FLOAT32)) for f in (tmp_path / "True", tmp_path / "False", runs / f"{kind}-merged")
    )
    assert torch.allclose(kept, merged, atol=0.2) and torch.allclose(kept, whole, atol=0.3)  # bfloat16 in training


def test_what_is_refused(tmp_path, runs):
    from ivg.training.refine import refine

    with pytest.raises(ConfigError, match="mode full trains no adapter\n  give --mode lora"):
        TrainSettings(keep_adapter=True)
    with pytest.raises(ConfigError, match="it needs head=vocabulary"):
        ValueSettings(head="scalar", compact_head=True)
    with pytest.raises(ModelError, match="is a value network, not a sequence classifier\n  give it as --value"):
        RewardModel.from_pretrained(runs / "vocabulary")
    with pytest.raises(ModelError, match="has no value head"):
        ExplicitValue.from_pretrained(runs / "dpo")
    for kind, flag in (("scalar", "--value"), ("reward", "--reward")):
        with pytest.raises(ModelError, match=f"not of a language model\n  give it as {flag}"):
            GuidedModel.from_pretrained(runs / kind)
    with pytest.raises(ModelError, match="not a sequence classifier"):
        RewardModel.from_pretrained(runs / "dpo")
    with pytest.raises(ModelError, match="weights that are quantised"):
        ExplicitValue.from_pretrained(runs / "scalar", options=LoadOptions(quantization={"load_in_4bit": True}))
    broken = tmp_path / "broken"
    shutil.copytree(runs / "scalar", broken)
    (broken / "head.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no value head: no head\.safetensors there"):
        ExplicitValue.from_pretrained(broken)
    (broken / "head_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"cannot read .*head_config\.json"):
        ExplicitValue.from_pretrained(broken)
    with pytest.raises(ConfigError, match="refinement starts each round from the value before it"):
        refine(
            runs / "model", RATED, tmp_path / "f", ValueTrainSettings(**LORA, keep_adapter=True), ValueSettings(base=str(runs / "model")),
            RefineSettings(rounds=1), FunctionValue(lambda _, r: 0.0),
        )  # fmt: skip
    with pytest.raises(ConfigError, match="holds a model already"):
        (runs / "dpo" / "run.json").rename(tmp_path / "run.json")
        try:
            train("dpo", runs / "model", runs / "dpo")
        finally:
            (tmp_path / "run.json").rename(runs / "dpo" / "run.json")


def test_a_scalar_value_is_a_reward_too(runs, tmp_path):
    """As a whole model is: a classifier of one label, which reads prompts as it was trained to."""
    kept, merged = (RewardModel.from_pretrained(runs / name, options=FLOAT32) for name in ("scalar", "scalar-merged"))
    assert torch.allclose(rewards_of(kept), rewards_of(merged), atol=2e-3)
    assert rewards_of(kept).std() > 0.01
    value = ExplicitValue.from_pretrained(runs / "scalar", options=FLOAT32)
    assert rewards_of(kept).tolist() == pytest.approx([naive.outputs(value.network, kept.ids(t))[-1, 0].item() for t in TEXTS], abs=1e-4)
    shutil.copytree(runs / "scalar", tmp_path / "templated")
    config = json.loads((tmp_path / "templated" / "head_config.json").read_text())
    config["ivg_value"]["template"] = "<{prompt}>"
    (tmp_path / "templated" / "head_config.json").write_text(json.dumps(config))
    templated = RewardModel.from_pretrained(tmp_path / "templated", options=FLOAT32)
    assert templated.text(Prompt("a"), "b") == "<a>b"
    with pytest.raises(ModelError, match="--value"):
        RewardModel.from_pretrained(runs / "vocabulary", options=FLOAT32)
