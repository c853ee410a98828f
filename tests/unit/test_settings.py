"""Every setting is checked once, wherever it comes from: wrong types, NaN and infinity, absurd sizes are refused by name."""

import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
import typer
from hypothesis import example, given
from hypothesis import strategies as st

from ivg.cli.options import command
from ivg.cli.recipe_options import RecipeOptions
from ivg.errors import ConfigError
from ivg.search.methods import Method, get_method
from ivg.search.request import Particles, Rejection, Request, Search, Speculation, Tree
from ivg.settings.per_request import RequestSettings
from ivg.settings.recipe import ModelRef, Recipe, SamplingConfig, SearchConfig
from ivg.settings.rules import LEVELS, MIN_TEMPERATURE, WEIGHTS
from ivg.settings.schema import rules_of, settings_of
from ivg.settings.search import SearchSettings
from ivg.settings.train import DPOSettings, TrainSettings, ValueTrainSettings
from ivg.types import Prompt, SamplingParams, TokenGuidance
from ivg.utils.rng import as_seed, mix
from ivg.values.base import FunctionValue

RULES = rules_of(SamplingParams) | rules_of(SearchSettings) | rules_of(RequestSettings)
VALUE = FunctionValue(lambda prompt, response: 0.0)
NAN, INF = float("nan"), float("inf")
BAD_COUNTS = [2.5, -1, 1 << 70, True, False, NAN, INF, "4", b"4", None, [4], {}, np.float64(3.0), np.bool_(True), 3j]
BAD_NUMBERS = [NAN, INF, -INF, True, "1", b"1", None, [1.0], {}, 10**400, -1e30, 3j, np.float32("nan"), np.bool_(False)]
BAD_FLAGS = [1, 0, "true", 1.0, [], NAN]
BAD_TEXTS = [1, True, b"x", ["x"], NAN]
BAD_LISTS = [1, 2.5, "ab", True, [-1], [2.5], [True], ["a"], [NAN], {1: 2}]
MAKERS = {
    SamplingParams: {},
    Method: {"name": "x", "summary": "y"},
    Search: {},
    TokenGuidance: {"value": VALUE},
    Rejection: {},
    Particles: {},
    Speculation: {"value": VALUE},
    Tree: {},
    Request: {"prompt": Prompt("x")},
}
OPTIONAL = {name for name, rule in RULES.items() if rule.optional}


def bad_values(name):
    """What the setting ``name`` must refuse."""
    kind = RULES[name].kind
    known = {
        "a whole number": BAD_COUNTS,
        "a finite number": BAD_NUMBERS,
        "true or false": BAD_FLAGS,
        "a text": BAD_TEXTS,
        "a name": [*BAD_TEXTS, "nonsense"],
        "the name of a value": [*BAD_TEXTS, ""],
        "a list of texts": [1, "ab", ["a", 1], [""], b"x", [b"x"], True],
        "a list of token ids": BAD_LISTS,
        "a token id or a list of them": [2.5, -1, "a", True, [-1], [NAN], [2.5]],
        "a token id, 0 or more": BAD_COUNTS,
        "a list of lists of token ids": [*BAD_LISTS, [1], [[]], [[-1]], [[2.5]], ["ab"]],
        "a list of (token ids, bias)": [1, "ab", [1], [[1, 2]], [[[1], NAN]], [[[1], "x"]], [[[-1], 1.0]], [[[], 1.0]], [[[1], True]]],
        "token ids, each once and with a finite number": [
            1,
            "ab",
            [1],
            [[1, NAN]],
            [["x", 1]],
            [[1, "x"]],
            {-1: 1.0},
            {1: True},
            {1: 100.5},
        ],
        "a JSON schema (an object, or its JSON)": [1, "{", "[1]", [1], True, {1: NAN}],
        "a pair (start, factor)": [1, [1], [1, 2, 3], [-1, 1.5], [1, NAN], [1, 0], [1.5, 2.0], "ab"],
        LEVELS.kind: [1, "implicit", "a=1,a=2", [("a", NAN)], [("a", True)], [(1, 1.0)], [("a",)], {"a": 1e10}],
        WEIGHTS.kind: [1, "implicit", {}, "a=1,a=2", [("a", NAN)], [("a", True)], [(1, 1.0)], [("a",)]],
    }[kind]
    allowed = [None] if name in OPTIONAL else []
    if name == "seed":
        allowed += [-1]
        known = [*known, 1 << 64, 1 << 63, -(1 << 63) - 1]
    return [bad for bad in known if not any(bad is fine or (bad == fine and type(bad) is type(fine)) for fine in allowed)]


