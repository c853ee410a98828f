"""Prompts with pictures: transformers' own answers, guided answers as without a cache, and what is refused."""

import pytest
import torch
from transformers import AutoModelForImageTextToText

import naive
from ivg import GuidedModel, LoadOptions
from ivg.models.state_cache import StateRow
from ivg.search.methods import get_method
from ivg.settings.models import ModelRef
from ivg.testing import byte_tokenizer, tiny_lm, tiny_value
from ivg.types import Prompt
from ivg.values.implicit import ImplicitValue
from vision import KINDS, MORE, BehindOwnPrompt, WithPictures, asking, checkpoint, data_url, picture, processed

pytestmark = pytest.mark.numerics

FLOAT32 = LoadOptions("cpu", "float32")
GREEDY = {"method": "base", "temperature": 0.0, "max_new_tokens": 12}
SEED = 5
CHATS = [
    asking("what?", picture(0)),
    asking("what?", picture(1)),
    asking("what?", picture(0, 64, 30), picture(2)),
    [*asking("a", picture(1)), {"role": "assistant", "content": "yes"}, *asking("b?", picture(0)), {"role": "user", "content": "and?"}],
    [{"role": "user", "content": "no picture"}],
]


@pytest.fixture(scope="module", params=[*KINDS, *(pytest.param(kind, marks=pytest.mark.long) for kind in MORE)])
def folder(request, tmp_path_factory):
    return checkpoint(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def model(folder):
    return GuidedModel.from_pretrained(folder, options=FLOAT32)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return checkpoint("llava", tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def llava_model(llava):
    return GuidedModel.from_pretrained(llava, options=FLOAT32)


def generated(folder, conversation, **settings):
    network = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = processed(folder, conversation, **settings)
    out = network.generate(**inputs, max_new_tokens=12, do_sample=False)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def test_greedy_answers_are_those_of_generate_in_one_batch_and_alone(folder, model):
    expected = [generated(folder, chat) for chat in CHATS]
    model.reset_caches()
    assert [list(c.token_ids) for c in model.generate(CHATS, **GREEDY)] == expected
    assert [list(model.generate(chat, **GREEDY).token_ids) for chat in reversed(CHATS)] == expected[::-1]
    model.reset_caches()
    assert [list(model.generate(chat, **GREEDY).token_ids) for chat in CHATS] == expected
    assert len({tuple(answer) for answer in expected[:3]}) > 1  # pictures matter
    assert model.base.model.live_rows == 0


def test_chat_settings_and_instructions_are_those_of_a_text(llava):
    chat = asking("what?", picture(0))
    begun = [*chat, {"role": "assistant", "content": "It is"}]
    own = GuidedModel.from_pretrained(ModelRef(path=str(llava), system="Be brief."), options=FLOAT32)
    own.base.images.processor.chat_template += "{{ word }}"
    told = [{"role": "system", "content": "Be brief."}, *chat]
    assert own.base.tokenizer.decode(own.base.prompt_ids(own.request(chat, "base").prompt)).startswith("<system>Be brief.<user><image>")
    assert list(own.generate(chat, **GREEDY).token_ids) == generated(llava, told)
    plain = GuidedModel.from_pretrained(llava, options=FLOAT32)
    settings = {"add_generation_prompt": False, "continue_final_message": True}
    assert list(plain.generate(begun, **GREEDY).token_ids) == generated(llava, begun, **settings)
    assert list(plain.generate(begun, add_generation_prompt=True, **GREEDY).token_ids) == generated(llava, begun)
    ids = own.base.prompt_ids(own.request(chat, "base", chat_template_kwargs={"word": "now"}).prompt)
    assert own.base.tokenizer.decode(ids).endswith("<assistant>now")


def guides(tok):
    """Text-only guides."""
    pair = [tiny_lm(name, seed=seed, tokenizer=tok) for name, seed in (("tuned", 2), ("untuned", 3))]
    return {"implicit": ImplicitValue(*pair), "explicit": tiny_value(seed=5, tokenizer=tok)}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ivg", {"width": 2, "successors": 2, "chunk_length": 3}),
        ("bon", {"successors": 3}),
        ("base", {}),
        ("fudge", {"candidates": 4}),
    ],
)
def test_guided_answers_are_those_without_a_cache(folder, model, name, settings):
    method = get_method(name).with_settings(**settings)
    values = guides(model.base.tokenizer)
    guided = GuidedModel(model.base, values)
    done = guided.generate(CHATS[:4], method, temperature=1.0, max_new_tokens=8, seed=SEED)
    for chat, completion in zip(CHATS, done, strict=False):
        inputs = processed(folder, chat)
        ids, prompt = inputs["input_ids"][0].tolist(), Prompt.of(chat)

        def own(reader, prompt=prompt, ids=ids):
            return BehindOwnPrompt(reader.network, len(ids), reader.prompt_ids(prompt))

        pair, explicit = values["implicit"], values["explicit"]
        references = {"implicit": naive.Implicit(own(pair.tuned), own(pair.untuned)), "explicit": naive.QHead(own(explicit.model))}
        reference = WithPictures(model.base.network, inputs)
        expected = naive.search(reference, references, method, ids, SEED, 1.0, 8)
        assert list(completion.token_ids) == expected[0]
        if method.select:
            assert completion.score == pytest.approx(expected[1], abs=2e-3)


