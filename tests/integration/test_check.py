"""The command ``ivg check --preferences``."""

import json

import pytest

from ivg.model import GuidedModel


@pytest.fixture(scope="module")
def preferences(tmp_path_factory):
    """Pairs of the embedded base's own texts that the embedded judge tells apart clearly; and the same with labels at random."""
    from ivg.embedded import path
    from ivg.models.loading import LoadOptions
    from ivg.values.reward import RewardModel

    options = LoadOptions(device="cpu", dtype="float32")
    model, gold = GuidedModel.embedded(options), RewardModel.from_pretrained(path("gold"), options=options)
    openings = ["The movie was", "This film", "I thought the story", "My friends and I", "After ten minutes", "The acting of"]
    jobs = [p for p in openings for _ in range(56)]
    requests = [model.request(p, "base", seed=9, index=i, temperature=1.0, max_new_tokens=24, ignore_eos=True) for i, p in enumerate(jobs)]
    done = dict(model.run(requests))
    scores, _ = gold.rewards([p + done[i].text for i, p in enumerate(jobs)])
    made = []
    for i in range(0, len(jobs), 2):
        best, worst = sorted((i, i + 1), key=lambda k: -scores[k])
        if scores[best] - scores[worst] > 1.5:
            made.append({"prompt": jobs[i], "chosen": done[best].text, "rejected": done[worst].text})
    folder = tmp_path_factory.mktemp("preferences")
    swapped = [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} if i % 2 else r for i, r in enumerate(made)]
    for name, rows_ in (("good", made), ("random", swapped)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows_))
    assert len(made) > 40
    return folder


@pytest.fixture
def check(ivg):
    common = ["--ignore-eos", "--max-new-tokens", "24", "--dtype", "float32", "--device", "cpu"]
    return lambda *arguments: ivg("check", *arguments, *common, columns=160)


def test_good_pair_helps(check, preferences, tmp_path):
    code, out, _ = check("--preferences", preferences / "good.jsonl", "--sweep", 5, "--betas", "0.5,1", "--output", tmp_path / "out.json")
    assert code == 0, out
    assert "verdict: helps" in out
    assert "unknown training data (no fingerprints beside the weights): tuned, untuned, explicit, explicit-other, gold" in out
    assert "with length controlled" in out
    assert "accuracy is good" in out
    assert "judged by gold" in out
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["verdict"]["outcome"] == "helps"
    assert data["verdict"]["beta"] in (0.5, 1)
    assert [r["beta"] for r in data["sweep"]] == [0, 0.5, 1]
    assert data["sweep"][0]["kl"]["mean"] == 0
    assert 0 < data["sweep"][1]["kl"]["mean"] < data["sweep"][2]["kl"]["mean"]
    assert data["sweep"][2]["gain"]["low"] > 0
    assert {v["name"] for v in data["values"]} == {"base", "implicit", "explicit", "explicit-other", "gold"}
    assert all(len(v["accuracy"]) == 4 for v in data["values"])
    assert data["divergence_on_chosen"]["tokens"] > 0
    assert data["chosen"] == data["divergence_on_chosen"]  # the name of 0.1
    assert data["made_with"]["models"] == "embedded"


@pytest.mark.long
def test_where_the_longer_response_always_wins_nothing_helps(check, preferences, tmp_path):
    rows_ = [json.loads(line) for line in (preferences / "good.jsonl").read_text().splitlines()]
    for r in rows_:
        while len(r["chosen"]) <= len(r["rejected"]) or len(r["chosen"].split()) <= len(r["rejected"].split()):
            r["chosen"] += " It is the best."  # longer, and better to the embedded pair
    same = {**rows_[0], "chosen": rows_[0]["rejected"]}
    (tmp_path / "longer.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [same, *rows_]))
    code, out, err = check("--preferences", tmp_path / "longer.jsonl", "--sweep", 0)
    assert code == 1
    assert "longer.jsonl, line 1: chosen and rejected are the same text" in err
    assert "verdict: no" in out
    assert "but length explains it: choosing the longer response (characters) is as accurate (1.00" in out


def test_opposed_pair_is_caught(check, preferences):
    from ivg.embedded import path

    models = ["--base", path("base"), "--tuned", path("untuned"), "--untuned", path("tuned")]
    code, out, _ = check("--preferences", preferences / "good.jsonl", *models, "--sweep", 3, "--samples", 2, "--betas", "1")
    assert code == 1
    assert "verdict: no" in out
    assert "prefers the rejected responses" in out
    assert "no judge" in out


def test_a_pair_without_information_about_the_preferences_is_detected(check, preferences):
    code, out, _ = check("--preferences", preferences / "random.jsonl", "--sweep", 0)
    assert code == 1
    assert "verdict: no" in out or "verdict: unclear" in out
    assert "chance" in out.splitlines()[-1]


def test_of_rated_responses_the_one_with_the_higher_score_is_chosen(check, tmp_path):
    """However little they differ: a label that is drawn would hide what the values know."""
    texts = [
        ("It was fine", "It was fine, and my friends thought so, too"),
        ("I did not mind it", "I did not mind it at all, to be honest"),
    ]
    rows = [
        {"prompt": f"{start} film", "response": f" {text}.", "score": 0.001 * len(text)}
        for start in ("This", "That", "The", "A", "Her", "His", "Our", "My", "One", "No")
        for pair in texts
        for text in pair
    ]
    (tmp_path / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    check("--preferences", tmp_path / "rated.jsonl", "--judge", "none", "--sweep", 0, "--output", tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())["longer_wins"]["rate"] == 1


def test_value_with_other_tokens_selects(check, preferences):
    from ivg.embedded import path

    models = ["--base", path("base"), "--value", path("value-other"), "--judge", "gold"]
    code, out, _ = check("--preferences", preferences / "good.jsonl", *models, "--sweep", 4)
    assert code == 0
    assert "verdict: mixed" in out
    assert "has other tokens than the base" in out
    assert "select by explicit" in out
    assert "KL to base" not in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--output", "x.json"], "--output needs preferences"),
        (["A prompt", "--preferences", "PAIRS"], "leave the others out"),
        (["--preferences", "PAIRS", "--betas", "some"], "--betas 'some'"),
        (["--preferences", "PAIRS", "--judge", "nobody"], "no value called 'nobody'"),
    ],
)
def test_options_that_do_not_belong_together(check, preferences, arguments, words):
    code, _, err = check(*(preferences / "good.jsonl" if a == "PAIRS" else a for a in arguments))
    assert code
    assert words in err