CASES = [(made, f.name) for made in MAKERS for f in fields(made) if f.name in RULES]


@pytest.mark.parametrize("made,name", CASES, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_bad_values_are_refused_by_name(made, name):
    label = RULES[name].label or name
    for bad in bad_values(name):
        with pytest.raises(ConfigError) as caught:
            made(**{**MAKERS[made], name: bad})
        assert str(caught.value).startswith(f"{label} must be ") and "got " in str(caught.value), bad


def test_every_setting_has_a_rule():
    assert {f.name for f in fields(SamplingParams)} <= set(RULES)
    assert {f.name for f in fields(Method)} - {"name", "summary"} == set(rules_of(SearchSettings))
    assert {f.name for f in fields(RequestSettings)} < {f.name for f in fields(Request)}
    assert {f.name for made in (Rejection, Particles) for f in fields(made)} <= set(RULES)
    assert set(SamplingConfig.model_fields) == {f.name for f in fields(SamplingParams)}
    assert set(SearchConfig.model_fields) - {"method"} <= {f.name for f in fields(Method)}


@pytest.mark.parametrize("kind", [TokenGuidance, Search, Rejection, Particles, Speculation, Tree, Request], ids=lambda kind: kind.__name__)
def test_objects_of_a_search_have_the_declared_defaults(kind):
    declared = settings_of(SearchSettings) | settings_of(RequestSettings)
    same = {f.name: f.default for f in fields(kind) if f.name in declared}
    assert same and same == {name: declared[name].default for name in same}


@given(
    st.sampled_from([f.name for f in fields(SamplingParams)]), st.one_of(st.integers(), st.floats(), st.text(), st.booleans(), st.none())
)
@example("temperature", 3.5e-138)
def test_what_is_kept_is_sound(name, value):
    """Whatever is given: it is refused by name, or kept as one plain number, text or flag that is equal to it."""
    try:
        kept = getattr(SamplingParams(**{name: value}), name)
    except ConfigError as e:
        assert str(e).startswith(f"{name} must be ")
        return
    if name == "temperature" and 0 < value < MIN_TEMPERATURE:
        value = 0.0  # greedy, as its help says
    assert kept == value or (name == "forced_eos_token_id" and kept == (value,)) or name in OPTIONAL
    assert not isinstance(value, bool) or name == "ignore_eos"


def test_numbers_of_numpy_are_numbers():
    made = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3), ignore_eos=np.bool_(True), suppress_tokens=np.array([1, 2]))
    assert made == SamplingParams(temperature=0.5, top_k=3, ignore_eos=True, suppress_tokens=(1, 2))
    assert (type(made.temperature), type(made.top_k), type(made.ignore_eos)) == (float, int, bool)
    assert get_method("ivg", width=np.int32(2), beta=np.float64(0.5)).width == 2
    assert SamplingParams(temperature=1).temperature == 1.0


@pytest.mark.parametrize("table", ["search", "sampling"])
def test_recipes_refuse_the_same(table):
    model = {"search": SearchConfig, "sampling": SamplingConfig}[table]
    for name in model.model_fields:
        if name == "method":
            continue
        wrong = [bad for bad in bad_values(name) if bad is not None and not isinstance(bad, np.generic | complex)]
        if name in ("weights", "select_weights"):
            wrong = [1, True, {"a": NAN}]  # text is read where the method is made
        for bad in wrong:
            with pytest.raises(ConfigError, match=name):
                Recipe.parse({table: {name: bad}})


