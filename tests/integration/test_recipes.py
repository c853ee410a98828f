"""Every recipe is read, built and evaluated, on tiny models that stand for those of the hub and relate to each other as those do."""

import json
from pathlib import Path

import pytest

from ivg.evaluation import runner
from ivg.evaluation.plan import make_plan
from ivg.settings.recipe import Recipe
from ivg.testing import byte_tokenizer, tiny_model, tiny_value
from ivg.utils.jsonl import as_lines

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
CONTEXT = 4096
PUBLISHED = {f"{task}-{base}" for task in ("sentiment", "summarization") for base in ("gpt2", "gpt2-large", "gpt2-xl")}
PUBLISHED |= {f"alpaca-{b}-{g}" for b in ("llama2-7b", "llama2-70b", "mistral-7b", "mixtral-8x7b") for g in ("tulu", "ultra")}

FAMILY = {
    "openai-community/gpt2": "gpt2", "openai-community/gpt2-large": "gpt2", "openai-community/gpt2-xl": "gpt2",
    "chadlzx/gpt2-imdb-dpo": "gpt2", "lvwerra/gpt2-imdb": "gpt2", "chadlzx/gpt2-imdb-token-rm": "gpt2",
    "chadlzx/gpt2-summarize-dpo": "gpt2", "chadlzx/gpt2-summarize": "gpt2", "chadlzx/gpt2-summarize-token-rm": "gpt2",
    "meta-llama/Llama-2-7b-chat-hf": "llama-chat", "meta-llama/Llama-2-70b-chat-hf": "llama-chat",
    "allenai/tulu-2-dpo-7b": "llama-chat", "allenai/tulu-2-7b": "llama-chat",
    "chadlzx/llama-ultrafeedback-dpo": "llama", "meta-llama/Llama-2-7b-hf": "llama", "chadlzx/llama-ultrafeedback-token-rm": "llama",
    "mistralai/Mistral-7B-Instruct-v0.2": "mistral", "mistralai/Mixtral-8x7B-Instruct-v0.1": "mixtral",
    "lvwerra/distilbert-imdb": "classifier", "chadlzx/golden_rm_summarize": "classifier",
}  # fmt: skip
"""What each hub id is: models of one word share a vocabulary (``-chat``: with a chat template); Mistral's is another than Llama's."""


