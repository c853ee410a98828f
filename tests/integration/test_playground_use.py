"""The playground in Chromium: examples, sentences, several values, conversations, and the code that it gives to paste."""

# ruff: noqa: F811
import contextlib
import io
import json
import subprocess
import tomllib

import pytest

from ivg.serving.app import PLAYGROUND
from ivg.settings.recipe import Recipe
from playground_tools import EFT, answer, browser, finished, keep, model, ready, run, url, visit  # noqa: F401
from scripted import RECIPE, scripted
from serving_tools import Running, wait_for

pytestmark = pytest.mark.long

PROMPT = 'It\'s a "film"\\ that $HOME'
LINK = "#m=ivg&p=It%27s+a+%22film%22%5C+that+%24HOME&b=1.5&w=2&k=2&l=6&t=0.7&n=12&s=3&x=implicit:1,explicit:0.5,explicit-other:0"


def by_curl(text, model, folder):
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True, env={"PATH": "/usr/bin:/bin"})
    return json.loads(done.stdout)["choices"][0]["text"]


def by_python(text, model, folder):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(text, "pasted", "exec"), {})
    return out.getvalue().removesuffix("\n")


def by_recipe(text, model, folder):
    (folder / "guided.toml").write_text(text)
    recipe = Recipe.load(folder / "guided.toml")
    search = recipe.search.settings()
    return model.generate(PROMPT, recipe.search.method, seed=3, **search, **recipe.sampling.settings()).text


def test_code_gives_the_answer_of_the_page_when_pasted(visit, model, tmp_path):
    page = visit(LINK)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    run(page)
    shown = answer(page, "guided")
    assert shown
    for form, paste in {"curl": by_curl, "python": by_python, "recipe": by_recipe}.items():
        page.click(f"[data-form={form}]")
        text = page.locator("#code").text_content()
        wait_for(lambda text=text: page.evaluate("navigator.clipboard.readText()") == text)
        assert paste(text, model, tmp_path) == shown, form
    assert "# ivg generate --recipe guided.toml --seed 3 'It'\\''s a \"film\"\\ that $HOME'\n" in text
    assert visit.complaints == []


@pytest.mark.parametrize(("name", "models"), [("embedded", {"base": "embedded:tuned"}), ("mine", {})], ids=["another base", "another name"])
def test_the_recipe_says_which_models_it_needs(browser, model, name, models):
    """By the models, not by the name that the server gives them."""
    with Running(model, Recipe.model_validate({"models": models}), name=name) as server:
        page = browser.new_page()
        page.goto(server.url + LINK)
        ready(page)
        page.click("[data-form=recipe]")
        first = page.locator("#code").text_content().splitlines()[0]
        assert (
            first == "# the models that come with ivg, as none are named"
            if not models
            else first.startswith("# of the server, which serves embedded")
        )
        assert ("film reviews" in page.inner_text("#about")) == (not models)
        page.close()


def test_the_gallery_shows_recorded_runs_and_their_settings(visit):
    asked = []
    page = visit()
    ready(page)
    page.on("request", lambda r: asked.append(r.method))
    examples = page.evaluate("import('/gallery.js').then(m => m.EXAMPLES)")
    assert [e["name"] for e in examples] == ["eft", "cbs-explicit", "ivg", "contrast"]
    for place, example in enumerate(examples):
        page.click(f"#gallery button >> nth={place}")
        recorded = json.loads((PLAYGROUND / "recorded" / f"{example['name']}.json").read_text())
        text = next(e["data"] for e in recorded["guided"] if e["type"] == "text")
        wait_for(lambda text=text: answer(page, "guided") == text)
        assert page.is_visible("#recorded")
        assert page.input_value("#method") == recorded["method"] == example["name"]
    assert page.input_value("#contrast") == "A wonderful film, the best of the year."
    assert "POST" not in asked
    assert visit.complaints == []


