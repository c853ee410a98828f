"""What a user who typed something wrong reads: command -> exact line. In this process; few of them load models."""

import importlib
import json
import runpy
import shlex
import sys

import pytest

from ivg.errors import MissingDependencyError
from ivg.search.methods import METHODS

FILES = {
    "pairs.jsonl": "".join(json.dumps({"prompt": f"p{i}", "chosen": "good", "rejected": "bad"}) + "\n" for i in range(3)),
    "ties.jsonl": "".join(json.dumps({"prompt": f"p{i}", "chosen": "same", "rejected": "same"}) + "\n" for i in range(3)),
    "columns.jsonl": '{"question": "x", "answer": "y"}\n',
    "broken.jsonl": '{"prompt": "x"\n',
    "empty.jsonl": "",
    "judged.jsonl": '{"instruction": "a", "output_1": "x", "output_2": "y", "preference": 3}\n',
    "unjudged.jsonl": '{"instruction": "a"}\n',
    "table.toml": "[serach]\nmethod = 'ivg'\n",
    "key.toml": "[search]\nmethd = 'ivg'\n",
    "deep.toml": "[eval]\ngold = { path = 'x', lable = 1 }\n",
    "syntax.toml": "[models\nbase = 1\n",
    "text.toml": "[search]\nwidth = 'four'\n",
    "half.toml": "[search]\nwidth = 2.5\n",
    "bool.toml": "[run]\nseed = true\n",
    "list.toml": "models = ['a']\n",
    "choice.toml": "[run]\ndtype = 'float8'\n",
    "range.toml": "[run]\nbatch_size = 0\n",
    "judge.toml": "[eval]\njudges = { 'a b' = 'x' }\n",
    "value.toml": "[values.mine]\ntuned = 'x'\n",
    "method.toml": "[search]\nmethod = 'ivgg'\n",
    "engine.toml": "[run]\nengine = 'tensorrt'\n",
    "latin.toml": b"[models]\nbase = 'caf\xe9'\n",
    "rewards.py": "def score(prompt, response): return 1.0\nnumber = 1\n",
    "wrong.py": "def score(:\n",
    "model/config.json": "{}",
    "broken/config.json": "{",
    "nothing/readme": "",
}
METHODS = ", ".join([*METHODS, "custom"])
COLUMNS = " - for other names: --columns NAME=COLUMN,… (in Python: ColumnMapping({NAME: COLUMN}))"
DIRECTORY = " - expected a directory with config.json and weights, or a hub id"
FILE = " - expected a file: .jsonl, .ndjson, .json, .csv, .parquet (each may end in .gz)"
BROKEN = 'broken.jsonl, line 1: expected a JSON object, got {"prompt": "x" (expecting \',\' delimiter at character 16)'
TIES = [f"ties.jsonl, line {i}: chosen and rejected are the same text" for i in (1, 2, 3)]
TIES.append("ties.jsonl holds no pair of different responses to one prompt")