def tokenizer(family):
    if family in ("mistral", "mixtral"):
        return byte_tokenizer(permute=True, chat=True)
    return byte_tokenizer(chat=family == "llama-chat")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A directory for each hub id, made when it is asked for."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    folder = tmp_path_factory.mktemp("hub")

    def place(name):
        path = folder / name.replace("/", "--")
        if path.exists():
            return str(path)
        family = FAMILY[name]
        seed = sorted(FAMILY).index(name)
        if family == "classifier":
            labels = 2 if "imdb" in name else 1
            sizes = {"dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2, "max_position_embeddings": CONTEXT}
            DistilBertForSequenceClassification(DistilBertConfig(vocab_size=257, num_labels=labels, **sizes)).save_pretrained(path)
        elif "token-rm" in name:
            tiny_value("vocabulary", family.removesuffix("-chat"), seed).save_pretrained(path)
        else:
            tiny_model(family.removesuffix("-chat"), seed, context=CONTEXT).save_pretrained(path)
        tokenizer(family).save_pretrained(path)
        return str(path)

    return place


def moved(recipe, place):
    """The recipe with every hub id replaced by its directory, and what a benchmark trains by the embedded model of that name."""

    def there(path):
        if path.startswith("embedded:") or ".py:" in path:
            return path
        if "build/" in path:
            name = Path(path).name
            return f"embedded:{name if name in ('base', 'tuned', 'untuned', 'gold') else 'value'}"
        return place(path)

    data = recipe.model_dump(exclude_none=True)
    named = [ref for value in data["values"].values() for ref in value.values()]
    for ref in [*data["models"].values(), *named, *([data["eval"]["gold"]] if "gold" in data["eval"] else [])]:
        ref["path"] = there(ref["path"])
    return Recipe.parse(data)


DATA = {
    "sentiment": {"prompt": "I went to see this film"},
    "summarization": {"prompt": "SUBREDDIT: r/x\nTITLE: Which?\nPOST: One or the other?\nTL;DR:", "label": "Which one?"},
    "alpaca": {"instruction": "Plan a weekend.", "output": "Stay in bed.", "dataset": "tiny", "generator": "someone"},
}


def _marks(path):
    """One recipe of each task is read by `make test`, the others by `make test-all`."""
    quick = ("sentiment-gpt2", "summarization-gpt2", "alpaca-llama2-7b-tulu", "embedded-pareto")
    return pytest.param(path, id=path.stem, marks=() if path.stem in quick else pytest.mark.long)


@pytest.mark.parametrize("path", map(_marks, RECIPES))
def test_recipe(path, hub, tmp_path):
    task = json.loads(json.dumps(Recipe.load(path).eval.task))
    data = tmp_path / "data.jsonl"
    data.write_text(as_lines([DATA[task]]))
    small = {"sampling": {"max_new_tokens": 5}, "run": {"dtype": "float32", "device": "cpu"}}
    recipe = moved(Recipe.load(path), hub).override(**small, eval={"data": str(data), "prompts": 1, "seeds": 1, "base_samples": 2})
    p = make_plan(recipe, tmp_path / "out")
    runner.run(p)
    results = json.loads((p.out / "results.json").read_text())
    assert all(m["answers"] == 1 and not m["errors"] for m in results["methods"].values())
    if path.stem not in PUBLISHED:
        return
    assert {f"{t}×{s}" for t in ("none", "implicit", "explicit") for s in ("none", "implicit", "explicit")} <= set(p.labels)
    ivg = results["methods"]["implicit×explicit"]
    assert set(ivg["forward_tokens"]) == {"base", "tuned", "untuned", "explicit"}
    assert {k: ivg["method"][k] for k in ("width", "successors", "chunk_length", "beta")} == {
        "sentiment": {"width": 4, "successors": 4, "chunk_length": 5, "beta": 1.0},
        "summarization": {"width": 4, "successors": 4, "chunk_length": 5, "beta": 1.0},
        "alpaca": {"width": 2, "successors": 2, "chunk_length": 30, "beta": 1.0},
    }[task]
    if task == "alpaca":
        (output,) = json.loads((p.out / "model_outputs" / "implicit×explicit.json").read_text())
        assert output["instruction"] == DATA["alpaca"]["instruction"]


def test_every_published_setting_has_a_recipe():
    """IVG (arXiv 2409.17819), section 5: each base model with each guidance."""
    assert {p.stem for p in RECIPES if not p.stem.startswith(("embedded", "local"))} == PUBLISHED


def test_the_command_in_each_recipe_is_its_own():
    for path in RECIPES:
        named = [line for line in path.read_text().splitlines() if "--recipe" in line]
        assert named
        assert all(f"recipes/{path.name}" in line for line in named)
        assert all(line.startswith("#   ivg ") for line in named)


def test_templates_are_the_paper_s():
    sentiment, chat = Recipe.load(ROOT / "recipes/sentiment-gpt2.toml"), Recipe.load(ROOT / "recipes/alpaca-llama2-7b-tulu.toml")
    assert sentiment.models.base.template == "Here is a movie review from imdb: {prompt}"
    assert sentiment.models.tuned.template is None
    assert chat.models.value.template == "\n\nHuman: {prompt}\n\nAssitant:"
    for size in ("", "-large", "-xl"):
        models = Recipe.load(ROOT / f"recipes/summarization-gpt2{size}.toml").models
        assert models.base.template.count("TL;DR:") == 3
        assert models.base.template.endswith("{prompt}TL;DR:")
        assert {models.tuned.template, models.untuned.template, models.value.template} == {"{prompt}TL;DR: "}
