"""Process rewards and chunks that are steps: numbers by hand, TRL's layout, the naive search."""

import gc
import json
import math

import pytest
import torch
from test_rewards import saved
from test_search import CountSteps, request, run

import naive
from ivg.cli.recipe_options import RecipeOptions
from ivg.engines.transformers.engine import TransformersEngine
from ivg.errors import ConfigError, ModelError, PromptError
from ivg.factory.recipe import load_models
from ivg.model import GuidedModel
from ivg.models.loading import LoadOptions
from ivg.search.methods import get_method
from ivg.search.searcher import Request, Search, Searcher
from ivg.search.unused import unused_settings
from ivg.serving.protocol import Guidance
from ivg.settings.recipe import Recipe
from ivg.testing import FakeEngine, byte_tokenizer, check_value, hypothesis, tiny_lm, tiny_model
from ivg.types import Message, Prompt, SamplingParams, Steps
from ivg.types.scores import judge_each
from ivg.types.steps import aggregate, finished_steps, split_steps
from ivg.values.base import FunctionValue
from ivg.values.implicit import AutoregressiveReward, ImplicitValue
from ivg.values.process import ProcessReward
from ivg.values.reward import RewardModel, StepwiseReward, load_reward

pytestmark = pytest.mark.numerics
HOW = ("last", "min", "mean", "product")


def classifier(labels=2, kind="Token", seed=3, **settings):
    """A random classifier over the byte tokenizer's ids."""
    import transformers

    torch.manual_seed(seed)
    config = tiny_model("llama").config
    config.num_labels, config.pad_token_id = labels, 0
    for name, value in settings.items():
        setattr(config, name, value)
    return getattr(transformers, f"Llama{kind.title()}Classification".replace("Token", "ForToken").replace("Sequence", "ForSequence"))(
        config
    )


def probabilities(network, prompt, steps, separator="\n"):
    """p of each step from a pass of its own, ids as TRL's PRMTrainer writes them: bos, prompt, then each step and the separator apart."""
    ids = byte_tokenizer()
    read = [ids.bos_token_id, *ids(prompt).input_ids]
    out = []
    for step in steps:
        read += [*ids(step).input_ids, *ids(separator).input_ids]
        logits = network(torch.tensor([read])).logits[0, -1]
        out.append(float(logits.softmax(-1)[1] if len(logits) == 2 else logits[0].sigmoid()))
    return out


def by_hand(p, how):
    return {"last": p[-1], "min": min(p), "mean": sum(p) / len(p), "product": math.log(math.prod(p))}[how]


@pytest.mark.parametrize("how,expected", [("last", 0.8), ("min", 0.5), ("mean", 2.2 / 3), ("product", math.log(0.36))])
def test_aggregation_by_hand(how, expected):
    assert aggregate([math.log(p) for p in (0.9, 0.5, 0.8)], how) == pytest.approx(expected)


def test_the_product_of_many_steps_stays_a_number():
    """1000 steps of p = 0.1: the product itself is 0 in float64."""
    assert aggregate([math.log(0.1)] * 1000, "product") == pytest.approx(1000 * math.log(0.1))


@pytest.mark.parametrize("text,steps,finished", [
    ("a\nb\n", ["a", "b"], 2), ("a\nb", ["a", "b"], 1), ("a\n\n\nb\n ", ["a", "b"], 2), ("\n\na", ["a"], 0), ("", [""], 0),
    (" \n", [" \n"], 0),
])  # fmt: skip
def test_steps_by_hand(text, steps, finished):
    assert split_steps(text, "\n") == steps
    assert finished_steps(text, "\n") == finished


# A classifier of tokens


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("how", HOW)
def test_scores_are_those_of_trls_layout(labels, how):
    network = classifier(labels).eval()
    reward = ProcessReward(network, byte_tokenizer(), aggregation=how)
    texts = {"One.\nTwo two.\n": ["One.", "Two two."], "One.\n\nTwo": ["One.", "Two"], "x": ["x"], " y\n": [" y"], "": [""]}
    found = reward.judge([(Prompt("What?"), text) for text in texts])
    with torch.no_grad():
        expected = [by_hand(probabilities(network, "What?", steps), how) for steps in texts.values()]
    assert found == pytest.approx(expected, abs=1e-5)
    assert len({round(x, 4) for x in found}) == len(texts)


