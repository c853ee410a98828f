"""Inspect AI: the guided model as a provider, found by its entry point, in real evaluations."""

import asyncio
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ivg import GuidedModel, LoadOptions
from ivg.errors import ConfigError, PromptError
from ivg.testing import tiny_lm
from ivg.values.implicit import ImplicitValue
from tool_chats import ANSWERED, MISTRAL, tokenizer
from vision import asking, checkpoint, data_url, picture

inspect_ai = pytest.importorskip("inspect_ai", reason="inspect-ai is not installed: pip install 'ivg[inspect]'")
from inspect_ai.dataset import Sample  # noqa: E402
from inspect_ai.model import (  # noqa: E402
    ChatMessageAssistant,
    ChatMessageTool,
    ChatMessageUser,
    ContentAudio,
    ContentImage,
    ContentReasoning,
    ContentText,
    GenerateConfig,
    get_model,
)
from inspect_ai.scorer import includes  # noqa: E402
from inspect_ai.solver import generate  # noqa: E402
from inspect_ai.tool import ToolCall, ToolCallError  # noqa: E402

from ivg.integrations.inspect_ai import IVGModelAPI  # noqa: E402

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def embedded():
    return GuidedModel.embedded(LoadOptions(dtype="float32"))


def test_an_evaluation(embedded, tmp_path):
    samples = [Sample(input=text, target="movie") for text in ("I think this is a very good", "The plot of the film")]
    task = inspect_ai.Task(dataset=samples, solver=generate(), scorer=includes())
    model = get_model("ivg/eft", guided_model=embedded, memoize=False)
    config = {"max_tokens": 12, "temperature": 0.8, "seed": 3, "num_choices": 2, "logprobs": True, "top_logprobs": 2, "stop_seqs": ["."]}
    (log,) = inspect_ai.eval(task, model=model, log_dir=str(tmp_path), display="none", **config)
    assert log.status == "success", log.error
    for sample in log.samples:
        expected = embedded.generate(sample.input, "eft", n=2, max_new_tokens=12, temperature=0.8, seed=3, stop=".", alternatives=2)
        assert [c.message.text for c in sample.output.choices] == [c.text for c in expected]
        assert [c.stop_reason for c in sample.output.choices] == ["max_tokens" if c.finish_reason == "length" else "stop" for c in expected]
        for choice, completion in zip(sample.output.choices, expected, strict=True):
            content = choice.logprobs.content
            assert [x.logprob for x in content] == pytest.approx([d.logprob for d in completion.details], abs=1e-3)
            assert [[t.logprob for t in x.top_logprobs] for x in content] == [
                pytest.approx([p for _, p in d.top], abs=1e-3) for d in completion.details
            ]
        assert sample.output.usage.output_tokens == sum(c.usage.completion_tokens for c in expected)
    assert log.results.scores[0].metrics["accuracy"].value == sum("movie" in s.output.completion for s in log.samples) / 2


def test_epochs_are_other_samples(embedded, tmp_path):
    task = inspect_ai.Task(dataset=[Sample(input="The film was", target="x")], solver=generate(), scorer=includes(), epochs=3)
    model = get_model("ivg/eft", guided_model=embedded, memoize=False)
    for seed, different in ((None, 3), (3, 1)):
        config = GenerateConfig(max_tokens=12, temperature=1.0, **({} if seed is None else {"seed": seed}))
        (log,) = inspect_ai.eval(task, model=model, log_dir=str(tmp_path), display="none", **config.model_dump(exclude_none=True))
        assert log.status == "success", log.error
        assert len({s.output.completion for s in log.samples}) == different


def test_a_logit_bias(embedded):
    turn = ChatMessageUser(content="The film was")
    config = GenerateConfig(logit_bias={100: 100.0}, max_tokens=4, temperature=0.0, reasoning_effort="none")
    found = asyncio.run(IVGModelAPI("eft", guided_model=embedded).generate([turn], [], "auto", config))
    assert found.completion == embedded.generate(turn.text, "eft", logit_bias={100: 100}, max_new_tokens=4, temperature=0.0).text
    assert found.completion == embedded.base.vocabulary.decode([100] * 4)