TABLE = [
    # recipes
    ("check --recipe none.toml", "cannot read recipe none.toml: No such file or directory - expected a TOML file"),
    ("check --recipe nothing", "cannot read recipe nothing: Is a directory - expected a TOML file"),
    ("check --recipe syntax.toml", "syntax.toml is not TOML: Expected ']' at the end of a table declaration (at line 1, column 8)"),
    ("check --recipe latin.toml", "latin.toml is not UTF-8: invalid continuation byte at byte 20 - save it as UTF-8"),
    ("check --recipe table.toml", "table.toml: unknown setting serach; did you mean search?"),
    ("check --recipe key.toml", "key.toml: unknown setting search.methd; did you mean method?"),
    ("check --recipe deep.toml", "deep.toml: unknown setting eval.gold.lable; did you mean label?"),
    ("check --recipe text.toml", "text.toml: search.width: expected a whole number, got 'four'"),
    ("check --recipe half.toml", "half.toml: search.width: expected a whole number, got 2.5"),
    ("check --recipe bool.toml", "bool.toml: run.seed: expected a whole number, got True"),
    ("check --recipe list.toml", "list.toml: models: expected a table, got ['a']"),
    ("check --recipe choice.toml", "choice.toml: run.dtype: expected 'auto', 'float32', 'bfloat16' or 'float16', got 'float8'"),
    ("check --recipe range.toml", "range.toml: run.batch_size must be at least 1, got 0"),
    (
        "check --recipe judge.toml",
        "judge.toml: eval.judges: a judge cannot be called 'a b': expected letters, digits, _ and -",
    ),
    (
        "check --recipe value.toml",
        "value.toml: values.mine: a named value is tuned and untuned, or value, or reward, or arm, or contrast, or plugin; got tuned",
    ),
    ("check --recipe engine.toml", "unknown engine 'tensorrt' - expected transformers, vllm, or the URL of an endpoint (http://…/v1)"),
    # methods, values, engines, models
    ("generate x --engine tensorrt", "unknown engine 'tensorrt' - expected transformers, vllm, or the URL of an endpoint (http://…/v1)"),
    ("generate x --recipe method.toml", f"unknown method 'ivgg' - expected one of: {METHODS}"),
    ("compare x --methods ivgg", f"unknown method 'ivgg' - expected one of: {METHODS}"),
    ("generate x --set width=abc", "settings: search.width: expected a whole number, got 'abc'"),
    (
        "generate x --method custom --token nobody",
        "method custom needs the value nobody, got explicit, explicit-other, implicit - give [values.nobody] in a recipe",
    ),
    (
        "generate x --base embedded:base --method ivg",
        "method ivg needs the value explicit and implicit, got none - "
        "give --value for explicit, --tuned and --untuned for implicit; the base alone: --method base",
    ),
    ("check --base no/such/directory", f"cannot load base 'no/such/directory': no such directory{DIRECTORY}"),
    (
        "check --base no/such/base --tuned no/such/tuned --untuned embedded:untuned",
        "cannot load base 'no/such/base': no such directory; cannot load tuned 'no/such/tuned': no such directory - expected directories "
        "with config.json and weights, or hub ids",
    ),
    ("check --base nothing", f"cannot load base 'nothing': the directory has no config.json{DIRECTORY}"),
    (
        "check --base embedded:nothing",
        "no embedded model 'nothing' - expected one of: base, gold, smollm2-film-tuned, smollm2-film-untuned, "
        "smollm2-subject, tuned, untuned, value, value-other",
    ),
    (
        "check --base embedded:base --tuned embedded:tuned",
        "the implicit value needs a pair; got no untuned model - give both --tuned and --untuned",
    ),
    (
        "check --base embedded:base --reward rewards.py:number",
        "'rewards.py:number' is not a function - expected one of (prompt text, response text) that returns a number",
    ),
    (
        "check --base embedded:base --reward wrong.py:score",
        "cannot load the function 'wrong.py:score': SyntaxError: invalid syntax (wrong.py, line 1) - expected module:function or "
        "file.py:function",
    ),
    (
        "check --template nobody=chat",
        "--template 'nobody=chat': no model has the role 'nobody' "
        "- expected ROLE=TEMPLATE with ROLE one of base, tuned, untuned, value, reward, arm",
    ),
    ("check --template base=chat", "--template 'base=chat', but no model is given for base - give --base MODEL with it"),
    # check
    ("check --preferences none.jsonl", f"no such file: none.jsonl{FILE}"),
    ("check --preferences empty.jsonl", "empty.jsonl is empty"),
    ("check --preferences broken.jsonl", [BROKEN, f"broken.jsonl has no row that can be used - the first of 1: {BROKEN}"]),
    (
        "check --preferences columns.jsonl",
        "columns.jsonl has the columns question, answer - preferences need prompt, chosen, rejected; or prompt, response, score; or "
        f"prompt, responses, scores{COLUMNS}",
    ),
    (
        "check --preferences ties.jsonl",
        TIES,
    ),
    ("check --preferences pairs.jsonl --betas a,b", "--betas 'a,b' - expected numbers with commas between them, e.g. 0.25,0.5,1,2"),
    ("check --preferences pairs.jsonl --betas 1,nan", "betas must be finite and at least 0, got 1, nan"),
    ("check --preferences pairs.jsonl --betas -1", "betas must be finite and at least 0, got -1"),
    (
        "check --preferences pairs.jsonl --temperature 0",
        "a sweep samples texts, so its temperature must be above 0 - give e.g. --temperature 0.7",
    ),
    (
        "check --preferences pairs.jsonl --judge nobody",
        "no value called 'nobody' for --judge - expected one of: implicit, explicit, explicit-other, gold, none",
    ),
    (
        "check --preferences pairs.jsonl --token nobody",
        "no value called 'nobody' - expected one of: implicit, explicit, explicit-other",
    ),
    ("check --output x.json", "--output needs preferences - give --preferences FILE too"),
    ("check words --preferences pairs.jsonl", "got prompts and --preferences - the prompts are taken from the file; leave the others out"),
    ("check --beta nan", "settings: search.beta: expected a finite number, got nan"),
    # train
    ("train dpo --model embedded:base --data none.jsonl --out o", f"no such file: none.jsonl{FILE}"),
    ("train dpo --model embedded:base --data pairs.jsonl --out model", "model holds a model already - use another --out"),
    (
        "train dpo --model embedded:base --data pairs.jsonl --out rewards.py",
        "cannot write rewards.py/run.json: File exists - write to another path",
    ),
    ("train dpo --model no/such/x --data pairs.jsonl --out o", f"cannot load model 'no/such/x': no such directory{DIRECTORY}"),
    ("train dpo --model embedded:base --data pairs.jsonl --out o --mode lorra", "mode must be full, lora or head, got 'lorra'"),
    ("train dpo --model embedded:base --data pairs.jsonl --out o --lr nan", "learning_rate must be a finite number, positive, got nan"),
    (
        "train dpo --model embedded:base --data pairs.jsonl --out o --epochs inf",
        "num_train_epochs must be a finite number, positive, got inf",
    ),
    ("train dpo --model embedded:base --data pairs.jsonl --out o --seed -1", "seed must be in [0, 2**32 - 1], got -1"),
    (
        "train dpo --model embedded:base --data pairs.jsonl --out o --weight-decay nan",
        "weight_decay must be a finite number, 0 or more, got nan",
    ),
    ("train dpo --model embedded:base --data pairs.jsonl --out o --lora-rank 0", "lora_r must be at least 1, got 0"),
    ("train dpo --model embedded:base --data pairs.jsonl --out o --save-steps 0", "save_steps must be at least 1, got 0"),
    ("train dpo --model embedded:base --data pairs.jsonl --out o --beta 0", "beta must be positive, got 0.0"),
    (
        "train dpo --model embedded:base --data pairs.jsonl --out o --template none",
        'template must be "chat", "raw", "last_turn", a text with {prompt} where the prompt goes, or a file (.jinja, .txt), got \'none\'',
    ),
    (
        "train dpo --model embedded:base --data pairs.jsonl --out o --prompt-format x",
        "--prompt-format 'x' - expected a text with {prompt} where the prompt goes",
    ),
    (
        "train dpo --model embedded:base --data pairs.jsonl --out o --columns x",
        "--columns 'x' - expected NAME=COLUMN, comma-separated, e.g. prompt=email,response=subject",
    ),
    (
        "train dpo --model embedded:base --data pairs.jsonl --out o --columns prompt=email",
        "no column 'email' (for prompt) - got prompt, chosen, rejected",
    ),
    ("train dpo --model embedded:base --data pairs.jsonl --out o --set epochs", "--set 'epochs' - expected NAME=VALUE"),
    (
        "train dpo --model embedded:base --data pairs.jsonl --out o --set colour=1",
        "DPOConfig has no field colour - expected any field of transformers' and TRL's arguments",
    ),
    (
        "train dpo --model embedded:base --data pairs.jsonl --out o --max-length 2",
        "no row is left to train on: 3 rows, at most 2 tokens each, 5% of the prompts held out - raise --max-length, give more prompts, "
        "or lower --eval-share",
    ),
    ("train sft --model embedded:base --data pairs.jsonl --out o --loss some", "loss must be response or all, got 'some'"),
    (
        "train value --model embedded:base --data pairs.jsonl --out o",
        "pairs.jsonl has the columns prompt, chosen, rejected - rated responses need prompt, response, score; or prompt, responses, "
        f"scores{COLUMNS}",
    ),
    (
        "train rollout --prompts pairs.jsonl --out r.jsonl",
        "rollouts need a score - give --reward MODEL, or --reward file.py:function",
    ),
    ("train rollout --prompts pairs.jsonl --out r.jsonl --reward rewards.py:score --samples 0", "samples must be at least 1, got 0"),
    # eval
    ("eval nothing --out e", "unknown task 'nothing' - expected one of: sentiment, summarization, alpaca"),
    ("eval sentiment --out e --data none.jsonl", f"no such file: none.jsonl{FILE}"),
    (
        "eval sentiment --out e --data columns.jsonl",
        "columns.jsonl has the columns question, answer - expected prompt, or text (whole reviews)",
    ),
    (
        "eval sentiment --out e --data pairs.jsonl --prompts 99",
        "pairs.jsonl: has 3 prompts, expected 99 - ask for fewer (--prompts)",
    ),
    ("eval sentiment --out e --data pairs.jsonl --prompts 0", "settings: eval.prompts must be at least 1, got 0"),
    ("eval sentiment --out e --data pairs.jsonl --stage all", "unknown stage all - expected some of: generate, score, report"),
    ("eval sentiment --out e --data pairs.jsonl --jobs 0", "settings: eval.jobs must be at least 1, got 0"),
    ("eval sentiment --out e --data pairs.jsonl --prompts 1 --methods ivgg", f"unknown method 'ivgg' - expected one of: {METHODS}"),
    ("eval sentiment --out e --data pairs.jsonl --judge x", "--judge 'x' - expected NAME=VALUE"),
    (
        "eval sentiment --out e --data pairs.jsonl --judge gold=x",
        "settings: eval.judges: the name gold is taken; give the judge another (what is reported is eval.gold)",
    ),
    # winrate
    (
        "winrate none.jsonl",
        "no such file: none.jsonl - expected judgements (annotations.json of alpaca_eval, or OUT/judgements/LABEL.jsonl)",
    ),
    ("winrate empty.jsonl --plain", "empty.jsonl has no judgements"),
    ("winrate broken.jsonl --plain", BROKEN),
    (
        "winrate judged.jsonl --plain",
        "judged.jsonl, judgement 1: preference 3 - expected a number from 1 (reference is better) to 2 (model is better)",
    ),
    (
        "winrate unjudged.jsonl --plain",
        "unjudged.jsonl, judgement 1: no output_1, output_2, preference - got instruction; expected instruction, output_1, output_2, "
        "preference",
    ),
    # export
    (
        "export --out p --base embedded:base",
        "got no model that guides - give --tuned and --untuned, or --arm, or --value with --guides explicit",
    ),
    ("export --out p --guides nobody", "vllm.guides: no value called nobody - expected some of: implicit, explicit, explicit-other"),
    ("export --out model", "model holds another model - give the composite a directory of its own"),
    ("export --out rewards.py", "File exists: rewards.py - expected a folder, and a file has that name"),
    ("export --out p --beta nan", "beta must be finite, got nan"),
]
TYPED = [
    ("nothing", "Error: No such command 'nothing'."),
    ("models extra", "Error: No such command 'extra'."),
    ("check --nothing", "Error: No such option: --nothing"),
    ("train nothing", "Error: No such command 'nothing'."),
    ("train dpo", "Error: Missing option '--model'."),
    ("export", "Error: Missing option '--out' / '-o'."),
    ("eval", "Error: Missing argument 'task'."),
]
"""What click itself says, behind its two lines on usage."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("errors")
    for name, content in FILES.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return place


@pytest.fixture
def stderr_of(folder, monkeypatch, ivg):
    def run(line):
        monkeypatch.chdir(folder)
        code, _, err = ivg(*shlex.split(line))
        assert code == 2
        return [text for text in err.splitlines() if text]

    return run


@pytest.mark.parametrize("line,said", [pytest.param(line, said, id=line) for line, said in TABLE])
def test_the_exact_line(line, said, stderr_of):
    assert stderr_of(line) == [f"error: {text}" for text in ([said] if isinstance(said, str) else said)]


@pytest.mark.parametrize("command", ["dpo", "reward"])
def test_rows_of_training_that_are_left_out_are_counted(command, stderr_of):
    said = stderr_of(f"train {command} --model embedded:base --data ties.jsonl --out o")
    counted = ["read 0, left out 3", "error: the data hold no pair of different responses to one prompt"]
    assert said == [*(f"error: {line}" for line in TIES[:3]), *counted]


@pytest.mark.parametrize("line,said", [pytest.param(line, said, id=line) for line, said in TYPED])
def test_what_cannot_be_typed(line, said, stderr_of):
    assert stderr_of(line)[-1] == said


def test_a_refused_run_is_not_in_the_way_of_the_next(stderr_of):
    """Nothing was trained, so the folder takes other settings."""
    line = "train sft --model embedded:base --data pairs.jsonl --out refused --max-length"
    for length in (2, 3):
        assert stderr_of(f"{line} {length}")[0].startswith(f"error: no row is left to train on: 3 rows, at most {length} tokens each")


def test_a_harness_that_is_not_installed(monkeypatch):
    """The error alone, without a traceback."""
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:  # else its submodules are found without it
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "ivg.integrations.lm_eval", raising=False)
    with pytest.raises(SystemExit) as end:
        runpy.run_module("ivg.integrations.lm_eval", run_name="__main__")
    assert str(end.value).startswith("error: ivg.integrations.lm_eval needs lm-eval (") and "pip install 'ivg[lm-eval]'" in str(end.value)
    with pytest.raises(MissingDependencyError):
        importlib.import_module("ivg.integrations.lm_eval")