def test_other_separators_and_labels():
    network = classifier(3).eval()
    reward = ProcessReward(network, byte_tokenizer(), label=2, separator="; ")
    ids = [0, *byte_tokenizer()("Q").input_ids, *byte_tokenizer()("a").input_ids, *byte_tokenizer()("; ").input_ids]
    with torch.no_grad():
        expected = network(torch.tensor([ids])).logits[0, -1].softmax(-1)[2]
    assert reward.judge([(Prompt("Q"), "a; ")]) == [pytest.approx(float(expected), abs=1e-6)]
    for bad in (
        {},
        {"label": 3},
        {"label": 0, "template": "{prompt}{response}"},
        {"label": 0, "aggregation": "best"},
        {"label": 0, "separator": ""},
    ):
        with pytest.raises(ConfigError):
            ProcessReward(network, byte_tokenizer(), **bad)


def test_a_chat_is_read_up_to_where_the_answer_begins():
    network = classifier().eval()
    reward = ProcessReward(network, byte_tokenizer(chat=True))
    chat, begun = Prompt((Message("user", "Hi"),)), Prompt((Message("user", "Hi"), Message("assistant", "One")))
    with torch.no_grad():
        expected = probabilities(network, "<user>Hi\n<assistant>", ["One two", "3"])[-1]
    assert reward.judge([(chat, "One two\n3"), (begun, " two\n3")]) == [pytest.approx(expected, abs=1e-5)] * 2


def test_a_prompt_that_is_too_long_loses_its_beginning():
    network = classifier(max_position_embeddings=24).eval()
    reward = ProcessReward(network, byte_tokenizer())
    prompt = Prompt("0123456789" * 3)
    with torch.no_grad():
        expected = probabilities(network, "7890123456789"[-12:], ["abc", "defg"])[-1]
    assert reward.limit == 24
    assert "beginning of the prompt was left out" in reward.note(prompt, "abc\ndefgh\n")
    kept = 24 - 1 - len("abc\ndefg\n")
    with torch.no_grad():
        expected = probabilities(network, prompt.content[-kept:], ["abc", "defg"])[-1]
    assert reward.judge([(prompt, "abc\ndefg\n")]) == [pytest.approx(expected, abs=1e-5)]
    good, bad = judge_each(reward, [(prompt, "abc"), (prompt, "x" * 40)])
    assert isinstance(good, float)
    assert "the steps alone have 41" in bad


def test_laws():
    lm = tiny_lm("base")
    chain = [hypothesis("Why?", text, lm) for text in ("a", "a\nb", "a\nb\nc")]
    check_value(
        lambda: ProcessReward(classifier(), byte_tokenizer()), [chain, [hypothesis("I", text, lm) for text in ("x", "x\n", "x\ny")]]
    )
    check_value(lambda: StepwiseReward(RewardModel(classifier(1, "Sequence"), byte_tokenizer())), [chain])


# A classifier of texts


@pytest.mark.parametrize("labels", [1, 2])
def test_a_classifier_of_texts_is_read_at_each_step(labels):
    whole = RewardModel(classifier(labels, "Sequence"), byte_tokenizer())
    logits = whole.judge([(Prompt("Q "), text) for text in ("One.", "One.\n\nTwo.", "One.\n\nTwo.\n x")])
    p = [1 / (1 + math.exp(-x)) for x in logits]
    for how in HOW:
        steps = whole.with_steps(Steps(how))
        assert steps.judge([(Prompt("Q "), "One.\n\nTwo.\n x")]) == [pytest.approx(by_hand(p, how), abs=1e-5)]
    assert whole.with_steps(Steps(None, "\n\n")) is None  # without an aggregation it reads the whole response
    with pytest.raises(ConfigError, match="log-odds"):
        RewardModel(classifier(3, "Sequence"), byte_tokenizer(), label=1).with_steps(Steps("min"))


# Where they are named


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    for name, network in {"process": classifier(), "whole": classifier(1, "Sequence"), "base": tiny_model()}.items():
        (folder / name).mkdir()
        saved(network, folder / name)
    return folder


def test_the_checkpoint_says_what_it_is(hub):
    options = LoadOptions(dtype="float32")
    assert isinstance(load_reward(hub / "process", options=options), ProcessReward)
    assert isinstance(load_reward(hub / "whole", options=options), RewardModel)
    with pytest.raises(ModelError, match=r"ivg\.ProcessReward and --reward"):
        RewardModel.from_pretrained(hub / "process", options=options)
    with pytest.raises(ModelError):
        ProcessReward.from_pretrained(hub / "whole", options=options)