@pytest.mark.parametrize("seed", [1 << 64, 1 << 63, -(1 << 64), True, 1.0, "1", NAN])
def test_seeds_are_64_bits(seed):
    with pytest.raises(ConfigError, match=r"seed"):
        Request(Prompt("x"), seed=seed)
    with pytest.raises(ConfigError, match=r"run.seed"):
        Recipe.parse({"run": {"seed": seed}})
    draws = {Request(Prompt("x"), seed=s).draw_seed for s in (-(1 << 63), -1, 0, (1 << 63) - 1)}
    assert len(draws) == 4
    assert all(mix(as_seed(n)) == mix(n) and -(1 << 63) <= as_seed(n) < 1 << 63 for n in (0, 1 << 63, (1 << 64) - 1))


def typed(*words, tables=("models", "search", "sampling", "run"), **how):
    """The recipe that a verb with these tables gets."""
    found = []

    @command(recipe=RecipeOptions(*tables, **how))
    def verb(*, recipe: Recipe) -> None:
        found.append(recipe)

    app = typer.Typer()
    app.command()(verb)
    app(list(words), standalone_mode=False)
    return found[0]


def test_options_of_the_command_line():
    further = [word for text in ("width=3", "beta=.5", "original=true", "rule=soft", "run.batch_size=3") for word in ("--set", text)]
    recipe = typed(*further, "--stop", "a\\n", "--stop", "b")
    assert recipe.search.settings() == {"width": 3, "beta": 0.5, "original": True, "rule": "soft"}
    assert recipe.run.batch_size == 3 and recipe.sampling.settings() == {"stop": ["a\n", "b"]}
    for wrong in ("width=2.5", "width=true", "beta=nan", "beta=inf", "original=1", "rule=best", "gate=-1", "run.n=0", "eval.seeds=x"):
        with pytest.raises(ConfigError, match=wrong.partition("=")[0].replace(".", r"\.")):
            typed("--set", wrong)
    for wrong in ("colour=1", "width", "colour.red=1"):
        with pytest.raises(ConfigError, match=r"expected KEY=VALUE with KEY one of .*, or TABLE\.KEY=VALUE with TABLE one of models"):
            typed("--set", wrong)
    sets = ("--set", 'models.base.quantization={"load_in_8bit": true}', "--set", "models.base.dtype=auto")
    one = typed("--base", "b", "--dtype", "base=float32", *sets)
    assert one.models.base == ModelRef(path="b", dtype="auto", quantization={"load_in_8bit": True})
    for key, said in (("scale", "--adapter-scale 'tuned=2'"), ("max_memory", "--set 'models.tuned.max_memory=2'")):
        with pytest.raises(ConfigError, match=f"{said}, but no model is given for tuned\n  give --tuned MODEL with it"):
            typed("--set", f"models.tuned.{key}=2")
    for wrong in ("models.nobody.dtype=auto", "models.base.colour=1"):
        with pytest.raises(ConfigError, match=r"expected models\.ROLE\.KEY=VALUE with ROLE one of base, .* and KEY one of adapter, "):
            typed("--base", "b", "--set", wrong)
    with pytest.raises(ConfigError, match=r"run.seed.*2\*\*63"):
        typed("--seed", str(1 << 64))


def test_templates_of_the_command_line(tmp_path):
    assert typed("--base", "b", "--template", "base=chat").models.base == ModelRef(path="b", template="chat")
    with pytest.raises(ConfigError, match="no model is given for base\n  give --base MODEL with it"):
        typed("--template", "base=chat")
    with pytest.raises(ConfigError, match="expected ROLE=TEMPLATE with ROLE one of base, tuned"):
        typed("--template", "chat")
    file = tmp_path / "recipe.toml"
    file.write_text("[models]\nbase = { path = 'a', template = 'chat', chat_template_kwargs = { think = true } }\n")
    assert typed("--recipe", str(file), "--base", "b").models.base == ModelRef(
        path="b", template="chat", chat_template_kwargs={"think": True}
    )
    off = typed("--base", "b", "--chat-template-kwargs", 'base={"think": false, "x": [1]}').models.base
    assert off == ModelRef(path="b", chat_template_kwargs={"think": False, "x": [1]})
    with pytest.raises(ConfigError, match=r"--chat-template-kwargs 'base=\{\}', but no model is given for base"):
        typed("--chat-template-kwargs", "base={}")
    with pytest.raises(ConfigError, match="expected ROLE=KWARGS with ROLE one of base, tuned"):
        typed("--chat-template-kwargs", "{}")
    for wrong in ("5", '{"tokenize": true}', "no"):
        with pytest.raises(ConfigError, match=r"models\.base\.chat_template_kwargs"):
            typed("--base", "b", "--chat-template-kwargs", f"base={wrong}")


