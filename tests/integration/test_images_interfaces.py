"""Pictures in prompts on the command line, in rows of data and over HTTP; and who refuses them."""

import json
import shutil

import openai
import pytest
import torch

from ivg import GuidedModel, LoadOptions
from ivg.engines.endpoint.engine import EndpointEngine
from ivg.errors import ConfigError, MissingDependencyError, PromptError
from ivg.models import processor
from ivg.models.images import ImageReader
from ivg.settings.images import ImagesConfig
from ivg.settings.recipe import Recipe
from ivg.testing import byte_tokenizer, tiny_lm
from ivg.types import Prompt, SamplingParams
from ivg.values.implicit import ImplicitValue
from serving_tools import Running, well_formed
from vision import asking, checkpoint, data_url, picture

GREEDY = {"method": "base", "temperature": 0.0, "max_new_tokens": 6}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint("qwen2_vl", tmp_path_factory.mktemp("qwen2_vl"))


@pytest.fixture(scope="module")
def model(folder):
    return GuidedModel.from_pretrained(folder, options=LoadOptions("cpu", "float32"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    place = tmp_path_factory.mktemp("pictures")
    for i in range(2):
        picture(i).save(place / f"{i}.png")
    return place


@pytest.fixture(scope="module")
def server(model, files):
    recipe = Recipe.parse({"search": {"method": "base"}, "images": {"allowed_local_media_path": str(files), "max_images": 2}})
    with Running(model, recipe) as running:
        yield running


def answer(model, chat):
    return model.generate(chat, **GREEDY).text


# Command line


def test_pictures_of_the_command_line(ivg, folder, model, files, tmp_path):
    options = ("--base", folder, "--dtype", "float32", "--method", "base", "--temperature", 0, "--max-new-tokens", 6)
    out = tmp_path / "out.jsonl"
    code, _, error = ivg("generate", "what?", "and?", "--image", files / "0.png", "--image", files / "1.png", *options, "--output", out)
    assert code == 0, error
    rows = {row["prompt"][0]["content"][-1]["text"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert len(rows["what?"]["prompt"][0]["content"]) == 3
    for text, row in rows.items():
        assert row["text"] == answer(model, asking(text, picture(0), picture(1)))
    code, shown, _ = ivg("generate", "what?", "--image", files / "0.png", *options)
    assert code == 0
    assert shown.strip() == answer(model, asking("what?", picture(0))).strip()


def test_rows_with_pictures_pass_through_unchanged(ivg, folder, model, files, tmp_path):
    options = ("--base", folder, "--dtype", "float32", "--method", "base", "--temperature", 0, "--max-new-tokens", 6)
    messages = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": data_url(picture(0)), "detail": "low"}},
                    {"type": "text", "text": "a"},
                ],
            }
        ],
        [{"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "image", "path": str(files / "1.png")}]}],
        [{"role": "user", "content": "c"}],
        [{"role": "user", "content": [{"type": "image", "path": str(files / "none.png")}, {"type": "text", "text": "d"}]}],
        [
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "http://example.com/p.png"}}, {"type": "text", "text": "e"}],
            }
        ],
    ]
    source, out, failed = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "failed.jsonl"))
    source.write_text("".join(json.dumps({"id": i, "messages": m}) + "\n" for i, m in enumerate(messages)))
    code, _, error = ivg("generate", "--input", source, "--output", out, "--failed", failed, *options)
    assert code == 1, error
    rows = {row["id"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert {i: row["prompt"] for i, row in rows.items()} == {i: messages[i] for i in range(3)}
    assert [rows[i]["text"] for i in range(3)] == [answer(model, messages[i]) for i in range(3)]
    errors = [row["error"] for row in map(json.loads, failed.read_text().splitlines())]
    assert "no picture at" in errors[0]
    assert "pictures from example.com are not allowed here" in errors[1]


def test_image_goes_with_prompts_of_the_command_line(ivg, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n')
    code, _, error = ivg("generate", "--input", tmp_path / "in.jsonl", "--image", "x.png")
    assert code == 2
    assert "--image goes with prompts of the command line" in error


# Server


def ask(*parts, **more):
    return {"model": "tiny:base", "temperature": 0, "max_tokens": 6, "messages": [{"role": "user", "content": list(parts)}], **more}


def test_chats_with_pictures(server, model, files):
    text = {"type": "text", "text": "what?"}
    sources = (data_url(picture(0)), str(files / "0.png"))
    for source in sources:
        body = ask({"type": "image_url", "image_url": {"url": source}}, text)
        response = server.post(body, CHAT).json()
        assert response["choices"][0]["message"]["content"] == answer(model, asking("what?", picture(0)))
        assert response["usage"]["prompt_tokens"] == len(model.base.prompt_ids(model.request(asking("what?", picture(0)), "base").prompt))
    streamed = server.client().chat.completions.create(**ask({"type": "image_url", "image_url": {"url": sources[0]}}, text), stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices) == answer(
        model, asking("what?", picture(0))
    )


def test_a_body_may_hold_a_large_picture(server):
    large = picture(3, 700, 900)
    url = data_url(large)
    assert len(url) > 1 << 20
    response = server.post(ask({"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}), CHAT)
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("urls", "said"),
    [
        (["/etc/passwd"], "is a file of this server, which clients may not read"),
        (["file:///etc/passwd"], "is a file of this server, which clients may not read"),
        (["http://169.254.169.254/latest"], "pictures from 169.254.169.254 are not allowed here"),
        (["data:image/png;base64,AAAA"], "is no picture that Pillow can read"),
        (["data:,"] * 3, "the prompt has 3 pictures"),
    ],
)
def test_pictures_that_clients_may_not_name(server, urls, said):
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    error = well_formed(server.post(ask(*parts, {"type": "text", "text": "?"}), CHAT), 400, "messages", "invalid_prompt")
    assert said in error["message"]


def test_a_text_that_stands_for_a_picture_is_refused(server):
    parts = [{"type": "image_url", "image_url": {"url": data_url(picture(0))}}, {"type": "text", "text": "<|image_pad|>"}]
    error = well_formed(server.post(ask(*parts), CHAT), 400, "messages", "invalid_prompt")
    assert "the text of the prompt holds <|image_pad|>" in error["message"]


def test_a_base_of_text_refuses_pictures_over_http(library):
    with Running(library) as running:
        parts = [{"type": "image_url", "image_url": {"url": data_url(picture(0))}}, {"type": "text", "text": "?"}]
        error = well_formed(running.post(ask(*parts), CHAT), 400, "messages", "invalid_prompt")
        assert "base (LlamaForCausalLM) reads text alone" in error["message"]
        with pytest.raises(openai.BadRequestError):
            running.client().chat.completions.create(**ask(*parts))


# Refusals


def test_a_base_without_a_processor_refuses_in_one_line(folder, tmp_path):
    place = shutil.copytree(folder, tmp_path / "bare")
    for name in ("processor_config.json", "preprocessor_config.json"):
        (place / name).unlink(missing_ok=True)
    bare = GuidedModel.from_pretrained(place, options=LoadOptions("cpu", "float32"))
    with pytest.raises(PromptError) as caught:
        bare.generate(asking("what?", picture(0)), **GREEDY)
    first, *rest = str(caught.value).splitlines()
    assert first.startswith(f"base (Qwen2VLForConditionalGeneration, {place}) has no processor that can be loaded")
    assert len(rest) == 1
    assert bare.generate([{"role": "user", "content": "text"}], **GREEDY).text


def test_text_bases_and_other_engines_refuse():
    chat = asking("what?", picture(0))
    with pytest.raises(PromptError, match=r"the prompt has pictures, but base \(LlamaForCausalLM\) reads text alone"):
        GuidedModel(tiny_lm(tokenizer=byte_tokenizer(chat=True))).generate(chat, **GREEDY)
    engine = EndpointEngine("http://127.0.0.1:1/v1", "m", tokenizer=byte_tokenizer(chat=True))
    with pytest.raises(PromptError, match="the prompt has pictures, but base reads text alone"):
        engine.open(Prompt.of(chat), SamplingParams())
    engine.close()


def test_a_base_that_was_loaded_for_text_says_so(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    from architectures import tiny_config

    AutoModelForCausalLM.from_config(tiny_config("llama4")).save_pretrained(tmp_path)
    AutoConfig.for_model("llama4", text_config=tiny_config("llama4").get_text_config().to_dict()).save_pretrained(tmp_path)
    byte_tokenizer(chat=True).save_pretrained(tmp_path)
    model = GuidedModel.from_pretrained(tmp_path, options=LoadOptions("cpu", "float32"))
    with pytest.raises(PromptError, match="give --images"):
        model.generate(asking("what?", picture(0)), **GREEDY)


def test_drafts_are_refused(model):
    pair = ImplicitValue(*(tiny_lm(name, seed=i, tokenizer=model.base.tokenizer) for i, name in enumerate(("tuned", "untuned"))))
    with pytest.raises(ConfigError, match="draft=3"):
        GuidedModel(model.base, {"implicit": pair}).generate(asking("what?", picture(0)), "eft", draft=3)


def test_guides_need_some_text(model):
    tok = byte_tokenizer(chat=True)
    tok.chat_template = None
    pair = ImplicitValue(*(tiny_lm(name, seed=i, tokenizer=model.base.tokenizer) for i, name in enumerate(("tuned", "untuned"))))
    chat = [{"role": "user", "content": [{"type": "image", "image": picture(0)}]}]
    assert model.generate(chat, **GREEDY).text is not None
    with pytest.raises(PromptError, match="the prompt has pictures and no text, and tuned reads text alone"):
        GuidedModel(model.base, {"implicit": pair}).generate(chat, "eft", max_new_tokens=3)


def test_a_template_of_text_cannot_place_pictures(folder):
    own = GuidedModel.from_pretrained(folder, templates={"base": "Q: {prompt}"}, options=LoadOptions("cpu", "float32"))
    with pytest.raises(PromptError, match="pictures are placed by its own chat template"):
        own.generate(asking("what?", picture(0)), **GREEDY)


def test_a_chat_template_that_leaves_pictures_out_is_refused(folder):
    own = GuidedModel.from_pretrained(folder, options=LoadOptions("cpu", "float32"))
    own.base.images.processor.chat_template = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    with pytest.raises(PromptError, match="it leaves out pictures or text"):
        own.generate(asking("what?", picture(0)), **GREEDY)


def test_a_network_whose_rows_are_not_exact_is_refused(folder):
    """Its positions behind pictures go on as in a text: later tokens are not where ``generate`` has them."""
    own = GuidedModel.from_pretrained(folder, options=LoadOptions("cpu", "float32"))
    inner = own.base.network.model
    forward = inner.forward

    def shifted(*args, position_ids=None, **kwargs):
        return forward(*args, position_ids=None if position_ids is None else position_ids + 40, **kwargs)

    inner.forward = shifted
    with pytest.raises(PromptError, match="gives other outputs when the answer is read behind a cached prompt"):
        own.generate(asking("what?", picture(0)), **GREEDY)


def test_without_pillow_the_extra_is_named(model, monkeypatch):
    import sys

    prompt = ImageReader(ImagesConfig()).read(Prompt.of(asking("?", picture(0))))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingDependencyError, match=r"ivg\[images\]"):
        ImageReader().decode(prompt.images[0])


def test_the_processor_needs_no_videos(folder, model):
    assert not hasattr(processor.load_processor(folder, model.base.network.config), "video_processor")
    assert torch.is_tensor(model.base.image_inputs(model.request(asking("?", picture(0)), "base").prompt).tensors["pixel_values"])