def test_the_example(embedded, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2] / "examples" / "inspect")
    model = get_model("ivg/eft", guided_model=embedded, memoize=False)
    (log,) = inspect_ai.eval("reviews.py", model=model, log_dir=str(tmp_path), display="none")
    assert log.status == "success", log.error
    assert len(log.samples) == 4 and all(len(s.output.completion) > 5 for s in log.samples)
    assert log.results.scores[0].metrics["accuracy"].value == sum(s.scores["praises"].value for s in log.samples) / 4


def test_inspect_finds_the_provider_by_its_entry_point(tmp_path):
    """In a process that imports nothing of ivg, with the entry points of pyproject.toml as an installed package has them."""
    entry_points = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["entry-points"]["inspect_ai"]
    info = tmp_path / "ivg_entry_point-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ivg-entry-point\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[inspect_ai]\n" + "".join(f"{k} = {v}\n" for k, v in entry_points.items()))
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from inspect_ai.model import get_model; print(type(get_model('ivg/base').api))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
    assert "ivg.integrations.inspect_ai" in done.stdout, done.stderr[-2000:]


def ask(model, turns, method="base", **config):
    """Greedy answer of the provider."""
    made = GenerateConfig(**{"temperature": 0.0, "max_tokens": 8, **config})
    return asyncio.run(IVGModelAPI(method, guided_model=model).generate(turns, [], "auto", made))


def test_pictures_reach_the_base(tmp_path):
    model = GuidedModel.from_pretrained(checkpoint("llava", tmp_path), options=LoadOptions("cpu", "float32"))
    found = []
    for seed in (0, 1):
        image = picture(seed)
        content = [ContentText(text="What is"), ContentText(text="this?"), ContentImage(image=data_url(image)), ContentText(text="Well?")]
        parts = [{"type": "text", "text": "What is\nthis?"}, {"type": "image", "image": image}, {"type": "text", "text": "Well?"}]
        expected = model.generate([{"role": "user", "content": parts}], "base", temperature=0.0, max_new_tokens=8)
        given = ask(model, [ChatMessageUser(content=content)])
        assert given.completion == expected.text
        assert given.usage.input_tokens == expected.usage.prompt_tokens
        found.append(given.completion)
    assert found[0] != found[1]
    file = tmp_path / "0.png"
    picture(0).save(file)
    without_length = ask(model, [ChatMessageUser(content=[ContentImage(image=str(file))])], max_tokens=None, stop_seqs=["e"])
    expected = model.generate(asking("", picture(0))[:1], "base", temperature=0.0, max_new_tokens=400, stop="e")
    assert without_length.usage.input_tokens == expected.usage.prompt_tokens


def test_content_that_no_one_reads_is_refused(embedded):
    with_picture = [ChatMessageUser(content=[ContentText(text="What is it?"), ContentImage(image=data_url(picture()))])]
    for model in (embedded, GuidedModel(tiny_lm("base", tokenizer=tokenizer(MISTRAL)))):
        for length in (4, None):
            with pytest.raises(PromptError, match=r"the prompt has pictures, but .*reads text alone"):
                ask(model, with_picture, max_tokens=length)
    audio = [ChatMessageUser(content="Hi"), ChatMessageUser(content=[ContentText(text="Hear"), ContentAudio(audio="a.wav", format="wav")])]
    with pytest.raises(ConfigError, match=r"messages\[1\]\.content\[1\] is of type 'audio'.*\n  expected text or pictures"):
        ask(embedded, audio)
    thought = ContentReasoning(reasoning="Hm.")
    with pytest.raises(ConfigError, match="is of type 'reasoning'"):
        ask(embedded, [ChatMessageUser(content=[thought, ContentText(text="The movie was")])])
    turns = [ChatMessageUser(content="Well?"), ChatMessageAssistant(content=[thought, ContentText(text="The movie was")])]
    assert ask(embedded, turns).completion == embedded.generate("Well?\nThe movie was", "base", temperature=0.0, max_new_tokens=8).text