def test_guides_alone_choose_their_method():
    def method(*words, **how):
        return typed(*words, **how).search.method

    pair = ("--tuned", "t", "--untuned", "u")
    assert method() == method("--base", "b") == "ivg"
    assert method("--reward", "r") == method("--base", "b", "--value", "v") == "cbs-explicit"
    assert method(*pair) == "eft"
    assert method(*pair, "--value", "v") == method(*pair, "--token", "explicit") == "ivg"
    assert method("--reward", "r", "--method", "bon") == "bon"
    assert method("--arm", "a") == "genarm"
    assert method("--arm", "a", method="base") == "base"


@pytest.mark.parametrize(
    "line, note",
    [
        ("--method base -W 4", "note: width=4 ignored: the method base selects among nothing (select=VALUE makes it a search)"),
        (
            "--method bon --beta 2 --gate 1",
            "note: beta=2.0, gate=1.0 ignored: the method bon guides no tokens (token=VALUE makes it do so)",
        ),
        ("--method ivg --set tries=3", "note: tries=3 ignored: it belongs to rule=reject"),
        ("--method ivg -W 2 --beta 2 --gate 1", ""),
        ("--method bon --token implicit --beta 2", ""),
        ("--method cards --set tries=3", ""),
        ("--method base -W 1", ""),
        ("--method base -W 4 --select explicit", ""),
    ],
)
def test_settings_without_effect_are_reported(line, note, capsys):
    recipe = typed(*line.split(), check_method=True)
    assert capsys.readouterr().err.strip() == note
    if note:
        assert recipe.search.settings() == {}


def test_a_reward_alone_guides_the_embedded_base(tmp_path):
    from ivg.embedded import path
    from ivg.factory.recipe import load_models

    file = tmp_path / "score.py"
    file.write_text("def letters(prompt, response):\n    return float(response.count('e'))\n")
    model = load_models(Recipe.parse({"models": {"reward": f"{file}:letters"}}))
    assert list(model.values) == ["reward"]
    best = model.generate("The movie was", "bon", successors=8, max_new_tokens=10)
    base = load_models(Recipe.parse({"models": {"base": str(path("base")), "reward": f"{file}:letters"}}))
    assert base.generate("The movie was", "bon", successors=8, max_new_tokens=10).text == best.text
    assert best.score == best.text.count("e") > 0


def test_sizes_that_mean_nothing_are_noted():
    from typer.testing import CliRunner

    from ivg.cli.app import app

    short = ["--max-new-tokens", "2", "--seed", "1"]
    said = CliRunner().invoke(app, ["generate", "The", "--method", "base", "-W", "4", *short])
    assert said.exit_code == 0 and "note: width=4 ignored: the method base selects among nothing" in said.stderr
    assert said.stdout == CliRunner().invoke(app, ["generate", "The", "--method", "base", *short]).stdout
    said = CliRunner().invoke(app, ["compare", "The", "--methods", "base,cbs-explicit", "--set", "width=2", *short])
    assert said.exit_code == 0 and "note: width=2 ignored by base: no effect there" in said.stderr


