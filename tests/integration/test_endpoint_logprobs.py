"""Log-probabilities over endpoints: the server's own, one for each token, through searches, ``best_of`` and our server."""

import math
from types import SimpleNamespace

import pytest

from fake_endpoint import LETTERS, Server
from ivg.engines.endpoint.choices import read_choices
from ivg.engines.endpoint.engine import EndpointEngine
from ivg.model import GuidedModel
from ivg.values.base import FunctionValue


@pytest.fixture
def over():
    """(server, guided model) over a server with these moods."""
    made = []

    def make(**moods):
        server = Server(**moods)
        engine = EndpointEngine(server.url, "m", retries=0)
        made.extend([engine.close, server.stop])
        return server, GuidedModel(engine.base, {"explicit": FunctionValue(lambda p, r: r.count("a"), name="explicit")}, engine=engine)

    yield make
    for end in made:
        end()


def of_letter(letter):
    return -float(LETTERS.find(letter) + 2)  # as the server has it; its end has -1


@pytest.mark.parametrize(("method", "sizes"), [("base", {}), ("bon", {"successors": 3}), ("cbs-explicit", {"chunk_length": 2})])
@pytest.mark.parametrize("stop", [None, "de"])
def test_every_token_has_the_servers_number(over, method, sizes, stop):
    _, model = over()
    for seed in range(8):
        done = model.generate("p", method, seed=seed, alternatives=2, max_new_tokens=7, stop=[stop] if stop else None, **sizes)
        assert done.error is None
        assert len(done.details) == len(done.token_ids) and "".join(d.text for d in done.details) == done.text
        assert [d.token for d in done.details] == list(done.token_ids)
        for detail in done.details:
            assert detail.logprob == detail.base_logprob and [p for _, p in detail.top] == [detail.logprob + 1, detail.logprob + 0.5]
            assert [model.base.vocabulary.decode([i]) for i, _ in detail.top] == ["z", "y"]
            if detail.text:
                assert detail.logprob == of_letter(detail.text)


def test_an_end_that_the_server_does_not_report(over):
    """As llama.cpp: the end of the response is no token of its list."""
    _, model = over(names_ends=False)
    done = [model.generate("p", method, seed=seed, alternatives=1, max_new_tokens=9) for seed in range(12) for method in ("base", "bon")]
    ended = [d for d in done if d.finish_reason == "stop" and d.text]
    assert ended and not any(d.error for d in done)
    for one in ended:
        assert "".join(d.text for d in one.details) == one.text and [d.logprob for d in one.details] == [*map(of_letter, one.text)]


def test_best_of_takes_the_likeliest(over):
    server, model = over()
    alone = [model.generate("p", "base", seed=seed, alternatives=0, max_new_tokens=4) for seed in range(6)]
    assert server.requests[-1]["logprobs"] == 0 and all(not d.top for done in alone for d in done.details)
    chosen = model.generate("p", "base", best_of=6, seed=0, max_new_tokens=4)
    found = sum(map(of_letter, chosen.text)) / len(chosen.text) if chosen.text else -math.inf
    assert chosen.details and (chosen.finish_reason == "stop" or chosen.mean_logprob == pytest.approx(found))


def test_servers_without_them_are_named(over):
    server, model = over(reports=False)
    done = model.generate("p", "base", alternatives=1, max_new_tokens=4)
    assert done.finish_reason == "error" and server.url in done.error and "sent no log-probabilities" in done.error
    assert model.generate("p", "base", max_new_tokens=4).error is None


@pytest.mark.parametrize("reported", [{"token_logprobs": ["x"]}, {"token_logprobs": 3}, {"top_logprobs": [3]}, {"top_logprobs": ["x"]}])
def test_what_is_no_number_is_no_logprob(reported):
    logprobs = SimpleNamespace(**{"tokens": ["a"], "token_logprobs": [-1.0], "top_logprobs": [{"a": -1.0}]} | reported)
    reply = SimpleNamespace(choices=[SimpleNamespace(index=0, text="a", finish_reason="length", logprobs=logprobs)], usage=None)
    (choice,) = read_choices(reply, 1)
    assert choice.names == ("a",) and choice.logprobs == choice.top == ()