def test_answers_end_with_a_sentence(visit, model):
    bodies = []
    page = visit("#m=eft&p=The+movie+was&t=0.7&n=8&s=1", keep(bodies))
    run(page)
    assert [(b["max_tokens"], b["guidance"]["end_at_sentence"]) for b, _ in bodies] == [(48, 8), (48, 8)]
    done = model.generate("The movie was", "eft", seed=1, temperature=0.7, max_new_tokens=48, end_at_sentence=8)
    assert answer(page, "guided") == done.text
    assert done.text.endswith((".", "!", "?"))
    assert "end of the sentence" in page.inner_text("#guided .facts")
    page.uncheck("#sentence")
    run(page)
    assert [(b["max_tokens"], "end_at_sentence" in b["guidance"]) for b, _ in bodies[2:]] == [(8, False), (8, False)]
    assert "maximum length" in page.inner_text("#guided .facts")


def test_sliders_of_several_values_write_the_answer_again(visit):
    bodies = []
    page = visit("#m=ivg&p=The+movie+was&b=1&w=2&k=2&l=5&t=0.7&n=10&s=1&e=0", keep(bodies))
    ready(page)
    page.fill("#weight-explicit", "0.5")  # before the first run nothing is written again
    run(page)
    guided = lambda: [b["guidance"] for b, _ in bodies if b["guidance"]["method"] == "ivg"]  # noqa: E731
    assert guided()[0]["weights"] == {"implicit": 1, "explicit": 0.5}
    before = answer(page, "guided")
    page.fill("#weight-implicit", "-1.5")
    wait_for(lambda: page.evaluate("true") and len(guided()) == 2)
    finished(page)
    assert guided()[1]["weights"] == {"implicit": -1.5, "explicit": 0.5}
    assert answer(page, "guided") != before
    assert [b["guidance"]["method"] for b, _ in bodies] == ["base", "ivg", "ivg"]
    page.fill("#select-explicit-other", "-1")
    wait_for(lambda: page.evaluate("true") and len(guided()) == 3)
    finished(page)
    assert guided()[2]["select_weights"] == {"explicit": 1, "explicit-other": -1}
    assert bodies[3][0]["guidance"] == {"method": "base", "select_weights": {"explicit": 1, "explicit-other": -1}}  # scored alike
    assert "explicit − 1 · explicit-other" in page.inner_text("#base .facts")
    assert "z=implicit%3A0%2Cexplicit%3A1%2Cexplicit-other%3A-1" in page.url
    assert page.is_hidden("#error")


@pytest.fixture(scope="module")
def chat_url():
    with Running(scripted(lambda prompt: f"Answer to {prompt.content[-1].text}"), RECIPE, name="talker") as server:
        yield server.url


def test_a_conversation_with_a_chat_model(visit, chat_url):
    bodies = []
    page = visit("#p=One&n=30&e=0", keep(bodies), at=chat_url)
    ready_for_chat = lambda: page.inner_text("#prompt-label") == "Message"  # noqa: E731
    wait_for(ready_for_chat)
    page.fill("#system", "Be brief.")
    page.click("#run")
    finished(page)
    system, first = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "One"}
    assert [b["messages"] for b, _ in bodies] == [[system, first], [system, first]]
    assert answer(page, "guided") == "Answer to One"
    unguided = answer(page, "base")
    page.click("#continue")
    assert page.input_value("#prompt") == ""
    page.fill("#prompt", "Two")
    page.click("#run")
    finished(page)
    second = {"role": "user", "content": "Two"}
    own = [[{"role": "assistant", "content": text}] for text in (unguided, "Answer to One")]
    assert [b["messages"] for b, _ in bodies[2:]] == [[system, first, *turn, second] for turn in own]
    assert answer(page, "guided") == "Answer to Two"
    assert "Answer to One" in page.inner_text("#guided .turns")
    page.click("[data-form=curl]")
    assert json.loads(page.locator("#code").text_content().split("-d '")[1].rstrip("'\n"))["messages"] == bodies[3][0]["messages"]
    page.click("[data-form=recipe]")
    assert "# not in this command: the conversation before this message\n" in page.locator("#code").text_content()
    recipe = Recipe.parse(tomllib.loads(page.locator("#code").text_content()))
    assert (recipe.search.method, recipe.search.token, recipe.sampling.max_new_tokens) == ("custom", "script", 30)
    page.click("#restart")
    page.click("#run")
    finished(page)
    assert bodies[4][0]["messages"] == [system, second]
    assert visit.complaints == []
