"""The guides of SmolLM2 in the package: files and cards without SmolLM2; what they do with it, where ``ivg models add smollm2`` was run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ivg import GuidedModel
from ivg.embedded import ASSETS, DEFAULTS, names, path
from ivg.errors import ModelError
from ivg.jobs.fingerprints import fingerprint
from ivg.models.added import added
from ivg.models.loading import LoadOptions, load_causal, load_network, load_tokenizer
from ivg.testing import byte_tokenizer, hypothesis, tiny_model

ROOT = Path(__file__).parents[2]
PAIR = ("smollm2-film-tuned", "smollm2-film-untuned")
ADAPTERS = ("smollm2-subject",)
REVIEW = "Here is a movie review from imdb: {prompt}"
FLOAT32 = LoadOptions(device="cpu", dtype="float32")
SECTIONS = ("Use", "Training", "Results", "Limits")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz", ".npy", ".onnx", ".h5", ".msgpack")
needs_smollm2 = pytest.mark.skipif(added("smollm2") is None, reason="SmolLM2 is not on this machine: ivg models add smollm2")


def test_names():
    assert set(names()) == {*DEFAULTS, "gold", *PAIR, *ADAPTERS}
    assert not any(name.startswith("smollm2") for name in DEFAULTS)


@pytest.mark.parametrize("name", [*PAIR, *ADAPTERS])
def test_cards_say_what_a_user_must_know(name):
    card = (path(name) / "README.md").read_text()
    head, _, text = card.removeprefix("---\n").partition("\n---\n")
    fields = dict(line.split(": ", 1) for line in head.splitlines())
    assert {"license", "language", "library_name", "pipeline_tag", "datasets", "tags"} <= set(fields)
    assert fields["library_name"] == ("peft" if name in ADAPTERS else "transformers")
    assert ("base_model" in fields) == (name in ADAPTERS)
    assert text.startswith(f"# {name}: ")
    assert tuple(re.findall(r"^## (.+)$", text, re.MULTILINE)) == SECTIONS
    parts = dict(zip(SECTIONS, re.split(r"^## .+$", text, flags=re.MULTILINE)[1:], strict=True))
    assert f"embedded:{name}" in parts["Use"]
    assert "ivg models add smollm2" in parts["Use"]
    assert "python -m benchmarks.smollm2" in parts["Training"]
    assert "Data: " in parts["Training"]
    assert "licence" in parts["Training"]
    assert re.search(r"\d\.\d", parts["Results"])


def test_all_tracked_weights_together():
    """At most 60 MB, and no tokenizer of SmolLM2's, which has 3.5 MB."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("no git checkout")
    files = [ROOT / name for name in listed.stdout.split("\0") if name.endswith(WEIGHTS)]
    assert len(files) >= 9
    assert sum(file.stat().st_size for file in files) <= 60e6
    assert not [file for name in (*PAIR, *ADAPTERS) for file in path(name).glob("tokenizer*")]


def test_the_wheel_holds_them():
    from hatchling.builders.wheel import WheelBuilder

    found = {Path(f.distribution_path): Path(f.path) for f in WheelBuilder(str(ROOT)).recurse_included_files()}
    for name in (*PAIR, *ADAPTERS):
        for file in path(name).iterdir():
            assert Path("ivg/embedded") / name / file.name in found
    assert sum(file.stat().st_size for file in found.values()) < 80e6


