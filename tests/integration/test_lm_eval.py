"""EleutherAI's lm-evaluation-harness: the guided model in this process and over HTTP, beside the harness's own model ``hf``."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ivg import GuidedModel, LoadOptions
from ivg.embedded import path
from ivg.errors import ConfigError, PromptError
from ivg.models.prompt_template import PromptTemplate
from ivg.testing import byte_tokenizer, tiny_lm, tiny_value
from ivg.values.implicit import ImplicitValue
from serving_tools import Running

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'ivg[lm-eval]'")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from ivg.integrations.lm_eval import ChatContext, IVGModel  # noqa: E402

pytestmark = pytest.mark.long
TASKS = Path(__file__).parent / "lm_eval_tasks"
NAMES = ["reviews_choice", "reviews_perplexity", "reviews_answer"]


@pytest.fixture(scope="module")
def embedded():
    return GuidedModel.embedded(LoadOptions(dtype="float32"))


@pytest.fixture(autouse=True)
def folder(monkeypatch):
    monkeypatch.chdir(TASKS)


def evaluate(model, tasks=NAMES, **more):
    """(results, answers of every sample) by task."""
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    out = lm_eval.simple_evaluate(model=model, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, log_samples=True, **more)
    samples = {name: [[r[0] for r in s["resps"]] for s in sorted(some, key=lambda s: s["doc_id"])] for name, some in out["samples"].items()}
    return out["results"], samples


def numbers(samples, task):
    return [x[0] if isinstance(x, tuple | list) else x for row in samples[task] for x in row]


def test_without_guidance_as_the_harness_itself(embedded):
    _, theirs = evaluate("hf", model_args=f"pretrained={path('base')},dtype=float32", device="cpu")
    results, ours = evaluate(IVGModel(model=embedded, method="base"))
    for task in NAMES[:2]:
        assert numbers(ours, task) == pytest.approx(numbers(theirs, task), abs=1e-3)
    assert [[r[1] for r in row] for row in ours["reviews_choice"]] == [[r[1] for r in row] for row in theirs["reviews_choice"]]
    assert ours["reviews_answer"] == theirs["reviews_answer"]
    assert results["reviews_perplexity"]["word_perplexity,none"] > 1


def test_guided_numbers_by_hand(embedded):
    """Tokens and logits straight from transformers."""
    _, samples = evaluate(IVGModel(model=embedded, method="eft", beta=0.5), ["reviews_choice"])
    networks = [embedded.base.network, *(m.network for m in embedded.values["implicit"].cached_lms())]
    tokenizer = embedded.base.tokenizer
    for line, row in zip((TASKS / "reviews.jsonl").read_text().splitlines(), samples["reviews_choice"], strict=True):
        context = f"{json.loads(line)['text']} The movie was"
        for choice, (logprob, _) in zip((" wonderful", " awful"), row, strict=True):
            before, whole = (tokenizer(text).input_ids for text in (context, context + choice))
            with torch.no_grad():
                base, tuned, untuned = (n(input_ids=torch.tensor([whole])).logits[0].float() for n in networks)
            width = min(z.shape[1] for z in (base, tuned, untuned))
            base[:, :width] += 0.5 * (tuned[:, :width] - untuned[:, :width])
            logps = base.log_softmax(-1)
            expected = sum(float(logps[i - 1, whole[i]]) for i in range(len(before), len(whole)))
            assert logprob == pytest.approx(expected, abs=2e-3)


def test_over_http_as_in_this_process(embedded):
    _, here = evaluate(IVGModel(model=embedded, method="eft"))
    with Running(embedded, name="films") as server:
        arguments = {
            "model": "films:eft",
            "base_url": f"{server.url}/v1/completions",
            "tokenizer": str(path("base")),
            "max_length": 200,
            "add_bos_token": True,
        }
        _, there = evaluate("local-completions", model_args=arguments)
    assert numbers(there, "reviews_choice") == pytest.approx(numbers(here, "reviews_choice"), abs=2e-3)
    assert [[r[1] for r in row] for row in there["reviews_choice"]] == [[r[1] for r in row] for row in here["reviews_choice"]]
    assert numbers(there, "reviews_perplexity") == pytest.approx(numbers(here, "reviews_perplexity"), abs=2e-3)
    assert there["reviews_answer"] == here["reviews_answer"]


def test_command_line(tmp_path):
    arguments = ["--model_args", "method=eft,beta=0.5,dtype=float32", "--tasks", "reviews_choice", "--include_path", str(TASKS)]
    command = [sys.executable, "-m", "ivg.integrations.lm_eval", "--model", "ivg", *arguments, "--output_path", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = tmp_path.rglob("results_*.json")
    written = json.loads(file.read_text())
    assert set(written["results"]) == {"reviews_choice"} and "acc,none" in written["results"]["reviews_choice"]
    assert written["config"]["ivg_method"] == "eft" and written["config"]["ivg_search"]["beta"] == 0.5
    assert "|reviews_choice|" in done.stdout


def chat_model(**templates):
    tokens = byte_tokenizer(chat=True)
    networks = {name: tiny_lm(name, seed=i, tokenizer=tokens, context=1024) for i, name in enumerate(("base", "tuned", "untuned"))}
    made = {name: lm.sharing(name, templates.get(name)) for name, lm in networks.items()}
    return GuidedModel(networks["base"], {"implicit": ImplicitValue(made["tuned"], made["untuned"])})


def test_chats_are_read_by_every_model_in_its_own_template():
    model = chat_model(tuned="User: {prompt}\n\nA:", untuned="{prompt}")
    lm = IVGModel(model=model, method="eft")
    _, samples = evaluate(lm, ["reviews_choice"], apply_chat_template=True)
    docs = [json.loads(line)["text"] for line in (TASKS / "reviews.jsonl").read_text().splitlines()]
    for text, row in zip(docs, samples["reviews_choice"], strict=True):
        turns = [{"role": "user", "content": f"{text} The movie was"}]
        found = model.logprobs([turns, turns], ["wonderful", "awful"], "eft")
        assert [logprob for logprob, _ in row] == pytest.approx([r.logprob for r in found], abs=1e-3)
    context = lm.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert isinstance(context, ChatContext) and context == model.base.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )


def test_a_template_of_the_base_is_that_of_its_answers():
    base = tiny_lm("base").sharing("base", PromptTemplate("Q: {prompt}\nA:"))
    model = GuidedModel(base)
    lm = IVGModel(model=model, method="base")
    ((logprob, _),) = lm.loglikelihood([Instance("loglikelihood", {}, ("Why?", " so"), 0)])
    assert logprob == pytest.approx(model.logprobs("Why?", " so", "base").logprob, abs=1e-4)


def test_long_texts_go_through_windows_and_long_contexts_lose_their_beginning():
    model = GuidedModel(tiny_lm("base", context=64))
    lm = IVGModel(model=model, method="base")
    text = "The plot is thin, " * 12
    (total,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    hf_like = lm_eval.utils.get_rolling_token_windows(lm.tok_encode(text), lm.prefix_token_id, lm.max_length, 1)
    expected = 0.0
    for context, ids in map(lm_eval.utils.make_disjoint_window, hf_like):
        with torch.no_grad():
            logps = model.base.network(input_ids=torch.tensor([[*context, *ids]])).logits[0].log_softmax(-1)
        expected += sum(float(logps[len(context) + i - 1, t]) for i, t in enumerate(ids))
    assert total == pytest.approx(expected, abs=1e-2)
    text = text.rstrip()
    (cut,), (short,) = (lm.loglikelihood([Instance("loglikelihood", {}, (context, " good"), 0)]) for context in (text, text[-60:]))
    assert cut[0] == pytest.approx(short[0], abs=1e-3)


def test_texts_beyond_the_context_as_the_harness_itself():
    """Windows, cut contexts and prompts of answers: the models read what ``hf`` reads, the last token of a given text not."""
    base, tuned, untuned = (tiny_lm(name, seed=i, context=64) for i, name in enumerate(("base", "tuned", "untuned")))
    theirs = HFLM(pretrained=base.network, tokenizer=base.tokenizer, batch_size=1)
    model = GuidedModel(base, {"implicit": ImplicitValue(tuned, untuned)})
    ours = IVGModel(model=model, method="base")
    guided = IVGModel(model=model, method="eft", beta=0.0)
    assert ours.max_length == guided.max_length == theirs.max_length == 64
    long = "The plot is thin, and the actors are bad. " * 5
    texts = [long, long[:63], long[:64], long[:65], long[:66], long[:129], "Short."]
    rolling = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    expected = theirs.loglikelihood_rolling(rolling, disable_tqdm=True)
    pairs = [(long[:n], choice) for n in (3, 59, 60, 61, 200) for choice in (" good", " bad", "x", " " + long[:61])]
    scored = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    choices = theirs.loglikelihood(scored, disable_tqdm=True)
    for lm in (ours, guided):
        assert lm.loglikelihood_rolling(rolling) == pytest.approx(expected, abs=1e-3)
        found = lm.loglikelihood(scored)
        assert [logprob for logprob, _ in found] == pytest.approx([logprob for logprob, _ in choices], abs=1e-3)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in choices]
    asked = [Instance("generate_until", {}, (long, {"until": ["\n\n"], "max_gen_toks": 10}), 0)]
    assert ours.generate_until(asked) == theirs.generate_until(asked, disable_tqdm=True)


@pytest.mark.parametrize("method", ["eft", "token-explicit"])
def test_guides_set_the_length_that_they_can_read(method):
    """A pair reads a text before its last token; a scalar value also each candidate for it."""
    base, tuned, untuned = (
        tiny_lm(name, seed=i, context=n) for i, (name, n) in enumerate((("base", 300), ("tuned", 256), ("untuned", 256)))
    )
    model = GuidedModel(base, {"implicit": ImplicitValue(tuned, untuned), "explicit": tiny_value("scalar")})
    settings = {"eft": {}, "token-explicit": {"candidates": 3}}[method]
    lm = IVGModel(model=model, method=method, **settings)
    assert lm.max_length == {"eft": 256, "token-explicit": 255}[method]
    text = "The plot is thin, and the actors are bad. " * 8
    first, rest = text[: lm.max_length], text[lm.max_length]
    ((found, _),) = lm.loglikelihood([Instance("loglikelihood", {}, (text[:-1], text[-1]), 0)])
    kept = text[:-1][-lm.max_length :]
    assert found == pytest.approx(model.logprobs(kept, text[-1], method, **settings).logprob, abs=1e-3)
    with pytest.raises(PromptError, match=r"leaves no room"):
        model.logprobs(first + "x", rest, method, **settings)


def test_arguments_of_generate_that_change_nothing_are_left_out(embedded):
    lm = IVGModel(model=embedded, method="base")
    plain = {"until": ["."], "max_gen_toks": 6}
    neutral = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True, "early_stopping": True, "length_penalty": 0.5}
    more = {"typical_p": 1.0, "return_dict_in_generate": False, "max_time": None, "do_sample": False, "top_p": None}

    def answers(settings, task=None):
        metadata = {} if task is None else {"metadata": (task, 0, 1)}
        return lm.generate_until([Instance("generate_until", {}, ("The movie was", settings), 0, **metadata)])

    assert answers({**plain, **neutral, **more}) == answers(plain)
    expected = r"num_beams=4 in generation_kwargs of the task summaries .*\n  give --gen_kwargs num_beams=1, or .*leave the task out"
    with pytest.raises(ConfigError, match=expected):
        answers({**plain, "num_beams": 4}, "summaries")
    for name, value, advice in (
        ("max_length", 12, "give max_gen_toks"),
        ("penalty_alpha", 0.6, "give --gen_kwargs penalty_alpha=0.0, or"),
        ("seed", 1, ""),
    ):
        with pytest.raises(ConfigError, match=f"{name}={value} in generation_kwargs of the task is no setting of ivg.*\n  {advice}"):
            answers({**plain, name: value})


def test_answers_any_method_and_samples_that_differ(embedded):
    greedy = {"until": ["."], "max_gen_toks": 6}
    lm = IVGModel(model=embedded, method="ivg", temperature=0.9, seed=3)
    requests = [Instance("generate_until", {}, ("The movie was", dict(greedy)), 0) for _ in range(2)]
    first, second = lm.generate_until(requests)
    assert first != second and "." not in first + second
    assert first == embedded.generate("The movie was", "ivg", temperature=0.9, seed=3, max_new_tokens=6, stop=".").text
    assert lm.generate_until(requests) == [first, second]


def test_choices_that_are_never_drawn_are_said(embedded, caplog):
    with caplog.at_level("WARNING", "ivg"):
        _, every = evaluate(IVGModel(model=embedded, method="eft"), NAMES[:1])
    assert not any("probability 0" in record.getMessage() for record in caplog.records)
    with caplog.at_level("WARNING", "ivg"):
        _, few = evaluate(IVGModel(model=embedded, method="eft", candidates=2), NAMES[:1])
    zero = numbers(few, NAMES[0]).count(-math.inf)
    assert zero and -math.inf not in numbers(every, NAMES[0])
    (said,) = [record.getMessage() for record in caplog.records if "probability 0" in record.getMessage()]
    assert said.startswith(f"{zero} of {len(numbers(few, NAMES[0]))} continuations") and "eft" in said


def test_refusals(embedded):
    scored = [Instance("loglikelihood", {}, ("The movie was", " good"), 0)]
    with pytest.raises(ConfigError, match="selects among 16 beams"):
        IVGModel(model=embedded, method="ivg").loglikelihood(scored)
    with pytest.raises(ConfigError, match="no method given"):
        IVGModel(model=embedded)
    with pytest.raises(ConfigError, match="unknown argument bta"):
        IVGModel(model=embedded, method="eft", bta=2)
    lm = IVGModel(model=chat_model(tuned="User: {prompt}"), method="eft")
    with pytest.raises(PromptError, match="tuned reads it as other tokens than the base"):
        lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("A film.",), 0)])