def test_guides_read_the_text_alone():
    prompt = Prompt.of(
        [{"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "image", "path": "x"}, {"type": "text", "text": "b"}]}]
    )
    reader = tiny_lm(tokenizer=byte_tokenizer(chat=True))
    assert reader.tokenizer.decode(reader.prompt_ids(prompt)) == "<user>a b\n<assistant>"


def test_a_prompt_with_pictures_is_one_unit_and_is_kept_by_its_pixels(model):
    runner, encoder = model.base.model, model.base
    runner.reset_cache()
    first, second, other = (model.request(chat, "base").prompt for chat in (CHATS[0], asking("what?", picture(0)), CHATS[1]))
    assert first == second
    assert first != other
    inputs = [encoder.image_inputs(prompt) for prompt in (first, other)]
    assert inputs[0].ids == inputs[1].ids
    assert inputs[0].digest != inputs[1].digest
    length = inputs[0].length
    row = runner.open(inputs[0].ids, images=inputs[0])
    assert isinstance(row, StateRow)
    before = runner.last_outputs([row], [list(inputs[0].ids)])[0]
    runner.last_outputs([row], [[65, 66, 67]])
    runner.truncate(row, length + 2)
    assert len(row.ids) == length
    again = runner.last_outputs([row], [[inputs[0].ids[-1]]])[0]
    torch.testing.assert_close(again, before, atol=1e-4, rtol=1e-4)
    runner.truncate(row, length - 1)
    assert row.ids == []  # inside the prompt nothing is kept
    torch.testing.assert_close(runner.last_outputs([row], [list(inputs[0].ids)])[0], before, atol=1e-4, rtol=1e-4)
    late, unlike = (runner.open(images.ids, images=images) for images in inputs)
    assert (len(late.ids), unlike.ids) == (length, [])
    runner.reset_cache()


def test_long_prompts_with_pictures_are_not_cut(llava):
    from ivg.models.cache import PassLimits
    from ivg.models.runner import ModelRunner

    model = GuidedModel.from_pretrained(llava, options=FLOAT32)
    expected = list(model.generate(CHATS[0], **GREEDY).token_ids)
    model.base.model = ModelRunner(model.base.network, "base", PassLimits(row_tokens=4))
    assert list(model.generate(CHATS[0], **GREEDY).token_ids) == expected


def test_the_answers_of_one_request_share_the_pass_over_the_pictures(llava_model):
    llava_model.generate(CHATS[0], **GREEDY)  # tries the network
    llava_model.reset_caches()
    passes = []
    network = llava_model.base.network
    hook = network.register_forward_pre_hook(lambda _, __, given: passes.append("pixel_values" in given), with_kwargs=True)
    llava_model.generate(CHATS[0], "base", n=4, max_new_tokens=6, seed=3)
    hook.remove()
    assert sum(passes) == 1


def test_every_shape_of_a_picture_is_the_same(llava_model, tmp_path):
    picture(0).save(tmp_path / "p.png")
    url, path = data_url(picture(0)), str(tmp_path / "p.png")
    parts = [
        {"type": "image_url", "image_url": {"url": url, "detail": "auto"}},
        {"type": "image_url", "image_url": url},
        {"type": "input_image", "image_url": url},
        {"type": "image", "url": url},
        {"type": "image", "path": path},
        {"type": "image", "url": f"file://{path}"},
        {"type": "image", "image": picture(0)},
        {"type": "image", "image": (tmp_path / "p.png").read_bytes()},
        {"type": "image", "path": tmp_path / "p.png"},
        {"type": "image", "base64": url.partition(",")[2]},
    ]
    chats = [[{"role": "user", "content": [part, {"type": "text", "text": "what?"}]}] for part in parts]
    answers = {c.token_ids for c in llava_model.generate(chats, **GREEDY)}
    assert answers == {llava_model.generate(CHATS[0], **GREEDY).token_ids}


@pytest.mark.parametrize("name", ["explicit", "implicit"])
def test_values_score_answers_to_pictures_by_the_text(llava_model, name):
    model = GuidedModel(llava_model.base, guides(llava_model.base.tokenizer))
    scores = model.score(CHATS[0], ["yes", "no"], name)
    assert scores == pytest.approx(model.score([{"role": "user", "content": "what?"}], ["yes", "no"], name), abs=1e-4)
