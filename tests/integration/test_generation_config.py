"""A checkpoint's generation_config.json: honoured as transformers' generate does, below what the user says, or refused by name."""

import json
import re

import pytest
import torch

from ivg import GuidedModel
from ivg.errors import ConfigError
from ivg.model import DEFAULT_SAMPLING
from ivg.models.generation_config import defaults_of, generation_defaults
from ivg.models.loading import LoadOptions
from ivg.settings.recipe import Recipe
from ivg.testing import byte_tokenizer, tiny_model

PROMPTS = ["The movie was", "abc abc abc", "Two"]
LENGTH = 24

SETTINGS = {
    "repetition penalty": {"repetition_penalty": 1.8},
    "reward of repetition": {"repetition_penalty": 0.7},
    "no bigram twice": {"no_repeat_ngram_size": 2},
    "no token twice": {"no_repeat_ngram_size": 1},
    "trigrams": {"no_repeat_ngram_size": 3},
    "suppressed": {"suppress_tokens": list(range(0, 257, 2))},
    "none suppressed": {"suppress_tokens": [-1]},
    "suppressed first": {"begin_suppress_tokens": list(range(1, 250))},
    "bad words": {"bad_words_ids": [[i] for i in range(100, 256)] + [[i, j] for i in range(50) for j in range(0, 100, 3)]},
    "bias": {"sequence_bias": [[[7], 5.0], [[7, 8], -3.0], [[9], float(1)]]},
    "bias given twice": {"sequence_bias": [[[t], bias] for bias in (50.0, 2.0) for t in range(30, 60)]},
    "longer than the prompt": {"sequence_bias": [[[52, 87, 79, t], 90.0] for t in range(40)]},
    "at least": {"min_new_tokens": 15, "eos_token_id": list(range(0, 257, 2))},
    "at least with the prompt": {"min_length": 25, "eos_token_id": list(range(0, 257, 2))},
    "forced end": {"forced_eos_token_id": 3},
    "decay": {"exponential_decay_length_penalty": [4, 1.5], "eos_token_id": [3, 4, 5]},
    "many": {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
        "suppress_tokens": [5, 6],
        "bad_words_ids": [[11], [12, 13]],
        "min_new_tokens": 6,
        "eos_token_id": [3, 30],
        "temperature": 0.3,
        "top_k": 7,
        "top_p": 0.8,
        "do_sample": True,
    },
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Makes a random checkpoint with a generation_config.json."""
    folder = tmp_path_factory.mktemp("checkpoint")
    network = tiny_model("llama", seed=3)
    network.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)

    def make(settings):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "pad_token_id": 0, **settings}))
        return folder

    return make


def generated(model, prompt, **settings):
    """What transformers' generate says, by the checkpoint's own settings."""
    ids = model.base.tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        out = model.base.network.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=LENGTH, num_beams=1, **settings
        )
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_greedy_base_is_generate(checkpoint, settings):
    folder = checkpoint(settings)
    model = GuidedModel.from_pretrained(folder, options=LoadOptions(dtype="float32"))  # bfloat16 rounds two tokens to a tie
    got = model.generate(PROMPTS, "base", temperature=0, max_new_tokens=LENGTH)
    assert [list(c.token_ids) for c in got] == [generated(model, p) for p in PROMPTS]


def test_every_setting_matters(checkpoint):
    """The cases above would see a setting that is dropped (but for those that ask for nothing)."""
    for name, settings in SETTINGS.items():
        model = GuidedModel.from_pretrained(checkpoint(settings))
        plain = GuidedModel.from_pretrained(checkpoint({k: v for k, v in settings.items() if k == "eos_token_id"}))
        same = [
            a.token_ids == b.token_ids
            for a, b in zip(*(m.generate(PROMPTS, "base", temperature=0, max_new_tokens=LENGTH) for m in (model, plain)), strict=True)
        ]
        assert not all(same) or name in ("none suppressed", "trigrams", "longer than the prompt"), name


def test_a_prompt_of_one_token_is_forced(checkpoint):
    for settings in ({"forced_bos_token_id": 9}, {"forced_bos_token_id": 9, "begin_suppress_tokens": list(range(1, 200))}):
        model = GuidedModel.from_pretrained(checkpoint(settings))
        for prompt in ("x", "xy"):
            (got,) = model.generate([prompt], "base", temperature=0, max_new_tokens=LENGTH)
            assert list(got.token_ids) == generated(model, prompt)
            assert (got.token_ids[0] == 9) == (prompt == "x")


def test_request_over_recipe_over_checkpoint_over_ours(checkpoint):
    folder = checkpoint({"temperature": 0.25, "top_k": 5, "max_new_tokens": 7, "min_p": 0.1, "do_sample": True})
    model = GuidedModel.from_pretrained(folder)
    assert model.generation_config == {"temperature": 0.25, "top_k": 5, "max_new_tokens": 7, "min_p": 0.1}
    assert (model.sampling.temperature, model.sampling.top_p, model.sampling.max_new_tokens) == (0.25, 1.0, 7)
    got = model.generate("abc", "base", top_k=3)
    assert (got.sampling.top_k, got.sampling.temperature, got.sampling.min_p) == (3, 0.25, 0.1)
    assert got.generation_config == {"temperature": 0.25, "max_new_tokens": 7, "min_p": 0.1}
    assert got.to_dict()["generation_config"] == got.generation_config
    assert len(got.token_ids) <= 7
    explicit = model.generate("abc", "base", top_k=0, temperature=0.7, max_new_tokens=50, min_p=0)
    ignored = GuidedModel.from_pretrained(folder, generation_config="ignore")
    assert ignored.sampling == DEFAULT_SAMPLING
    assert ignored.generate("abc", "base").token_ids == explicit.token_ids
    assert "generation_config" not in explicit.to_dict()


def test_a_default_length_is_cut_to_the_context(checkpoint):
    model = GuidedModel.from_pretrained(checkpoint({"max_new_tokens": 5000}))
    request = model.request("x" * 200, "base")
    assert request.sampling.max_new_tokens == 56
    with pytest.raises(ValueError, match="5000 new tokens"):
        model.generate("x" * 200, "base", max_new_tokens=5000)


def test_end_tokens_are_taken_even_where_the_rest_is_ignored(checkpoint):
    model = GuidedModel.from_pretrained(checkpoint({"eos_token_id": [3, 200], "temperature": 0.1}), generation_config="ignore")
    assert model.base.vocabulary.eos_ids == {3, 200}


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance_scale": 1.5},
        {"encoder_repetition_penalty": 1.2},
        {"encoder_no_repeat_ngram_size": 2},
        {"typical_p": 0.9},
        {"epsilon_cutoff": 0.1},
        {"eta_cutoff": 0.1},
        {"watermarking_config": {"bias": 2.5}},
    ],
    ids=lambda s: next(iter(s)),
)
def test_what_cannot_be_done_is_refused_by_name(checkpoint, settings):
    folder = checkpoint(settings)
    with pytest.raises(ConfigError, match=f"(?s)generation_config.json of base sets {next(iter(settings))}=.*--generation-config ignore"):
        GuidedModel.from_pretrained(folder)
    GuidedModel.from_pretrained(folder, generation_config="ignore")


def test_inapplicable_settings_are_listed_and_wrong_ones_are_errors():
    found = generation_defaults({"do_sample": True, "max_length": 4096, "num_beams": 4, "early_stopping": False, "use_cache": True})
    assert set(found.left_out) == {"do_sample", "max_length", "num_beams"} and not found.settings
    assert generation_defaults({"top_k": -1, "min_length": 3, "min_new_tokens": 2}).settings == {"top_k": 0, "min_new_tokens": 2}
    with pytest.raises(ConfigError, match=r"(?s)generation_config.json of base: top_p must be in \(0, 1\], got 1.5\n.*--generation-config"):
        generation_defaults({"top_p": 1.5})
    with pytest.raises(ConfigError, match="generation_config must be auto or ignore, got 'vllm'"):
        defaults_of(None, "base", "vllm")


def test_the_embedded_models_set_nothing():
    model = GuidedModel.embedded()
    assert model.sampling == DEFAULT_SAMPLING and not model.generation_config and not model.generation_config_left_out


def test_unsupported_settings_are_errors(checkpoint):
    from ivg.engines.endpoint.engine import EndpointEngine
    from ivg.engines.vllm.engine import VLLMEngine

    model = GuidedModel.from_pretrained(checkpoint({"no_repeat_ngram_size": 2}))
    model.engine.unsupported = VLLMEngine.unsupported
    with pytest.raises(ConfigError, match=r"(?s)no_repeat_ngram_size: the engine transformers cannot do that.*generation-config ignore"):
        model.generate("abc", "base")
    assert {"min_length", "suppress_tokens"} <= set(EndpointEngine.unsupported)
    assert not {"repetition_penalty", "min_new_tokens", "temperature", "top_k"} & set(VLLMEngine.unsupported)


def test_the_recipe_and_the_evaluation_go_by_the_same_rule(checkpoint):
    from ivg.factory.recipe import default_sampling, load_models

    folder = checkpoint({"temperature": 0.25, "suppress_tokens": [4]})
    recipe = Recipe.parse({"models": {"base": str(folder)}})
    assert default_sampling(recipe) == load_models(recipe).sampling
    assert default_sampling(recipe).suppress_tokens == (4,)
    ignoring = recipe.override(run={"generation_config": "ignore"})
    assert default_sampling(ignoring) == load_models(ignoring).sampling == DEFAULT_SAMPLING


def test_check_lists_settings_of_the_checkpoint(checkpoint):
    from typer.testing import CliRunner

    from ivg.cli.app import app

    folder = checkpoint({"repetition_penalty": 1.2, "do_sample": True})
    out = CliRunner().invoke(app, ["check", "--base", str(folder)]).output
    assert "generation_config.json of the base sets: repetition_penalty=1.2" in out
    assert "do_sample does not apply (temperature decides: 0 is greedy)" in out
    out = CliRunner().invoke(app, ["check", "--base", str(folder), "--generation-config", "ignore"]).output
    assert "generation_config" not in out


def test_rows_list_the_settings_of_the_checkpoint(checkpoint, tmp_path):
    from typer.testing import CliRunner

    from ivg.cli.app import app

    folder, out = checkpoint({"repetition_penalty": 1.2, "max_new_tokens": 4}), tmp_path / "out.jsonl"
    options = ["generate", "abc", "--base", str(folder), "--method", "base", "--output", str(out)]
    assert CliRunner().invoke(app, [*options, "--repetition-penalty", "1"]).exit_code == 0
    assert json.loads(out.read_text())["generation_config"] == {"max_new_tokens": 4}


def test_drafts_and_chunks_are_drawn_by_the_same_settings(checkpoint):
    """Settings look back over prompt and response wherever a chunk begins, and in drafts as well."""
    folder = checkpoint({"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 8, "eos_token_id": [0, 3]})
    model = GuidedModel.from_pretrained(folder, tuned=folder, untuned=folder)
    plain = model.generate(PROMPTS, "base", temperature=0, max_new_tokens=LENGTH)
    chunks = model.generate(PROMPTS, "custom", chunk_length=5, temperature=0, max_new_tokens=LENGTH)
    drafted = model.generate(PROMPTS, "eft", draft=4, temperature=0, max_new_tokens=LENGTH)
    assert [c.token_ids for c in plain] == [c.token_ids for c in chunks] == [c.token_ids for c in drafted]


def test_settings_that_forbid_every_token_end_the_answer_with_an_error(checkpoint):
    model = GuidedModel.from_pretrained(checkpoint({}), tuned=checkpoint({}), untuned=checkpoint({}))
    for method, more in (("base", {}), ("eft", {"draft": 3})):
        for temperature in (0.0, 1.0):
            got = model.generate("abc", method, suppress_tokens=range(257), temperature=temperature, **more)
            assert got.finish_reason == "error" and "no token may be drawn after 0 tokens" in got.error


OUTSIDE = {
    "suppress_tokens": [3, 257],
    "begin_suppress_tokens": [1 << 40],
    "bad_words_ids": [[3], [4, 257]],
    "sequence_bias": [[[257, 3], 1.0]],
    "forced_bos_token_id": 257,
    "forced_eos_token_id": [0, 9999],
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_token_ids_outside_the_vocabulary_are_refused_by_name(checkpoint, ivg, name):
    folder = checkpoint({"suppress_tokens": [9999]})  # of a checkpoint they have no effect, as in generate
    model = GuidedModel.from_pretrained(folder)
    assert not model.generate("abc", "base", max_new_tokens=2).error
    with pytest.raises(ConfigError, match=rf"{name} has the token id \d+, outside the base's vocabulary\n  expected ids from 0 to 256"):
        model.generate("abc", "base", **{name: OUTSIDE[name]})
    inside = json.loads(re.sub(r"257|9999|1099511627776", "256", json.dumps(OUTSIDE[name])))
    assert not model.generate("abc", "base", **{name: inside}, max_new_tokens=2).error
    code, out, err = ivg("generate", "abc", "--base", folder, "--method", "base", "--set", f"sampling.{name}={json.dumps(OUTSIDE[name])}")
    assert code == 2 and not out and f"{name} has the token id" in err


def test_export_lists_what_vllm_s_server_ignores(checkpoint, tmp_path):
    from typer.testing import CliRunner

    from ivg.cli.app import app

    folder = str(checkpoint({"repetition_penalty": 1.2, "suppress_tokens": [5], "no_repeat_ngram_size": 2}))
    options = ["export", "--base", folder, "--tuned", folder, "--untuned", folder, "--out"]
    said = CliRunner().invoke(app, [*options, str(tmp_path / "a")])
    assert said.exit_code == 0
    assert "sets no_repeat_ngram_size, suppress_tokens, which vLLM's own server does not apply" in said.output
    checkpoint({"repetition_penalty": 1.2, "temperature": 0.5})
    assert "note:" not in CliRunner().invoke(app, [*options, str(tmp_path / "b")]).output


def test_the_server_goes_by_the_same_rule(checkpoint):
    from ivg.models.token_text import TokenText
    from ivg.serving.protocol import CompletionRequest
    from ivg.serving.responses import ResponseBuilder
    from ivg.serving.served_models import ServedModels
    from ivg.settings.serve import ServeSettings

    folder = checkpoint({"temperature": 0.25, "top_k": 5, "max_new_tokens": 7, "suppress_tokens": [4]})
    recipe = Recipe.parse({"models": {"base": str(folder)}, "search": {"method": "base"}, "sampling": {"top_k": 3}})
    served = ServedModels(GuidedModel.from_pretrained(folder), recipe, ServeSettings(name="tiny"))
    assert served.defaults.items() >= {"temperature": 0.25, "top_k": 3, "max_new_tokens": 7}.items()

    def parsed(**body):
        (request,) = served.prepare(CompletionRequest(model="tiny", prompt="abc", seed=1, **body)).requests
        return request

    s = parsed().sampling
    assert (s.temperature, s.top_k, s.max_new_tokens, s.suppress_tokens) == (0.25, 3, 7, (4,))
    assert parsed().from_checkpoint == {"temperature": 0.25, "max_new_tokens": 7, "suppress_tokens": (4,)}
    over = parsed(temperature=1.0, max_tokens=9)
    assert (over.sampling.temperature, over.sampling.max_new_tokens, over.from_checkpoint) == (1.0, 9, {"suppress_tokens": (4,)})
    batch = served.prepare(CompletionRequest(model="tiny", prompt="abc", seed=1, temperature=1.0, max_tokens=2))
    done = [c for _, c in served.model.run(batch.requests)]
    reply = ResponseBuilder(False, "tiny", batch, None, TokenText(served.model.base.vocabulary)).build_response(done)
    assert reply["ivg"]["generation_config"] == {"suppress_tokens": (4,)}