def test_recipe_and_request(hub):
    """The aggregation is the request's; equal ones share an object, so that they are scored together."""
    tables = {"models": {"base": str(hub / "base"), "reward": str(hub / "process")}, "run": {"dtype": "float32"}}
    recipe = Recipe.parse({**tables, "search": {"method": "prm", "step_aggregation": "min", "step_separator": ";"}})
    model = load_models(recipe)
    assert "prm" in model.methods
    first, again, other = (model.request("x", "prm", step_aggregation=how).search.value for how in ("min", "min", "product"))
    assert first is again is not other
    assert (first.aggregation, other.aggregation, first.network) == ("min", "product", other.network)
    read = model.request("x", recipe.search.method, **recipe.search.settings()).search
    assert (read.value.aggregation, read.value.separator, read.chunk_until) == ("min", ";", "\n")
    assert model.request("x", "bon", step_separator="\n\n").search.value.separator == "\n\n"
    assert model.request("x", "bon").search.value is model.values["reward"]
    for n in range(200):  # a client may send any number of separators: objects for all of them would never be freed
        model.request("x", "prm", step_separator=f"{n};")
    assert sum(isinstance(found, ProcessReward) for found in gc.get_objects()) < 100
    done = model.generate("Why?", "prm", width=2, successors=2, max_new_tokens=6, seed=1)
    assert 0 < done.score < 1
    assert done.usage.forward_tokens["reward"] > 0
    assert done.score == pytest.approx(model.values["reward"].judge([(Prompt("Why?"), done.text)])[0], abs=1e-5)


def test_command_line_and_http_body():
    given = {"search_chunk_until": "\\n\\n", "search_step_aggregation": "product", "search_step_separator": ";", "search_method": "prm"}
    search = RecipeOptions("search").build(given).search
    assert (search.chunk_until, search.step_aggregation, search.step_separator) == ("\n\n", "product", ";")
    body = Guidance.model_validate({"method": "prm", "chunk_until": "\n\n", "step_aggregation": "product", "step_separator": ";"})
    assert body.search == search.settings()
    assert unused_settings("eft", {"step_aggregation": "min"}) and not unused_settings("prm", {"step_aggregation": "min"})
    assert not unused_settings("custom", {"select_weights": "mine=1,implicit=1", "step_aggregation": "min"})


def test_values_without_steps_are_refused():
    value = {"explicit": FunctionValue(lambda p, r: 0.0)}
    with pytest.raises(ConfigError, match="step_aggregation='min' is for process rewards, and no value here"):
        get_method("bon", step_aggregation="min").search(value)
    with pytest.raises(ConfigError, match="step_separator"):
        get_method("bon", step_separator=";").search(value)


# Chunks that are steps


def test_chunks_end_at_a_text():
    """Every beam that is kept has ended one step more than the one that it grew from, or is finished."""
    search = Search(width=2, successors=3, chunk_until="c", value=CountSteps("steps", "mean", "c"))
    seen = []
    for seed in range(6):
        chunks = 0
        for step in run(FakeEngine("abc"), request(search, seed, max_new_tokens=25, ignore_eos=True)):
            if step.kept:
                chunks += 1
            for node in step.kept:
                assert node.finish or (node.text.endswith("c") and finished_steps(node.text, "c") == chunks), (node.text, chunks)
                seen.append(node.finish)
    assert seen.count(None) > 30


def test_white_space_is_no_step_and_the_length_is_a_limit():
    engine = FakeEngine("x\n", lambda text: [0, 1, 0] if text[-1:] == "x" or text[-2:] == "x\n" else [1, 0, 0])  # x \n \n x \n \n …
    search = Search(width=1, successors=2, chunk_until="\n", value=CountSteps("steps"))
    kept = [s.kept[0].text for s in run(engine, request(search, max_new_tokens=7)) if s.kept]
    assert kept == ["x\n", "x\n\nx\n", "x\n\nx\n\nx"]
    short = Search(width=1, successors=2, chunk_length=2, chunk_until="\n", value=CountSteps("steps"))
    assert [len(s.kept[0].text) for s in run(engine, request(short, max_new_tokens=7)) if s.kept] == [2, 4, 5, 7]


def test_soft_selection_draws_anew_in_every_chunk():
    """A finished beam that stays the longest: which of two equal beams comes first is drawn again in the next chunk."""

    def weights(text):  # aaaaaa and the end, or the steps bc bc bc …
        if not text:
            return [1, 1, 0, 0]
        return [0, 1, 0, 0] if text[-1] == "c" else [0, 0, 1, 0] if text[-1] == "b" else [1, 0, 0, 0] if len(text) < 6 else [0, 0, 0, 1]

    search = Search(width=2, successors=1, chunk_until="c", rule="soft", value=FunctionValue(lambda p, r: 0.0))
    same = []
    for seed in range(400):
        kept = [s.kept for s in run(FakeEngine("abc", weights), request(search, seed, max_new_tokens=12)) if s.kept]
        long = next((n for n in kept[0] if n.text == "aaaaaa"), None)
        short = next((n for n in kept[0] if n.text == "bc"), None)
        if long is not None and short is not None and long.key < short.key and len(kept) > 1:
            same.append((kept[0][0].text == "aaaaaa") == (kept[1][0].text == "aaaaaa"))
    assert len(same) > 50
    assert 0.3 < sum(same) / len(same) < 0.7


