"""Errors of models that cannot be loaded: input -> exact lines. No traceback, nothing cut off, nobody waits for the hub."""

import itertools
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants

from ivg.errors import ModelError, reason
from ivg.model import GuidedModel
from ivg.models import hub
from ivg.models.loading import LoadOptions, load_causal, load_tokenizer
from ivg.testing import byte_tokenizer, tiny_model
from ivg.utils import hub_status
from ivg.values.explicit import ExplicitValue
from ivg.values.reward import RewardModel

EXPECTED = "\n  expected a directory with config.json and weights, or a hub id"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    tiny_model("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def empty(folder, **files):
    for path in folder.iterdir():
        path.unlink()
    for name, text in files.items():
        (folder / name.replace("_json", ".json")).write_text(text)


def configure(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


NAMES = {
    "/no/such/place": "cannot load {what} '/no/such/place': no such directory" + EXPECTED,
    "./missing": "cannot load {what} './missing': no such directory" + EXPECTED,
    "../missing": "cannot load {what} '../missing': no such directory" + EXPECTED,
    "~/missing": "cannot load {what} '~/missing': no such directory" + EXPECTED,
    "runs/of/mine": "cannot load {what} 'runs/of/mine': no such directory" + EXPECTED,
    "my model": "cannot load {what} 'my model': no such directory" + EXPECTED,
    "org/model-": "cannot load {what} 'org/model-': no such directory" + EXPECTED,
    "": "cannot load {what}: its name is empty" + EXPECTED,
    "org/model": "cannot load {what} 'org/model': no such directory here, not in the hub's cache, and HF_HUB_OFFLINE is set"
    + EXPECTED
    + " that was downloaded before",
}
ADAPTER = (
    "cannot load {what} '{place}': this is a PEFT adapter of org/base, not a whole model\n"
    "  merge it first: peft.AutoPeftModelForCausalLM.from_pretrained(ADAPTER).merge_and_unload().save_pretrained(FOLDER)\n"
    "  (of a classifier: AutoPeftModelForSequenceClassification), save the tokenizer there too, and give FOLDER"
)
FOLDERS = {
    "empty": (empty, "cannot load {what} '{place}': the directory has no config.json" + EXPECTED),
    "adapter": (
        lambda f: empty(f, adapter_config_json='{"base_model_name_or_path": "org/base"}'),
        "cannot load {what} (network of the adapter '{place}') 'org/base': no such directory here, not in the hub's cache, and"
        " HF_HUB_OFFLINE is set\n  expected a directory with config.json and weights, or a hub id that was downloaded before",
    ),
    "adapter of nothing": (
        lambda f: empty(f, adapter_config_json="{"),
        "{what}: the adapter '{place}' does not name its network\n  give {{ path = NETWORK, adapter = ADAPTER }}",
    ),
    "adapter beside its model": (
        lambda f: (f / "adapter_config.json").write_text("{}"),
        ADAPTER.replace("a PEFT adapter of org/base, not a whole model", "a model with a PEFT adapter beside it")
        + ", or take adapter_config.json away for the model without it",
    ),
    "no tokenizer": (
        lambda f: [(f / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
        "cannot load the tokenizer of {what} '{place}': it has none\n"
        "  expected tokenizer.json, or the files that it is made from, beside the weights, or a hub id",
    ),
    "no type": (
        lambda f: (f / "config.json").write_text("{}"),
        "cannot load {what} '{place}': Unrecognized model in {place}. Should have a `model_type` key in its config.json." + EXPECTED,
    ),
    "half a configuration": (
        lambda f: (f / "config.json").write_text("{"),
        "cannot load {what} '{place}': It looks like the config file at '{place}/config.json' is not a valid JSON file." + EXPECTED,
    ),
    "unknown type": (
        lambda f: (f / "config.json").write_text('{"model_type": "llama9"}'),
        "cannot load {what} '{place}': The checkpoint you are trying to load has model type `llama9` but Transformers does not recognize "
        "this architecture. This could be because of an issue with the checkpoint, or because your version of Transformers is out of date."
        + EXPECTED,
    ),
    "code of its own": (
        lambda f: (f / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "conf.C"}}'),
        "cannot load {what} '{place}': The repository {place} contains custom code which must be executed to correctly load the model. "
        "You can inspect the repository content at {place} .\n"
        "  read that code, then set trust_remote_code in [run] (LoadOptions(trust_remote_code=True)) to run it",
    ),
}
WEIGHTS = {
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        "cannot load base '{place}': Error no file named model.safetensors, or pytorch_model.bin, found in directory {place}." + EXPECTED,
    ),
    "half a file": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]),
        "cannot load base '{place}': SafetensorError: Error while deserializing header: incomplete metadata, file not fully covered"
        + EXPECTED,
    ),
    "another shape": (
        lambda f: configure(f, vocab_size=300),
        "base '{place}': lm_head.weight has shape (257, 32), config.json asks for (300, 32), and 1 more\n"
        "  expected weights and config.json of one model",
    ),
    "a layer more": (
        lambda f: configure(f, num_hidden_layers=3),
        "base '{place}' lacks 9 weights (model.layers.2.input_layernorm.weight, model.layers.2.mlp.down_proj.weight, "
        "model.layers.2.mlp.gate_proj.weight …) of LlamaForCausalLM, which would be random\n"
        "  expected the weights of a LlamaForCausalLM",
    ),
    "a layer less": (
        lambda f: configure(f, num_hidden_layers=1),
        "base '{place}' holds 9 weights (model.layers.1.input_layernorm.weight, model.layers.1.mlp.down_proj.weight, "
        "model.layers.1.mlp.gate_proj.weight …) that LlamaForCausalLM does not use\n"
        "  expected the weights of a LlamaForCausalLM",
    ),
}
LOADERS = {
    "base": lambda name: load_causal(name, "base"),
    "explicit": lambda name: ExplicitValue.from_pretrained(name),
    "reward": lambda name: RewardModel.from_pretrained(name),
}


