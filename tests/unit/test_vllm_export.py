"""Composites as directories and as settings: what can be checked where vLLM is not installed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from ivg.cli.app import app
from ivg.embedded import path
from ivg.engines.vllm.config import IVGConfig, betas_of
from ivg.engines.vllm.export import Guide, export_composite, export_to_cache, export_value, head_kind, pair, running_parts
from ivg.errors import ConfigError, MissingDependencyError, ModelError
from ivg.models.loading import LoadOptions, load_tokenizer
from ivg.models.vocabulary import Vocabulary
from ivg.settings.models import ModelRef

BASE, TUNED, UNTUNED, VALUE = (str(path(name)) for name in ("base", "tuned", "untuned", "value"))


def test_a_composite_names_its_parts_and_copies_no_weights(tmp_path):
    folder = export_composite(BASE, [pair(TUNED, UNTUNED), Guide("explicit", (("explicit", VALUE, 1.0),), "vocabulary")], tmp_path / "c")
    config = IVGConfig.from_pretrained(folder)
    assert [part.name for part in config.submodels] == ["base", "tuned", "untuned", "explicit"]
    assert config.groups == ["implicit", "explicit"] and config.default_betas == [1.0, 0.0]
    assert config.get_text_config().hidden_size == json.loads((path("base") / "config.json").read_text())["hidden_size"]
    assert config.submodels[1].weights == str(path("tuned").resolve())
    assert sum(f.stat().st_size for f in folder.iterdir() if f.suffix == ".safetensors") < 1000
    assert (folder / "generation_config.json").read_bytes() == (path("base") / "generation_config.json").read_bytes()
    again = IVGConfig.from_pretrained(folder)
    assert again.to_dict() == config.to_dict()


def test_a_guide_ends_where_its_tokenizer_does(tmp_path):
    """Tokens that only the base has are the end to it; the checkpoint may name others first."""
    guide = tmp_path / "guide"
    shutil.copytree(path("tuned"), guide)
    settings = json.loads((guide / "config.json").read_text())
    (guide / "config.json").write_text(json.dumps(settings | {"eos_token_id": [7, 0]}))
    part = IVGConfig.from_pretrained(export_composite(BASE, [pair(str(guide), UNTUNED)], tmp_path / "c")).submodels[1]
    assert part.tokenizer_eos_id == part.eos_id == load_tokenizer(TUNED, LoadOptions(), "tuned").eos_token_id == 0
    assert (
        replace(part, tokenizer_eos_id=None).eos_id == 0
        and replace(part, tokenizer_eos_id=10**6, config=part.config | {"eos_token_id": [9, 7]}).eos_id == 7
    )


def write_lora(folder, **settings):
    """An adapter of the embedded tuned network, as peft writes them."""
    folder.mkdir()
    size = json.loads((path("tuned") / "config.json").read_text())["hidden_size"]
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none"} | settings))
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    save_file({name.format("A"): torch.ones(2, size), name.format("B"): torch.ones(3, 2)}, folder / "adapter_model.safetensors")
    return str(folder)


def test_models_of_one_network_run_once_for_each_adapter(tmp_path):
    adapter = write_lora(tmp_path / "adapter", base_model_name_or_path=TUNED)
    half = ModelRef(path=TUNED, adapter=adapter, scale=0.5)
    guides = [
        pair(half, TUNED),
        pair(ModelRef(path=TUNED, adapter=adapter), TUNED, "whole"),
        pair(half, UNTUNED, "other"),
        pair(adapter, BASE, "bare"),
    ]
    folder = export_composite(TUNED, guides, tmp_path / "c")
    config = IVGConfig.from_pretrained(folder)
    assert config.sources == {
        "base": "base", "tuned": "tuned", "untuned": "base", "whole_tuned": "whole_tuned", "whole_untuned": "base",
        "other_tuned": "tuned", "other_untuned": "other_untuned", "bare_tuned": "whole_tuned", "bare_untuned": "bare_untuned",
    }  # fmt: skip
    assert running_parts(folder) == ["base", "tuned", "whole_tuned", "other_untuned", "bare_untuned"]
    parts = {part.name: part for part in config.submodels}
    assert (parts["tuned"].adapter, parts["tuned"].scale, parts["whole_tuned"].scale) == (adapter, 0.5, 1.0)
    assert len({part.network for part in config.submodels}) == 3
    again = export_to_cache(lambda place: export_composite(TUNED, guides, place), tmp_path / "cache")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 5}))
    other = export_to_cache(lambda place: export_composite(TUNED, guides[:3], place), tmp_path / "cache")
    assert again != other
    changed = {part.name: part for part in IVGConfig.from_pretrained(other).submodels}
    assert changed["tuned"].adapter_digest != parts["tuned"].adapter_digest != ""


def test_a_composite_of_an_earlier_version_has_no_adapters():
    old = {"name": "base", "config": json.loads((path("base") / "config.json").read_text()), "weights": BASE, "revision": None}
    config = IVGConfig(
        [old | {"group": "", "sign": 1.0, "head": "language"}, old | {"name": "tuned", "weights": TUNED, "group": "implicit"}]
    )
    assert config.sources == {"base": "base", "tuned": "tuned"}
    assert config.submodels[0].adapter is None


def test_an_adapter_on_the_command_line(tmp_path):
    adapter = write_lora(tmp_path / "adapter")
    given = ["--base", BASE, "--tuned", TUNED, "--adapter", f"tuned={adapter}", "--adapter-scale", "tuned=0.5", "--untuned", TUNED]
    done = CliRunner().invoke(app, ["export", *given, "--out", str(tmp_path / "c")])
    assert done.exit_code == 0, done.output
    tuned = IVGConfig.from_pretrained(tmp_path / "c").submodels[1]
    assert (tuned.weights, tuned.adapter, tuned.scale) == (str(path("tuned").resolve()), adapter, 0.5)
    write_lora(tmp_path / "dora", use_dora=True)
    given[5] = f"tuned={tmp_path / 'dora'}"
    done = CliRunner().invoke(app, ["export", *given, "--out", str(tmp_path / "d")])
    assert isinstance(done.exception, ModelError) and "has use_dora=True; here an adapter is plain LoRA" in str(done.exception)


def test_the_same_content_has_the_same_place(tmp_path):
    one, two = (export_to_cache(lambda place: export_composite(BASE, [pair(TUNED, UNTUNED)], place), tmp_path) for _ in range(2))
    other = export_to_cache(lambda place: export_composite(BASE, [pair(UNTUNED, TUNED)], place), tmp_path)
    assert one == two != other
    assert sorted(tmp_path.iterdir()) == sorted([one, other])


def test_changed_files_have_another_place(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    seen = [export_to_cache(lambda place: export_composite(str(base), [pair(TUNED, UNTUNED)], place), tmp_path / "cache")]
    for name, change in (("generation_config.json", {"eos_token_id": [0, 5]}), ("tokenizer_config.json", {"model_max_length": 77})):
        (base / name).write_text(json.dumps(json.loads((base / name).read_text()) | change))
        seen.append(export_to_cache(lambda place: export_composite(str(base), [pair(TUNED, UNTUNED)], place), tmp_path / "cache"))
        for key, value in change.items():
            assert json.loads((seen[-1] / name).read_text())[key] == value
    assert len(set(seen)) == 3


def test_nothing_is_left_of_what_could_not_be_written(tmp_path):
    def fails(place):
        (place / "half").write_text("x")
        raise ModelError("no such model")

    with pytest.raises(ModelError, match="no such model"):
        export_to_cache(fails, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_group_moves_the_columns_that_its_models_and_its_tokenizer_have(tmp_path):
    wide = {}
    for name, rows in (("base", 64), ("tuned", 64), ("untuned", 32)):
        wide[name] = tmp_path / name
        shutil.copytree(path(name), wide[name])
        config = json.loads((wide[name] / "config.json").read_text())
        (wide[name] / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + rows}))
    known = Vocabulary(load_tokenizer(BASE, LoadOptions(), "base")).size
    guides = [pair(str(wide["tuned"]), str(wide["untuned"])), pair(TUNED, UNTUNED, "plain")]
    config = IVGConfig.from_pretrained(export_composite(str(wide["base"]), guides, tmp_path / "c"))
    assert config.group_columns == [known, known]
    config.columns = {}  # as earlier versions wrote it
    assert config.group_columns == [known + 32, known]


def test_weights_of_requests():
    groups, defaults = ["implicit", "explicit"], [1.0, 0.0]
    assert betas_of(groups, defaults, None) == [1.0, 0.0]
    assert betas_of(groups, defaults, {"ivg_beta": 2, "other": "x"}) == [2.0, 0.0]
    assert betas_of(groups, defaults, {"ivg_beta.explicit": 0.5}) == [1.0, 0.5]
    for bad in ("1", True, float("nan"), float("inf"), None):
        with pytest.raises(ConfigError, match="finite number"):
            betas_of(groups, defaults, {"ivg_beta": bad})
    with pytest.raises(ConfigError, match=r"no guide 'taste'.*implicit, explicit"):
        betas_of(groups, defaults, {"ivg_beta.taste": 1.0})


def test_a_processor_ignores_requests_of_other_composites(tmp_path):
    from ivg.engines.vllm.config import check_betas

    config = IVGConfig.from_pretrained(export_composite(BASE, [pair(TUNED, UNTUNED)], tmp_path / "one"))
    check_betas({"ivg_beta.implicit": 0.5, "ivg_beta": 1})
    with pytest.raises(ConfigError, match="no guide 'nowhere'"):
        check_betas({"ivg_beta.nowhere": 1.0})
    with pytest.raises(ConfigError, match="finite"):
        check_betas({"ivg_beta": "much"})
    assert config.weights_of({"ivg_beta.elsewhere": 3.0, "ivg_beta": 0.25}) == [0.25]


def test_heads_of_value_checkpoints(tmp_path):
    assert head_kind(VALUE, LoadOptions()) == "vocabulary"
    assert export_value(VALUE, tmp_path / "v")[1] == "vocabulary"
    with pytest.raises(ModelError, match="no value head"):
        head_kind(BASE, LoadOptions())


def test_other_models_are_left_alone(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="another model"):
        export_composite(BASE, [pair(TUNED, UNTUNED)], tmp_path)
    assert (tmp_path / "config.json").read_text() == '{"model_type": "llama"}'
    with pytest.raises(ConfigError, match="one name"):
        export_composite(BASE, [pair(TUNED, UNTUNED), pair(TUNED, UNTUNED)], tmp_path / "x")
    with pytest.raises(ConfigError, match="weight for taste"):
        export_composite(BASE, [pair(TUNED, UNTUNED)], tmp_path / "x", betas={"taste": 1.0})
    with pytest.raises(ConfigError, match="no causal language model"):
        export_composite(str(path("gold")), [], tmp_path / "y")


def test_the_verb(tmp_path):
    done = CliRunner().invoke(app, ["export", "--out", str(tmp_path / "c"), "--beta", "0.5"])
    assert done.exit_code == 0 and "vllm serve" in done.output
    assert IVGConfig.from_pretrained(tmp_path / "c").default_betas == [0.5]


def test_without_vllm_the_error_names_the_package():
    from importlib.util import find_spec

    if find_spec("vllm"):
        pytest.skip("vLLM is installed here")
    done = CliRunner().invoke(app, ["generate", "x", "--engine", "vllm"])
    assert isinstance(done.exception, MissingDependencyError) and "pip install" in str(done.exception)


def test_versions_outside_the_range_are_refused(monkeypatch):
    from importlib import metadata

    from ivg.engines.vllm.versions import check_vllm

    for good in ("0.32.0", "0.33.1", "0.32.0+cpu"):
        monkeypatch.setattr(metadata, "version", {"vllm": good}.__getitem__)
        assert check_vllm() == good
    for bad in ("0.31.9", "0.34.0", "1.0"):
        monkeypatch.setattr(metadata, "version", {"vllm": bad}.__getitem__)
        with pytest.raises(MissingDependencyError, match=r">=0\.32,<0\.34"):
            check_vllm()
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="unknown engine"):
        from ivg.factory.recipe import load_models
        from ivg.settings.recipe import Recipe

        load_models(Recipe.parse({"run": {"engine": "llama.cpp"}}))