def test_calls_of_tools_and_their_results_are_read(embedded):
    call = ToolCall(id="callabcde", function="get_weather", arguments={"city": "Zürich", "days": [1, 2]})
    turns = [
        ChatMessageUser(content="How is the weather?"),
        ChatMessageAssistant(content="", tool_calls=[call]),
        ChatMessageTool(content="sunny, 21 degrees", tool_call_id=call.id, function=call.function),
    ]
    failed = [*turns[:2], turns[2].model_copy(update={"content": "", "error": ToolCallError("timeout", "too slow")})]
    model = GuidedModel(tiny_lm("base", tokenizer=tokenizer(MISTRAL), context=1024))
    for given, result in ((turns, "sunny, 21 degrees"), (failed, "Error: too slow")):
        expected = model.generate([*ANSWERED[:2], {**ANSWERED[2], "content": result}], "base", temperature=0.0, max_new_tokens=8)
        found = ask(model, given)
        assert (found.completion, found.usage.input_tokens) == (expected.text, expected.usage.prompt_tokens)
        text = f'How is the weather?\n{{"name": "get_weather", "arguments": {{"city": "Zürich", "days": [1, 2]}}}}\n{result}'
        expected = embedded.generate(text, "base", temperature=0.0, max_new_tokens=8)
        found = ask(embedded, given)
        assert (found.completion, found.usage.input_tokens) == (expected.text, expected.usage.prompt_tokens)


def tiny_pair(base, guides):
    """A model whose base and guides read so many tokens."""
    made = [tiny_lm(name, seed=i, context=n) for i, (name, n) in enumerate((("base", base), ("tuned", guides), ("untuned", guides)))]
    return GuidedModel(made[0], {"implicit": ImplicitValue(*made[1:])})


@pytest.mark.parametrize(
    ("contexts", "method", "settings", "expected"),
    [
        ((200, 100), "base", {}, 190),
        ((200, 100), "eft", {}, 90),
        ((2100, 100), "base", {}, 2048),
        ((200, 100), "base", {"max_new_tokens": 60}, 60),
    ],
)
def test_answers_without_a_length_are_as_long_as_the_context_allows(contexts, method, settings, expected):
    provider = IVGModelAPI(method, guided_model=tiny_pair(*contexts), ignore_eos=True, **settings)
    found = asyncio.run(provider.generate([ChatMessageUser(content="ten bytes.")], [], "auto", GenerateConfig(temperature=0.0)))
    assert (found.usage.output_tokens, found.stop_reason) == (expected, "max_tokens")
    given = asyncio.run(provider.generate([ChatMessageUser(content="ten bytes.")], [], "auto", GenerateConfig(max_tokens=70)))
    assert given.usage.output_tokens == 70


def test_what_is_not_taken(embedded):
    provider = IVGModelAPI("eft", guided_model=embedded)
    body = GenerateConfig(extra_body={"guidance": {"beta": 0}})
    for config, tools, message in (
        (GenerateConfig(prompt_logprobs=1), [], "prompt_logprobs"),
        (body, [], "extra_body"),
        (GenerateConfig(verbosity="low"), [], "verbosity"),
        (GenerateConfig(effort="high"), [], "effort"),
        (GenerateConfig(), ["tool"], "tools"),
    ):
        with pytest.raises(ConfigError, match=message):
            asyncio.run(provider.generate([], tools, "auto", config))
    with pytest.raises(ConfigError, match="unknown argument bta"):
        IVGModelAPI("eft", guided_model=embedded, bta=1)
    assert IVGModelAPI("recipe", guided_model=embedded, method="base").method.name == "base"
