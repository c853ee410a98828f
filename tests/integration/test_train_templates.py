"""Templates of training: where the response goes is for rewards to say."""

import pytest

from ivg import testing
from ivg.errors import ConfigError
from ivg.settings.train import DPOSettings, SFTSettings, TrainSettings, ValueSettings, ValueTrainSettings
from ivg.training.data import RatedResponse, SFTExample
from ivg.types import Preference, Prompt

pytest.importorskip("trl")
P, BOTH = Prompt("p"), "Q: {prompt}\nA: {response}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    testing.tiny_model().save_pretrained(folder)
    testing.byte_tokenizer().save_pretrained(folder)
    return folder


def test_templates_with_a_response_are_refused_where_nothing_judges(tmp_path, model):
    from ivg.training import tune
    from ivg.training.value import train_value

    rated = [RatedResponse(P, "a", 1.0), RatedResponse(P, "b", 0.0)]
    (tmp_path / "t.txt").write_text(BOTH)
    given = {"template": BOTH, "eval_share": 0}
    cd_q = ValueSettings(target="cd-q", base=str(model), base_template=BOTH)
    runs = [
        lambda: tune.sft(model, [SFTExample(P, "r")], tmp_path / "a", SFTSettings(**given)),
        lambda: tune.sft(model, [SFTExample(P, "r")], tmp_path / "b", SFTSettings(eval_share=0, template=str(tmp_path / "t.txt"))),
        lambda: tune.dpo(model, [Preference(P, "a", "b")], tmp_path / "c", DPOSettings(**given)),
        lambda: train_value(model, rated, tmp_path / "d", ValueTrainSettings(**given)),
        lambda: train_value(model, rated, tmp_path / "e", ValueTrainSettings(eval_share=0), cd_q),
    ]
    for run in runs:
        with pytest.raises(ConfigError, match=r"has {response}, which templates of rewards alone may have\n  give the part before"):
            run()
    found = tune.reward(model, [Preference(P, "a", "b")], tmp_path / "f", TrainSettings(**given, trainer_args={"max_steps": 1}))
    assert found["rows"] == 1