@pytest.fixture(scope="module")
def ascii_base():
    return ascii_lm("base", 1)


def ascii_lm(name, seed):
    """A model that writes lines of letters: its head has a bias that forbids other bytes and likes line breaks."""
    base = tiny_lm(name, seed=seed)
    network, tokenizer = base.network, base.tokenizer
    head = torch.nn.Linear(network.lm_head.in_features, network.lm_head.out_features)
    letters = tokenizer("abcdefghijklmno pqrstuvwxyz\n").input_ids
    with torch.no_grad():
        head.weight.copy_(0.5 * network.lm_head.weight)
        head.bias.fill_(-1000.0)
        head.bias[letters] = 0.0
        head.bias[letters[-1]] = 2.0
        head.bias[0] = 0.5
    network.lm_head = head
    return base


@pytest.mark.parametrize("settings", [
    {"step_aggregation": "last"}, {"step_aggregation": "min", "chunk_length": 6}, {"step_aggregation": "mean", "rule": "soft"},
    {"step_aggregation": "product", "token": "implicit", "beta": 0.3}, {"token": "implicit", "draft": 3, "beta": 0.3}, {"width": 1},
    {"guide_after": "e", "rule": "soft"}, {"guide_after": "e", "token": "implicit", "beta": 0.3},
], ids=lambda s: "-".join(map(str, s.values())))  # fmt: skip
def test_the_search_over_steps_equals_naive(ascii_base, settings):
    pair = tiny_lm("tuned", seed=2), tiny_lm("untuned", seed=3)
    network, ids, text = classifier().eval(), byte_tokenizer(), byte_tokenizer().decode
    s = get_method("prm", **{"width": 2, "successors": 2, **settings})
    values = {"implicit": ImplicitValue(*pair), "reward": ProcessReward(network, byte_tokenizer())}
    oracle = {
        "implicit": naive.Implicit(*(m.network for m in pair)),
        "reward": naive.ProcessReward(
            network, lambda t: ids(t).input_ids, lambda y: text([t for t in y if t]), s.step_aggregation, s.step_separator or "\n"
        ),
    }
    searcher, ended = Searcher(TransformersEngine(ascii_base)), 0
    for seed in range(3):
        prompt = ascii_base.tokenizer("why").input_ids
        ((_, got),) = searcher.run([Request(Prompt("why"), s.search(values), SamplingParams(max_new_tokens=20), seed, trace=True)])
        marker = ascii_base.tokenizer(s.guide_after or "").input_ids
        with_bos = {**oracle, "reward": BehindBos(oracle["reward"])}
        tokens, score = naive.search(
            ascii_base.network, with_bos, s, prompt, seed, 1.0, 20, marker=marker, text=lambda y: text([t for t in y if t])
        )
        assert list(got.token_ids) == tokens
        assert (-math.inf if got.score is None else got.score) == pytest.approx(score, abs=1e-4)  # None: no answer has begun
        ended += sum("\n" in node.text for step in got.trace for node in step.kept)
    assert ended > 3
    assert ascii_base.model.live_rows == 0


def test_drafts_of_another_model_end_at_steps(ascii_base):
    """Reward-guided speculative decoding by steps, as its paper has it."""
    values = {"arm": AutoregressiveReward(ascii_lm("arm", 7)), "reward": ProcessReward(classifier(), byte_tokenizer())}
    s = get_method("rsd", drafter="arm", select="reward", chunk_length=24, chunk_until="\n", accept_threshold=0.4)
    searcher, kept = Searcher(TransformersEngine(ascii_base)), []
    for seed in range(4):
        ((_, got),) = searcher.run([Request(Prompt("why"), s.search(values), SamplingParams(max_new_tokens=24), seed, trace=True)])
        assert got.error is None
        kept += [node for step in got.trace for node in step.kept]
    assert all(node.finish or node.text == "" or node.text.endswith("\n") for node in kept)
    assert sum(node.text.count("\n") for node in kept) > 6
    assert ascii_base.model.live_rows == 0


class BehindBos:
    """The oracle's prompt behind a beginning-of-sequence token, as TRL writes it."""

    def __init__(self, value):
        self.value, self.deltas = value, None

    def score(self, prompt, y):
        return self.value.score([0, *prompt], y)


def test_an_engine_that_cannot_says_so():
    class Whole(FakeEngine):
        unsupported = {"until": "use another"}  # noqa: RUF012

    with pytest.raises(ConfigError, match="until"):
        run(Whole("ab"), request(Search(chunk_until="b")))
    model = GuidedModel(tiny_lm("base"))
    assert "prm" not in model.methods
    json.dumps(model.get_method("prm").chunk_until)
    with pytest.raises((ConfigError, PromptError)):
        model.generate("x", "prm")