def error_line(load, name):
    with pytest.raises(ModelError) as e:
        load(name)
    return str(e.value)


@pytest.mark.parametrize("what", LOADERS)
@pytest.mark.parametrize("name", NAMES)
def test_names(monkeypatch, name, what):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert error_line(LOADERS[what], name) == NAMES[name].format(what=what)


@pytest.mark.parametrize("what", LOADERS)
@pytest.mark.parametrize("case", FOLDERS)
def test_folders(tmp_path, good, case, what, capfd):
    change, line = FOLDERS[case]
    shutil.copytree(good, tmp_path / "m")
    change(tmp_path / "m")
    assert error_line(LOADERS[what], str(tmp_path / "m")) == line.format(what=what, place=tmp_path / "m")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights(tmp_path, good, case, capfd):
    change, line = WEIGHTS[case]
    shutil.copytree(good, tmp_path / "m")
    change(tmp_path / "m")
    assert error_line(LOADERS["base"], str(tmp_path / "m")) == line.format(place=tmp_path / "m")
    assert capfd.readouterr() == ("", "")


def test_a_file(good):
    assert error_line(LOADERS["base"], f"{good}/config.json") == f"cannot load base '{good}/config.json': this is a file" + EXPECTED


def test_a_package_that_is_missing(good, monkeypatch):
    monkeypatch.setattr("transformers.integrations.accelerate.is_accelerate_available", lambda *_: False)
    options = LoadOptions(quantization={"quant_method": "quanto", "weights": "int8"})
    line = error_line(lambda name: load_causal(name, "base", options), good)
    assert line.startswith(f"cannot load base '{good}': ") and "accelerate" in line and line.endswith(EXPECTED)


def test_unknown_quantization_is_an_error(good):
    options = LoadOptions(quantization={"quant_method": "nonsense"})
    line = error_line(lambda name: load_causal(name, "base", options), good)
    assert line.startswith(f"cannot load base '{good}': Unknown quantization type, got nonsense - supported types are: [")