MADE_UP_SEARCH = """
from dataclasses import dataclass
from typing import Annotated

import ivg.settings.search as search
from ivg.settings.rules import count
from ivg.settings.schema import Setting


@dataclass(frozen=True, kw_only=True)
class SearchSettings(search.SearchSettings):
    made_up: Annotated[int, Setting("What nobody needs.", count(2), aliases=("invented",), flags=("--made-up",))] = 3


search.SearchSettings = SearchSettings  # as if it stood in ivg.settings.search

from typer.testing import CliRunner

from ivg.cli import reference
from ivg.cli.app import app
from ivg.errors import ConfigError
from ivg.search.methods import get_method
from ivg.serving.protocol import ChatRequest
from ivg.settings.recipe import Recipe


def error(function, *arguments):
    try:
        function(*arguments)
    except Exception as e:
        return str(e)


assert get_method("ivg").made_up == 3
assert Recipe.parse({"search": {"invented": 4}}).search.settings() == {"made_up": 4}
assert error(Recipe.parse, {"search": {"made_up": 1}}) == "settings: search.made_up must be at least 2, got 1"

run = CliRunner().invoke
for verb in ("generate", "compare", ["train", "rollout"]):
    text = run(app, [*([verb] if isinstance(verb, str) else verb), "--help"], env={"COLUMNS": "200"}).stdout
    assert "--made-up" in text and "What nobody needs. (default: the method's)" in text
assert str(run(app, ["generate", "x", "--made-up", "1"]).exception) == "settings: search.made_up must be at least 2, got 1"
assert '"name": "made_up"' in run(app, ["models", "--json"]).stdout and "made_up" in run(app, ["models"]).stdout

body = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
assert ChatRequest.model_validate(body | {"guidance": {"invented": 5}}).guidance.made_up == 5
assert "made_up must be at least 2, got 1" in error(ChatRequest.model_validate, body | {"guidance": {"made_up": 1}})
field = next(kind for kind in ChatRequest.model_json_schema()["$defs"].values() if "made_up" in kind["properties"])["properties"]["made_up"]
assert field["description"] == "What nobody needs." and field["minimum"] == 2

assert "| `--made-up` | What nobody needs. (default: the method's) |" in reference.command_line()
assert "| `made_up` | `3` | What nobody needs. (options `--made-up`; also called `invented`) |" in reference.settings()
"""

MADE_UP_SAMPLING = """
from dataclasses import dataclass, fields
from typing import Annotated

import ivg.settings.sampling as sampling
from ivg.settings.rules import count
from ivg.settings.schema import Setting


@dataclass(frozen=True, slots=True)
class SamplingParams(sampling.SamplingParams):
    made_up: Annotated[int, Setting("What nobody needs.", count(2), aliases=("invented",), flags=("--made-up",))] = 3

    def __post_init__(self):
        sampling.validate(self)


default = sampling.DEFAULT_SAMPLING
sampling.DEFAULT_SAMPLING = SamplingParams(**{f.name: getattr(default, f.name) for f in fields(default)})
sampling.SamplingParams = SamplingParams  # as if it stood in ivg.settings.sampling
from typer.testing import CliRunner

from ivg.cli import reference
from ivg.cli.app import app
from ivg.serving.protocol import ChatRequest, CompletionRequest
from ivg.settings.recipe import Recipe
assert Recipe.parse({"sampling": {"invented": 4}}).sampling.settings() == {"made_up": 4}
text = CliRunner().invoke(app, ["generate", "--help"], env={"COLUMNS": "200"}).stdout
assert "--made-up" in text and "What nobody needs. (default: 3)" in text
for body in (ChatRequest, CompletionRequest):
    assert body.model_json_schema()["properties"]["made_up"]["minimum"] == 2
assert "| `made_up` | `3` | What nobody needs. (options `--made-up`; also called `invented`) |" in reference.settings()
"""


@pytest.mark.parametrize("code", [MADE_UP_SEARCH, MADE_UP_SAMPLING], ids=["search", "sampling"])
def test_a_setting_that_is_declared_once_is_everywhere(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_other_names_are_declared_only_where_they_work():
    """Tables of recipes and HTTP bodies take them; the settings of single commands are options and arguments in Python."""
    from ivg.cli.reference import OTHERS

    assert not [(kind, name) for kind in OTHERS.values() for name, d in settings_of(kind).items() if d.setting.aliases]


@pytest.mark.parametrize(
    ("kind", "mode", "rate"),
    [(TrainSettings, "full", 2e-5), (DPOSettings, "full", 5e-6), (DPOSettings, "lora", 5e-5), (ValueTrainSettings, "head", 1e-4)],
)
def test_the_default_learning_rate_depends_on_trainer_and_mode(kind, mode, rate):
    assert kind(mode=mode).learning_rate == pytest.approx(rate)
    assert f"{kind.DEFAULT_LEARNING_RATE:g};" in settings_of(kind)["learning_rate"].setting.unset
    assert kind(mode=mode, learning_rate=1.0).learning_rate == 1.0
