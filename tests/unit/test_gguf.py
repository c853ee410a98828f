"""GGUF files: a tiny one is written, and what ivg loads from it is what was written."""

import copy
import json
import os
import shutil
import subprocess
import sys

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import gguf_files
from gguf_files import END, TEMPLATE, model, permuted, tokenizer, write, write_other
from ivg.errors import MissingDependencyError, ModelError, OutputError
from ivg.factory.recipe import default_sampling
from ivg.models.gguf import conversion
from ivg.models.gguf.config import llama3_factors
from ivg.models.hub import find_model
from ivg.models.loading import LoadOptions, load_causal
from ivg.settings.recipe import Recipe
from ivg.values.explicit import ExplicitValue
from killed import run_killed

FLOAT = LoadOptions(device="cpu", dtype="float32")
TEXTS = ("the cat", "He said: the end.", f"user: hello{END}", "naïve 漢字 12345\n\n x")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("IVG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_conversion(monkeypatch):
    """From when it is called on, a conversion is an error."""

    def forbid():
        monkeypatch.setattr(conversion, "convert", lambda *arguments: pytest.fail("converted once more"))

    return forbid


def logits(network):
    return network(torch.tensor([[1, 70, 3, 200, 5, 258, 9, 11]])).logits.detach()


def rounded(network, kind):
    """The matrices as ``kind`` holds them."""
    for parameter in network.parameters():
        if parameter.ndim > 1 and kind != "F32":
            parameter.data = parameter.data.to({"F16": torch.float16, "BF16": torch.bfloat16}[kind]).float()
    return network


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_a_file_gives_exactly_the_logits_of_the_original(tmp_path, kind):
    lm = load_causal(str(write(tmp_path / "m.gguf", kind=kind)), "base", FLOAT)
    assert torch.equal(logits(lm.network), logits(rounded(model(), kind)))
    for text in TEXTS:
        assert lm.tokenizer(text).input_ids == tokenizer()(text).input_ids
    assert lm.tokenizer.chat_template == TEMPLATE and lm.tokenizer.eos_token_id == 0


GEMMA = {"attention.key_length": 16, "attention.value_length": 16, "attention.sliding_window": 6}
OTHERS = {
    "qwen2": ("qwen2", {"rope.freq_base": 1e6}, {"theta": 1e6}),
    "qwen3": ("qwen3", {"rope.freq_base": 1e6, "attention.key_length": 16, "attention.value_length": 16}, {"theta": 1e6, "head_dim": 16}),
    "qwen3moe": (
        "qwen3_moe",
        {"rope.freq_base": 1e6, "attention.key_length": 16, "expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 24},
        {"theta": 1e6, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True},
    ),
    "gemma2": ("gemma2", {**GEMMA, "attn_logit_softcapping": 20.0}, {"head_dim": 16, "sliding_window": 6, "attn_logit_softcapping": 20.0}),
    "gemma3": (
        "gemma3_text",
        {**GEMMA, "rope.freq_base": 1e6, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
        {"head_dim": 16, "sliding_window": 6},
    ),
    "phi3": (
        "phi3",
        {"rope.freq_base": 1e4, "rope.dimension_count": 6, "attention.sliding_window": 6},
        {"theta": 1e4, "share": 0.75, "sliding_window": 6},
    ),
}


@pytest.mark.parametrize("architecture", OTHERS)
def test_other_architectures_have_the_logits_of_the_original(tmp_path, architecture):
    kind, keys, settings = copy.deepcopy(OTHERS[architecture])
    rope = {"rope_type": "default", "rope_theta": settings.pop("theta", None), "partial_rotary_factor": settings.pop("share", 1.0)}
    if kind == "gemma3_text":  # every sixth layer attends to everything, by other frequencies
        rope = {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    settings |= {} if kind == "gemma2" else {"rope_parameters": rope}
    settings |= {"query_pre_attn_scalar": 16} if "gemma" in kind else {}
    sizes = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    sizes |= {"vocab_size": 291, "max_position_embeddings": 128, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, initializer_range=0.3, **sizes, **settings)
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in network.named_parameters():
        parameter.data += 0.2 * torch.randn_like(parameter) if name.endswith(("norm.weight", "bias")) else 0
    lm = load_causal(write_other(tmp_path / "m.gguf", network, architecture, keys), "base", FLOAT)
    torch.testing.assert_close(logits(lm.network), logits(network), rtol=0, atol=2e-5)
    got = lm.tokenizer.convert_ids_to_tokens(lm.tokenizer("the hat").input_ids)
    if "qwen" in kind:
        assert got == tokenizer().tokenize("the hat") and sorted(lm.vocabulary.eos_ids) == [0]
    else:
        assert got == ["<bos>", "the" if "gemma" in kind else "▁the", "▁", "h", "a", "t"] and sorted(lm.vocabulary.eos_ids) == [1]


def test_matrices_that_were_quantised_are_those_that_gguf_dequantises(tmp_path):
    path = write(tmp_path / "m.gguf", kind="Q8_0")
    network = load_causal(path, "base", FLOAT).network
    reader = gguf.GGUFReader(path)
    wanted = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    got = network.model.layers[1].mlp.up_proj.weight.detach().numpy()
    assert abs(got - wanted["blk.1.ffn_up.weight"]).max() <= abs(got).max() * 2**-11
    got = network.model.layers[0].self_attn.k_proj.weight.detach().numpy()
    assert abs(permuted(got, 2) - wanted["blk.0.attn_k.weight"]).max() <= abs(got).max() * 2**-11
    norm = network.model.norm.weight.detach().numpy()
    assert (norm == wanted["output_norm.weight"]).all()


def test_a_file_is_converted_once_whatever_its_name(tmp_path, cache, no_conversion, caplog):
    path = write(tmp_path / "m.gguf")
    first = find_model(str(path), "base")
    assert sum("converting" in record.message for record in caplog.records) == 1
    no_conversion()
    (tmp_path / "folder").mkdir()
    copy = shutil.copy(path, tmp_path / "folder" / "other-name.gguf")
    blob = shutil.copy(path, tmp_path / "sha256-0123")  # as Ollama stores it
    assert {find_model(name, "base") for name in (path, copy, str(blob), tmp_path / "folder")} == {first}
    assert first.parent == cache / "gguf" and [p for p in first.parent.iterdir() if p != first] == []


def test_another_file_under_the_same_name_is_converted(tmp_path):
    first = find_model(write(tmp_path / "m.gguf"), "base")
    second = find_model(write(tmp_path / "m.gguf", model(seed=1)), "base")
    assert first != second
    lm = load_causal(tmp_path / "m.gguf", "base", FLOAT)
    assert torch.equal(logits(lm.network), logits(model(seed=1)))


def test_greedy_answers_are_those_of_generate_and_end_where_the_model_ends(tmp_path, ivg):
    network, prompts = model(), ("the", "he", "to", "a", "42")
    rows = [tokenizer()(prompt, return_tensors="pt") for prompt in prompts]
    greedy = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": 0}
    eot = network.generate(**rows[0], **greedy, eos_token_id=[0, 260])[0, -5].item()  # so that an answer ends
    path = write(tmp_path / "m.gguf", network, extra={"tokenizer.ggml.eot_token_id": eot})
    ends = [0, eot, 260]
    settings = ["--method", "base", "--temperature", 0, "--max-new-tokens", 24, "--dtype", "float32", "--output", "-"]
    reasons = set()
    for prompt, row in zip(prompts, rows, strict=True):
        new = network.generate(**row, **greedy, eos_token_id=ends)[0, row.input_ids.shape[1] :].tolist()
        code, out, err = ivg("generate", prompt, "--base", path, *settings)
        answer = json.loads(out)
        assert code == 0 and answer["token_ids"] in (new, new[:-1] if new[-1] in ends else new), err
        assert answer["finish_reason"] == ("stop" if new[-1] in ends else "length")
        reasons.add(answer["finish_reason"])
    assert "stop" in reasons


def test_answers_end_at_each_token_that_ends_a_turn(tmp_path):
    end = len(tokenizer()) - 1
    lm = load_causal(write(tmp_path / "m.gguf"), "base", FLOAT)
    assert sorted(lm.vocabulary.eos_ids) == [0, end]  # <|im_end|> is in the chat template, whatever the file calls its end
    lm = load_causal(write(tmp_path / "n.gguf", chat=False), "base", FLOAT)
    assert sorted(lm.vocabulary.eos_ids) == [0]
    lm = load_causal(write(tmp_path / "o.gguf", chat=False, extra={"tokenizer.ggml.eot_token_id": 65}), "base", FLOAT)
    assert sorted(lm.vocabulary.eos_ids) == [0, 65]


def test_sampling_that_the_file_recommends_is_the_default(tmp_path):
    extra = {"general.sampling.temp": 0.6, "general.sampling.top_k": 20, "general.sampling.top_p": 0.9}
    path = write(tmp_path / "m.gguf", extra=extra)
    found = default_sampling(Recipe.parse({"models": {"base": str(path)}}))
    assert (found.temperature, found.top_k, found.top_p) == (0.6, 20, 0.9)


@pytest.mark.parametrize("add", [True, False])
def test_texts_begin_as_the_file_says(tmp_path, add):
    lm = load_causal(write(tmp_path / "m.gguf", extra={"tokenizer.ggml.add_bos_token": add}), "base", FLOAT)
    plain = tokenizer()("the cat").input_ids
    assert lm.tokenizer("the cat").input_ids == ([0, *plain] if add else plain)


def test_digits_stand_alone_where_llama_cpp_splits_them(tmp_path):
    lm = load_causal(write(tmp_path / "m.gguf", pre="smollm"), "base", FLOAT)
    assert "Digits" in repr(lm.tokenizer.backend_tokenizer.pre_tokenizer)
    lm = load_causal(write(tmp_path / "n.gguf", pre="llama-bpe"), "base", FLOAT)
    assert lm.tokenizer.backend_tokenizer.model.ignore_merges and lm.tokenizer("the").input_ids[0] == 0


def test_rotary_scaling_of_the_file_is_read(tmp_path):
    length = "llama.rope.scaling.original_context_length"
    cases = {
        "linear": ({"llama.rope.scaling.factor": 4.0}, {"factor": 4.0}),
        "yarn": ({"llama.rope.scaling.factor": 2.0, length: 64}, {"factor": 2.0, "original_max_position_embeddings": 64}),
    }
    for kind, (extra, settings) in cases.items():
        network = model(context=128)
        path = write(tmp_path / f"{kind}.gguf", network, extra={"llama.rope.scaling.type": kind, **extra})
        network.config.rope_parameters.update(rope_type=kind, **settings)
        wanted = type(network)(network.config).eval()
        wanted.load_state_dict(network.state_dict())
        lm = load_causal(path, "base", FLOAT)
        assert torch.equal(logits(lm.network), logits(wanted))
        assert not torch.allclose(logits(wanted), logits(model(context=128)), atol=1e-3)


def test_rotary_factors_of_llama_3_are_read_and_others_refused(tmp_path):
    network, theta, width = model(), 500000.0, 8
    network.config.rope_parameters["rope_theta"] = theta
    factors = llama3_factors(theta, width, 8.0)
    path = write(tmp_path / "m.gguf", network, more_tensors=[("rope_freqs.weight", factors.numpy())])
    found = load_causal(path, "base", FLOAT).network
    plain = 1 / theta ** (torch.arange(0, width, 2) / width)
    assert found.config.rope_parameters["rope_type"] == "llama3"
    torch.testing.assert_close(found.model.rotary_emb.inv_freq, plain / factors)
    other = write(tmp_path / "n.gguf", network, more_tensors=[("rope_freqs.weight", (factors * 1.1).numpy())])
    with pytest.raises(ModelError, match=r"rotary factors .* other than Llama 3's"):
        load_causal(other, "base", FLOAT)


REFUSED = {
    "a setting": (
        {"extra": {"llama.attention.scale": 0.3}},
        r"the file has llama.attention.scale = 0.3\S*, which transformers' GGUF reader leaves",
    ),
    "experts": ({"extra": {"llama.expert_count": 4}}, "the file has llama.expert_count = 4"),
    "longrope": ({"extra": {"llama.rope.scaling.type": "longrope"}}, "the file has rotary scaling"),
    "heads": ({"extra": {"llama.attention.value_length": 4}}, "attention.value_length = 4 where keys have 8"),
    "a missing tensor": ({"without": ("blk.1.ffn_up.weight",)}, r"lacks 1 weight \(model.layers.1.mlp.up_proj.weight\)"),
    "a further tensor": ({"more_tensors": [("blk.1.attn_q.bias", torch.ones(32).numpy())]}, "the file holds .* weights, of which"),
    "NaN": ({"more_tensors": [("output_norm.weight", torch.full((32,), float("nan")).numpy())], "without": ()}, "holds NaN or infinity"),
    "an unknown tokenizer": ({"pre": "new-model"}, r"how the file's tokenizer splits texts \(tokenizer.ggml.pre = new-model\)"),
    "an adapter": ({"extra": {"general.type": "adapter"}}, "this is a LoRA adapter"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_give_other_outputs_is_refused(tmp_path, cache, what):
    how, message = REFUSED[what]
    network = model()
    if what == "NaN":
        network.model.norm.weight.data.fill_(float("nan"))
        how = {}
    path = write(tmp_path / "m.gguf", network, **how)
    with pytest.raises(ModelError, match=message) as caught:
        load_causal(path, "base", FLOAT)
    assert str(caught.value).count("\n") == 1
    assert list((cache / "gguf").iterdir()) == []


@pytest.mark.parametrize("size", [0, 3, 20, 500, 5000, -1000])
def test_a_damaged_file_is_refused_in_one_line(tmp_path, ivg, size):
    path = write(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:size])
    code, out, err = ivg("generate", "the", "--base", path)
    assert code == 2 and not out
    last = err.strip().splitlines()[-1]
    assert last.startswith(f"error: cannot load base '{path}': the GGUF file is damaged or incomplete (")


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ModelError, match="the GGUF file is damaged or incomplete"):
        find_model(path, "base")
    with pytest.raises(ModelError, match="no such file\n  expected a GGUF file"):
        find_model("no/such.gguf", "base")


def test_a_folder_with_several_models_is_refused(tmp_path):
    write(tmp_path / "a-q4.gguf")
    shutil.copy(tmp_path / "a-q4.gguf", tmp_path / "a-q8.gguf")
    with pytest.raises(ModelError, match=r"the folder holds 2 GGUF models \(a-q4.gguf, a-q8.gguf\)\n  give one of them: .*a-q4.gguf"):
        find_model(tmp_path, "base")
    (tmp_path / "a-q8.gguf").rename(tmp_path / "mmproj-a.gguf")  # of a vision model, beside the language model
    assert find_model(tmp_path, "base").is_dir()
    with pytest.raises(ModelError, match=r"this is part 1 of a model in 2 GGUF files\n  name it so \(NAME-00001-of-00002.gguf\)"):
        find_model(write(tmp_path / "b.gguf", extra={"split.count": 2}), "base")


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_a_split_model_is_read_as_the_whole_one(tmp_path, kind):
    whole = find_model(write(tmp_path / "whole" / "m.gguf", kind=kind), "base")
    folder = tmp_path / "parts"
    write(folder / "m.gguf", kind=kind, split=9)
    parts = sorted(folder.iterdir())
    assert [p.name for p in parts] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    found = {find_model(place, "base") for place in (folder, *parts)}
    assert len(found) == 1 and whole not in found
    (split,) = found
    assert not list(split.glob("*.gguf")) and not (split / "source").exists()
    for name in ("model.safetensors", "config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja"):
        assert (split / name).read_bytes() == (whole / name).read_bytes(), name


def said(caplog):
    """What ivg logged; the package gguf logs, too, where another test has lowered the level."""
    return [record for record in caplog.records if record.name.startswith("ivg")]


def test_parts_that_are_missing_swapped_or_damaged_are_named(tmp_path, caplog):
    write(tmp_path / "m.gguf", split=9)
    parts = sorted(tmp_path.iterdir())
    second, third = (p.read_bytes() for p in parts[1:])
    parts[1].unlink()
    for place in (tmp_path, parts[0], parts[2]):
        with pytest.raises(ModelError, match=r"is split into 3 GGUF files, not all of them here: m-00002-of-00003.gguf\n  put all"):
            find_model(place, "base")
    parts[1].write_bytes(third)
    with pytest.raises(ModelError, match=r"m-00002-of-00003.gguf is not part 2 of 3 by its content"):
        find_model(tmp_path, "base")
    parts[1].write_bytes(second[:200])
    with pytest.raises(ModelError, match=r"the GGUF file m-00002-of-00003.gguf is damaged or incomplete \("):
        find_model(tmp_path, "base")
    assert not said(caplog)  # nothing is said to be converted
    parts[1].write_bytes(second)
    assert find_model(parts[0], "base").is_dir() and len(said(caplog)) == 1


def test_other_weights_in_a_folder_come_first(tmp_path):
    model(seed=3).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    write(tmp_path / "m.gguf")
    assert find_model(tmp_path, "base") == tmp_path


def test_files_of_the_original_beside_it_take_precedence(tmp_path):
    path = write(tmp_path / "m.gguf", pre="new-model")
    tokenizer().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7, "temperature": 0.3}')
    lm = load_causal(tmp_path, "base", FLOAT)
    assert sorted(lm.vocabulary.eos_ids) == [7] and lm.generation_config.temperature == 0.3
    assert lm.tokenizer(TEXTS[0]).input_ids == tokenizer()(TEXTS[0]).input_ids
    with pytest.raises(ModelError, match="splits texts"):
        load_causal(path, "base", FLOAT)  # the file alone
    from ivg.testing import byte_tokenizer

    byte_tokenizer(permute=True).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"tokenizer.json beside the file has other tokens"):
        load_causal(tmp_path, "base", FLOAT)


def test_a_pair_may_be_gguf_files_and_a_value_network_may_not(tmp_path, ivg):
    base, tuned = write(tmp_path / "m.gguf"), write(tmp_path / "t.gguf", model(seed=1))
    code, out, err = ivg("generate", "the", "--base", base, "--tuned", tuned, "--untuned", base, "--method", "eft", "--max-new-tokens", 4)
    assert code == 0 and out, err
    with pytest.raises(ModelError):
        ExplicitValue.from_pretrained(base)


def test_without_its_packages_the_extra_is_named(tmp_path, monkeypatch, cache):
    path = write(tmp_path / "m.gguf")
    for package in ("gguf", "accelerate"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(MissingDependencyError, match=r"pip install 'ivg\[gguf\]'"):
                find_model(path, "base")


def test_a_cache_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    path = write(tmp_path / "m.gguf")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("IVG_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OutputError, match="cannot write"):
        find_model(path, "base")


SCRIPT = "import sys, killed; from ivg.models.hub import find_model; print(find_model(sys.argv[1], 'base'))"


@pytest.mark.long
@pytest.mark.parametrize("file", ["config", "tokenizer_config", "gguf"])
def test_a_killed_conversion_leaves_nothing(tmp_path, cache, file):
    path = write(tmp_path / "m.gguf")
    run_killed(["-c", SCRIPT, str(path)], dict(os.environ), rf"partial/{file}\.json$")
    names = {p.name for p in (cache / "gguf").iterdir()}
    assert names and all(name.startswith(".") for name in names)  # nothing that counts
    other = find_model(write(tmp_path / "n.gguf", model(seed=1)), "base")
    assert [p for p in (cache / "gguf").iterdir() if p != other and p.is_dir()] == []  # the next conversion has cleared up
    assert torch.equal(logits(load_causal(path, "base", FLOAT).network), logits(model()))


@pytest.mark.long
def test_processes_that_need_a_file_at_once_convert_it_once(tmp_path):
    path = write(tmp_path / "m.gguf")
    here = str(gguf_files.__file__).rpartition(os.sep)[0]
    environment = dict(os.environ) | {"PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", SCRIPT, str(path)]
    runs = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    outs = [run.communicate() for run in runs]
    assert len({out for out, _ in outs}) == 1 and all(run.returncode == 0 for run in runs), outs
    assert sum("converting" in err for _, err in outs) == 1