@pytest.mark.parametrize("name", PAIR)
def test_weights_of_the_pair(name):
    """Loaded without SmolLM2, as they are stored."""
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    network = load_network(f"embedded:{name}", AutoModelForCausalLM, FLOAT32, "guide")
    assert sum(p.numel() for p in network.parameters()) == 5_161_824
    assert network.config.vocab_size == 49152
    with safe_open(path(name) / "model.safetensors", "pt") as file:
        assert all(file.get_tensor(key).dtype is torch.bfloat16 for key in file.keys())  # noqa: SIM118
    assert network.config.dtype is torch.float32
    assert json.loads((path(name) / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_pair_is_two_models():
    first, second = ((path(name) / "model.safetensors").read_bytes() for name in PAIR)
    assert first != second


@pytest.mark.parametrize("name", ADAPTERS)
def test_weights_of_adapters(name):
    """Rank 8 in seven linear layers of each of SmolLM2's 30, in float16."""
    from safetensors import safe_open

    with safe_open(path(name) / "adapter_model.safetensors", "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        assert all(file.get_tensor(key).dtype is torch.float16 and file.get_tensor(key).isfinite().all() for key in shapes)
    assert len(shapes) == 30 * 7 * 2
    assert all(8 in shape for shape in shapes.values())
    config = json.loads((path(name) / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"]) == ("smollm2", 8)


@pytest.fixture
def nothing_added(tmp_path, monkeypatch):
    monkeypatch.setenv("IVG_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (
            "--base embedded:base --tuned embedded:smollm2-film-tuned --untuned embedded:smollm2-film-untuned",
            "cannot load the tokenizer of tuned 'embedded:smollm2-film-tuned', which is that of 'smollm2': ",
        ),
        ("--base embedded:smollm2-subject --method base", "cannot load base 'smollm2': "),
    ],
)
def test_without_smollm2(line, error, ivg, nothing_added):
    code, _, err = ivg("generate", "The movie was", *line.split())
    assert code
    assert re.search(rf"{error}it is not on this machine \(93 MB to download\)[\s-]+ivg models add smollm2", err)


def test_models_that_are_listed(ivg, nothing_added):
    code, out, _ = ivg("models", "--json")
    rows = {row["name"]: row for row in json.loads(out)["models"]}
    assert (code, set(rows)) == (0, set(names()))
    assert {name: row["needs"] for name, row in rows.items() if row["needs"]} == dict.fromkeys((*PAIR, *ADAPTERS), "smollm2")
    assert rows["smollm2-film-tuned"] == {
        "name": "smollm2-film-tuned",
        "kind": "language model",
        "needs": "smollm2",
        "parameters": 5_161_824,
        "MB": 10.3,
        "license": "apache-2.0",
        "directory": str(ASSETS / "smollm2-film-tuned"),
    }
    assert (rows["smollm2-subject"]["kind"], rows["value"]["kind"]) == ("adapter", "value, vocabulary head")
    assert "smollm2-film-tuned" in ivg("models")[1]


@pytest.fixture
def borrower(tmp_path):
    """A model without a tokenizer, whose config.json names another's."""
    network = tiny_model("llama", 1, context=256)
    network.config.ivg_tokenizer = str(tmp_path / "owner")
    network.save_pretrained(tmp_path / "guide")
    tiny_model("llama", 2, context=256).save_pretrained(tmp_path / "owner")
    byte_tokenizer(chat=True).save_pretrained(tmp_path / "owner")
    return tmp_path / "guide"


def test_a_tokenizer_by_name(borrower):
    lm = load_causal(borrower, "tuned", FLOAT32)
    assert lm.vocabulary.same_as(load_causal(borrower.parent / "owner", "base", FLOAT32).vocabulary)
    model = GuidedModel.from_pretrained(borrower.parent / "owner", tuned=borrower, untuned=borrower.parent / "owner", options=FLOAT32)
    assert model.generate("a film", "eft", max_new_tokens=3, temperature=0.0, ignore_eos=True).usage.completion_tokens == 3


def test_a_tokenizer_of_its_own_comes_first(borrower):
    (borrower.parent / "owner" / "tokenizer.json").rename(borrower / "tokenizer.json")
    (borrower.parent / "owner" / "tokenizer_config.json").rename(borrower / "tokenizer_config.json")
    assert load_tokenizer(borrower, FLOAT32, "tuned")("a").input_ids


@pytest.mark.parametrize("other", ["guide", "nowhere"])
def test_a_tokenizer_that_is_not_there(borrower, other):
    config = json.loads((borrower / "config.json").read_text())
    (borrower / "config.json").write_text(json.dumps(config | {"ivg_tokenizer": str(borrower.parent / other)}))
    with pytest.raises(ModelError, match=r"cannot load the tokenizer of tuned .*guide'"):
        load_tokenizer(borrower, FLOAT32, "tuned")


def test_the_fingerprint_covers_the_tokenizer(borrower):
    before = fingerprint(str(borrower))
    file = borrower.parent / "owner" / "tokenizer.json"
    file.write_text(file.read_text() + "\n")
    assert fingerprint(str(borrower)) != before


def test_an_adapter_on_the_command_line(tmp_path):
    """In a process of its own, which imports less of torch than this one has (``cli.quick_import``)."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    network = load_network("embedded:untuned", AutoModelForCausalLM, FLOAT32, "base")
    peft.get_peft_model(network, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "embedded:untuned"}))
    line = [sys.executable, "-m", "ivg", "generate", "The movie was", "--base", tmp_path, "--method", "base", "--max-new-tokens", "2"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The movie was")


@pytest.fixture(scope="module")
def model():
    guides = {role: f"embedded:smollm2-film-{role}" for role in ("tuned", "untuned")}
    return GuidedModel.from_pretrained("smollm2", **guides, templates={"base": REVIEW}, options=FLOAT32)


@needs_smollm2
@pytest.mark.long
def test_the_pair_guides_smollm2_over_all_its_vocabulary(model):
    """The likeliest tokens, as by three plain networks without a cache."""
    text, count, beta = "I went to see this film", 4, 1.0
    found = model.generate(text, "eft", beta=beta, temperature=0.0, max_new_tokens=count, ignore_eos=True)
    tokenizer = load_tokenizer("smollm2", FLOAT32, "base")
    networks = [model.base.network, *(m.network for m in model.values["implicit"].cached_lms())]
    read = [tokenizer(prompt).input_ids for prompt in (REVIEW.replace("{prompt}", text), text, text)]
    written: list[int] = []
    for _ in range(count):
        with torch.no_grad():
            rows = [n(torch.tensor([ids + written])).logits[0, -1].log_softmax(-1) for n, ids in zip(networks, read, strict=True)]
        written.append(int((rows[0] + beta * (rows[1] - rows[2])).argmax()))
    assert found.text == tokenizer.decode(written)


@needs_smollm2
@pytest.mark.long
def test_the_pair_prefers_praise(model):
    """In a film review, of the same beginning."""
    good = (" a wonderful film with great actors, and I loved it.", " beautiful. One of the best movies of the year.")
    bad = (" an awful film with bad actors, and I hated it.", " boring. One of the worst movies of the year.")
    texts = [hypothesis("The movie was", text, model.base) for text in (*good, *bad)]
    scores = model.values["implicit"].score(texts)
    assert min(scores[:2]) > max(scores[2:])


@needs_smollm2
@pytest.mark.long
def test_the_adapter_writes_a_subject():
    pytest.importorskip("peft")
    template = (path("smollm2-subject") / "README.md").read_text().partition("--template base=$'")[2].partition("'")[0]
    template = template.replace("\\n", "\n")
    assert "{prompt}" in template
    mail = "Hi all, the meeting on the contract is moved to Thursday at 10 am. Please send me your comments by Wednesday noon. Kate"
    model = GuidedModel.from_pretrained("embedded:smollm2-subject", templates={"base": template}, options=FLOAT32)
    found = model.generate(mail, "base", temperature=0.0, max_new_tokens=24, stop="\n")
    assert {"meeting", "contract", "thursday", "comments"} & set(re.findall(r"\w+", found.text.lower()))
    assert len(found.text.split()) <= 15
