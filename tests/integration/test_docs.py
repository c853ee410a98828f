"""What README and docs say is run: every Python block, every ``ivg`` line; the reference is up to date."""

import json
import re
import shlex
import subprocess
import zlib
from pathlib import Path

import pytest

from ivg.evaluation.length_control import GLM_COLUMNS
from ivg.testing import byte_tokenizer, tiny_model, tiny_value

ROOT = Path(__file__).parents[2]
LONG = r"ivg (check --preferences|eval|bench|compare)|--input|--trace"
"""Lines that take more than a few seconds."""
INSIDE = r"(?:(?!```).)*"
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if "results" not in p.parts)]


def blocks(language):
    for page in PAGES:
        for i, code in enumerate(re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)):
            yield pytest.param(code, id=f"{page.name}-{i}")


SHORTER = ("--shape", "tiny", "--prompts", "2", "--new-tokens", "6", "--rounds", "1")
"""Behind a benchmark's own options, so that these count: a page names what takes minutes, in bfloat16 without its instructions hours."""


def lines():
    for page in PAGES:
        for code in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL):
            for line in code.replace("\\\n", " ").splitlines():
                if re.match(r"(\.venv/bin/)?ivg ", line):
                    marks = [pytest.mark.long] if re.search(LONG, line) else []
                    yield pytest.param(line, id=" ".join(line.split())[:60], marks=marks)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Tiny models that stand for those that a README line takes from the hub, one directory for each role."""
    folder = tmp_path_factory.mktemp("hub")
    for seed, role in enumerate(("base", "tuned", "untuned", "arm")):
        network = tiny_model("gpt2", seed, context=1024)
        network.save_pretrained(folder / role)
        byte_tokenizer(chat=True).save_pretrained(folder / role)
    tiny_value("vocabulary", tokenizer=byte_tokenizer(chat=True)).save_pretrained(folder / "value")
    return folder


def local(hub, path, role, base):
    """``path``, or the tiny model for its role; beside an embedded base, where an earlier line trains it, the embedded model."""
    if path.startswith("embedded:") or Path(path).exists():
        return path
    return f"embedded:{role}" if base.startswith("embedded:") else str(hub / role)


@pytest.fixture
def from_hub(hub, monkeypatch):
    """Whatever a recipe or a line would load from the hub is loaded from ``hub``."""
    from ivg.factory import recipe

    real = recipe.load_models

    def load_models(recipe, **how):
        base = recipe.models.base.path if recipe.models.base else ""
        found = {role: ref.model_copy(update={"path": local(hub, ref.path, role, base)}) for role, ref in recipe.models.given.items()}
        return real(recipe.model_copy(update={"models": recipe.models.model_copy(update=found)}), **how)

    monkeypatch.setattr(recipe, "load_models", load_models)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "block", "exec"), {"__name__": "block"})
    assert capsys.readouterr().out.strip()


def shown():
    """Python blocks behind which the page says what they print."""
    for page in PAGES:
        for i, (code, out) in enumerate(re.findall(rf"```python\n({INSIDE})```\n\n```text\n({INSIDE})```", page.read_text(), re.DOTALL)):
            yield pytest.param(code, out, id=f"{page.name}-{i}")


@pytest.mark.parametrize(("code", "out"), shown())
def test_python_blocks_print_what_the_page_says(code, out, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "block", "exec"), {"__name__": "block"})
    assert capsys.readouterr().out == out


def hash_of(number):
    return zlib.crc32(str(number).encode())


def write_preferences(path):
    """Praise against scorn, which the embedded pair tells apart."""
    openings = [f"{a} {b}" for a in ("This film", "The movie", "The story", "Her acting") for b in ("was", "is", "seems")]
    good = (" great", " wonderful", " perfect", " a lovely surprise", " excellent and moving")
    bad = (" awful", " terrible", " boring", " a stupid waste", " bad from beginning to end")
    ends = (
        ".",
        "!",
        " in every way.",
        ", I think.",
        " and that is all there is to say about it.",
        ", as my friends told me.",
        " for once.",
    )
    pick = iter(range(10**6))  # praise and scorn of many lengths, in no order: length must not explain which is better
    rows = [
        {
            "prompt": opening,
            "chosen": good[hash_of(next(pick)) % len(good)] + ends[hash_of(next(pick)) % len(ends)],
            "rejected": bad[hash_of(next(pick)) % len(bad)] + ends[hash_of(next(pick)) % len(ends)],
        }
        for opening in openings
        for _ in range(7)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def write_rollouts(path):
    """Two rated responses to each prompt, as ``ivg train rollout`` writes them."""
    rows = [
        {"prompt": f"The film number {i} was", "response": r, "score": s} for i in range(20) for r, s in ((" great.", 2.0), (" bad.", -2.0))
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


@pytest.mark.parametrize("line", lines())
def test_lines_run(line, from_hub, tmp_path, monkeypatch, ivg):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    judged = {"instruction": "?", "output_1": "a", "output_2": "bb", "preference": 1.5}
    (tmp_path / "judgements.jsonl").write_text(2 * (json.dumps(judged) + "\n"))
    (tmp_path / "df_gamed.csv").write_text(",".join(GLM_COLUMNS) + "\n0,0.5,0.5,0.1,False,g\n1,-0.5,0.5,0.2,False,g\n")
    (tmp_path / "instructions.json").write_text(json.dumps([{"instruction": f"Say {w}", "output": w} for w in ("hi", "ho")]))
    prompts = next(line for line in (ROOT / "README.md").read_text().splitlines() if line.endswith("> prompts.jsonl"))
    subprocess.run(prompts, shell=True, cwd=tmp_path, check=True)
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": f"The film number {i} was good."}) + "\n" for i in range(20)))
    write_preferences(tmp_path / "preferences.jsonl")
    if "train rollout" not in line:
        write_rollouts(tmp_path / "rollouts.jsonl")
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line, comments=True)[1:]
    code, out, err = ivg(*words, *(SHORTER if words[0] == "bench" else ()))
    assert not code, err
    assert out or list(tmp_path.glob("*.jsonl")) or list(tmp_path.glob("*.html"))


@pytest.mark.long
@pytest.mark.parametrize("page", ["tutorials/first-steps.md", "how-to/training.md"])
def test_what_is_trained_guides_in_the_same_folder(page, tmp_path, monkeypatch, ivg):
    """The block that begins with rollouts, in order and without stand-ins: its last line loads what the others trained."""
    found = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    block = next(code for code in found if "ivg train rollout" in code)
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text('{"prompt": "The movie was"}\n{"prompt": "I have to say"}\n')
    commands = [line for line in block.replace("\\\n", " ").splitlines() if line.startswith("ivg ")]
    assert len(commands) >= 3
    for line in commands:
        code, out, err = ivg(*shlex.split(line)[1:])
        assert not code, err
    assert "--value value" in commands[-1]
    assert out


def test_reference_is_up_to_date():
    from ivg.cli.reference import command_line, settings

    assert (ROOT / "docs/reference/cli.md").read_text() == command_line(), "run: make docs"
    assert (ROOT / "docs/reference/settings.md").read_text() == settings(), "run: make docs"


def commands():
    """Every command of ``ivg``, as click knows it: (words of the command line, command)."""
    from typer.main import get_command

    from ivg.cli.app import app
    from ivg.cli.reference import verbs

    group = get_command(app)
    return [(["ivg"], group), *((["ivg", *name.split()], command) for name, command in verbs(group))]


def test_every_option_of_every_command_stands_on_the_page():
    page = (ROOT / "docs/reference/cli.md").read_text()
    sections = dict(re.findall(r"^## `(ivg [^`]*)`\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE))
    found = commands()[1:]
    assert set(sections) == {" ".join(words) for words, _ in found}
    assert {"ivg generate", "ivg train dpo", "ivg train value"} <= set(sections)
    for words, command in found:
        if hasattr(command, "commands"):  # a group: its commands are listed
            assert all(f"`{' '.join([*words, verb])}`" in sections[" ".join(words)] for verb in command.commands)
            continue
        shown = [p for p in command.params if not getattr(p, "hidden", False)]
        rows = re.findall(r"^\| `([^`]+)` \| (.*) \|$", sections[" ".join(words)], re.MULTILINE)
        options = {name for cell, _ in rows for name in re.split(r", | / ", cell) if name.startswith("-")}
        assert options == {o for p in shown if p.param_type_name == "option" for o in (*p.opts, *p.secondary_opts)}, words
        assert len(rows) == len(shown)
        assert all(len(meaning) > 3 for _, meaning in rows), words


@pytest.mark.parametrize("words,command", [pytest.param(w, c, id=" ".join(w)) for w, c in commands()])
def test_every_command_has_help(words, command, ivg):
    """``--help`` as a user reads it names every option."""
    code, out, _ = ivg(*words[1:], "--help")
    assert not code
    for parameter in (p for p in command.params if not getattr(p, "hidden", False)):
        assert all(option in out for option in parameter.opts if option.startswith("--")), parameter.name


def test_links_lead_somewhere():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "docs/results/README.md"]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"