def test_long_lines_end_between_words():
    assert reason(ValueError("word " * 200)).endswith("word …") and len(reason(ValueError("word " * 200))) <= 402
    assert reason(ValueError("one of:\n  a\n  b")) == "one of: a"
    assert (reason(KeyError("x")), reason(OSError())) == ("KeyError: 'x'", "OSError")


# The hub


NUMBERS = itertools.count()


class Hub:
    """Nobody answers; counts who asks."""

    def __init__(self, monkeypatch, answers=False):
        self.requests, self.answers = [], answers
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        self.url = f"http://hub{next(NUMBERS)}.invalid"  # what is known of another hub does not count
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr("huggingface_hub.get_session", lambda: self)
        monkeypatch.setattr(hub_status, "time", SimpleNamespace(monotonic=lambda: 0.0))

    def head(self, url, timeout):
        self.requests.append((url, timeout))
        if not self.answers:
            raise ConnectionError("no route to host")


@pytest.fixture
def cached(tmp_path, good):
    """A hub's cache that has org/tiny, as the hub's client lays it out."""
    place = tmp_path / "models--org--tiny"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("abc")
    shutil.copytree(good, place / "snapshots" / "abc")
    return tmp_path


def test_an_unreachable_hub_is_reported_at_once(monkeypatch):
    nobody = Hub(monkeypatch)
    line = "cannot load {} 'org/model': no such directory here, not in the hub's cache, and the hub ({}) cannot be reached"
    for what, load in LOADERS.items():
        assert error_line(load, "org/model") == line.format(what, nobody.url) + EXPECTED + " that was downloaded before"
    assert nobody.requests == [(nobody.url, hub_status.PROBE_SECONDS)]  # once for all


def test_an_unreachable_hub_is_reported_at_once_for_data_sets(monkeypatch):
    """datasets would try again for half a minute."""
    import datasets

    from ivg.errors import ConfigError
    from ivg.jobs.formats import scan_rows

    nobody = Hub(monkeypatch)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    for _ in range(2):
        with pytest.raises(ConfigError, match=rf"no file or folder 'org/rows' here, .* the hub \({nobody.url}\) cannot be reached"):
            list(scan_rows("org/rows"))
    assert nobody.requests == [(nobody.url, hub_status.PROBE_SECONDS)]  # once for all, and by nobody else
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE


@pytest.mark.parametrize("offline", [True, False])
def test_cached_models_load_offline(monkeypatch, cached, good, offline):
    """From the cache itself: transformers asks nobody, and waits for nobody."""
    nobody = Hub(monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    options = LoadOptions(dtype="float32", extra={"cache_dir": str(cached)})
    reader = load_causal("org/tiny", "base", options)
    assert torch.equal(reader.network.lm_head.weight, tiny_model("llama").lm_head.weight)
    assert len(nobody.requests) == (0 if offline else 1)
    assert hub.find_model("org/tiny", "base", options.hub()) == cached / "models--org--tiny" / "snapshots" / "abc"
    with pytest.raises(ModelError, match="not in the hub's cache"):
        hub.find_model("org/tiny", "base", {**options.hub(), "revision": "other"})


def test_a_reachable_hub_is_used(monkeypatch, cached):
    Hub(monkeypatch, answers=True)
    monkeypatch.setattr("transformers.utils.cached_file", lambda name, file, **_: str(cached / file) if name == "org/lora" else None)
    (cached / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    assert error_line(lambda name: hub.find_model(name, "base"), "org/lora").startswith(
        "cannot load base 'org/lora': this is a model with a PEFT"
    )
    for name in ("org/tiny", "org/model", "gpt2"):
        assert hub.find_model(name, "base", {"cache_dir": str(cached)}) == name


def test_embedded_models_and_tokenizers_without_a_model(tmp_path, monkeypatch):
    nobody = Hub(monkeypatch)
    assert GuidedModel.from_pretrained("embedded:base").base.name == "base"
    byte_tokenizer().save_pretrained(tmp_path)
    assert len(load_tokenizer(tmp_path, LoadOptions(), "base")) == 257
    assert not nobody.requests
