"""The endpoint engine over real sockets: against a small server that misbehaves to order, and against our own."""

import json
import pickle
import re
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest

from fake_endpoint import Server, written
from ivg.cli.trace import trace_node
from ivg.embedded import path
from ivg.engines.endpoint.choices import read_choices, split_tokens, used_tokens
from ivg.engines.endpoint.engine import EndpointEngine, load_endpoint
from ivg.engines.endpoint.text_vocabulary import END, FILLER, TextVocabulary
from ivg.errors import ConfigError, MissingDependencyError, ModelError, PromptError, UpstreamError
from ivg.model import GuidedModel
from ivg.models.loading import LoadOptions, load_tokenizer
from ivg.search.searcher import Particles, Rejection, Request, Search, Searcher
from ivg.search.selection import unique
from ivg.settings.recipe import Recipe
from ivg.testing import byte_tokenizer, check_engine, tiny_lm
from ivg.types import AsyncEngine, Beam, ExpandRequest, Prompt, SamplingParams, TokenCounter, TokenGuidance, new_key
from ivg.utils.rng import mix
from ivg.values.base import FunctionValue
from ivg.values.explicit import ExplicitValue

COUNT_A = FunctionValue(lambda p, r: r.count("a"))


@pytest.fixture
def serve():
    """Makes (server, engine) pairs; moods of the server and settings of the engine by name."""
    made = []

    def make(url=None, retries=0, **moods):
        settings = {k: moods.pop(k) for k in list(moods) if k in EndpointEngine.__init__.__kwdefaults__}
        server = Server(**moods)
        engine = EndpointEngine(url or server.url, "m", retries=retries, **settings)
        made.extend([engine.close, server.stop])
        return server, engine

    yield make
    for end in made:
        end()


def expand_request(engine, successors=1, tokens=4, prompt="p", seed=0, beam=None, **more):
    names = SamplingParams.__dataclass_fields__
    sampling = SamplingParams(**{"max_new_tokens": 12, **{k: more.pop(k) for k in list(more) if k in names}})
    return ExpandRequest(beam or engine.open(Prompt.of(prompt), sampling), successors, tokens, sampling, None, seed, **more)


def family(engine, *args, **more):
    return engine.extend([expand_request(engine, *args, **more)])[0]


def answers(engine, requests):
    done = dict(Searcher(engine).run(requests))
    return [done[i] for i in range(len(requests))]


def ask(search, prompt="p", seed=0, **sampling):
    return Request(Prompt.of(prompt), search, SamplingParams(**{"max_new_tokens": 12, **sampling}), seed)


# What is sent


def test_http_request_has_the_settings_of_the_request(serve):
    server, engine = serve(api_key="secret", extra={"priority": 3})
    assert isinstance(engine, AsyncEngine)
    grown = expand_request(engine, tokens=5, ignore_eos=True)
    (parent,) = engine.extend([grown])[0]
    family(engine, 3, 50, beam=parent, temperature=0.5, top_p=0.9, stop=("x", "yz"), top_k=5, min_p=0.1, repetition_penalty=1.2)
    first, second = server.requests
    assert first["path"] == "/v1/completions" and first["key"] == "Bearer secret"
    plain = {"model": "m", "prompt": "p", "max_tokens": 5, "temperature": 1.0, "top_p": 1.0, "n": 1, "ignore_eos": True, "priority": 3}
    assert first.items() >= plain.items()
    assert not {"stop", "top_k", "min_p", "repetition_penalty", "logprobs"} & set(first)
    asked = {"prompt": "p" + parent.text, "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "stop": ["x", "yz"], "n": 3}
    assert second.items() >= (asked | {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2}).items()
    assert "ignore_eos" not in second
    assert first["seed"] != second["seed"] and all(0 <= b["seed"] < 1 << 31 for b in server.requests)


def test_settings_of_openai_and_vllm_are_sent(serve):
    server, engine = serve()
    params = {"frequency_penalty": 0.5, "presence_penalty": -0.5, "logit_bias": {7: -100}, "stop_token_ids": (5,), "bad_words": ("x",)}
    answers(engine, [ask(Search(), min_new_tokens=4, **params)])
    sent = params | {"logit_bias": {"7": -100.0}, "stop_token_ids": [5], "bad_words": ["x"], "min_tokens": 4}
    assert server.requests[0].items() >= sent.items()
    for name in ("frequency_penalty", "presence_penalty", "bad_words"):
        with pytest.raises(ConfigError, match=f"{name} in chunks: the engine endpoint cannot do that"):
            answers(engine, [ask(Search(chunk_length=4), **{name: params[name]})])
    root = expand_request(engine).beam
    for tokens, least in ((0, 8), (4, 6), (9, 1)):  # of each chunk what is left, and at most its length
        family(engine, 1, 8, beam=replace(root, key=new_key(), token_ids=(FILLER,) * tokens), min_new_tokens=10)
        assert server.requests[-1]["min_tokens"] == least


def test_seeds_differ_by_place_and_reproduce(serve):
    server, engine = serve()
    for more in ({}, {}, {"seed": 1}, {"first": 3}):
        family(engine, **more)
    root = expand_request(engine).beam
    family(engine, beam=replace(root, rng_path=9))
    family(engine, beam=replace(root, token_ids=(FILLER,)))
    seeds = [b["seed"] for b in server.requests]
    assert seeds[0] == seeds[1] and len(set(seeds)) == 5


def test_addresses():
    for url, api in (("http://h:1", "http://h:1/v1"), ("http://h/v1/", "http://h/v1"), ("https://h/x/v1/completions", "https://h/x/v1")):
        with EndpointEngine(url, "m") as engine:
            assert engine.url == api
    for wrong in ({"url": "localhost:8000"}, {"timeout": 0}, {"retries": -1}, {"concurrency": 0}):
        with pytest.raises(ConfigError, match=r"expected|must be"):
            EndpointEngine(**{"url": "http://h", "model": "m", **wrong})


# What comes back


def test_search_is_the_one_written_by_hand(serve):
    server, engine = serve()
    requests = [ask(Search(width=1, successors=3, chunk_length=3, value=COUNT_A), f"p{i}", i, ignore_eos=True) for i in range(5)]
    found = answers(engine, requests)
    for r, got in zip(requests, found, strict=True):
        text, rng_path = "", 0
        for position in range(0, 12, 3):
            seed = mix(r.draw_seed, rng_path, position, 0, 0) & 0x7FFFFFFF
            chunks = [written(r.prompt.content + text, seed + k, 3, ends=False)[0] for k in range(3)]
            best = max(range(3), key=lambda k: chunks[k].count("a"))
            rng_path = rng_path if best == 0 else mix(rng_path, position, best)
            text += chunks[best]
        assert (got.text, got.score, got.finish_reason) == (text, text.count("a"), "length")
        assert len(got.token_ids) == 12 and engine.vocabulary.decode(got.token_ids) == text
        assert got.usage.forward_tokens == {"base": 4 * (7 + 9)}
    assert len(server.requests) == 20


@pytest.mark.parametrize(
    "search",
    [
        Search(),
        Search(1, 4, value=COUNT_A),
        Search(3, 3, 2, value=COUNT_A),
        Search(2, 4, 3, value=COUNT_A, decay=0.7),
        Search(6, 1, 3, value=COUNT_A, particles=Particles()),
    ],
)
def test_methods_reproduce(serve, search):
    _, engine = serve()
    requests = [ask(search, f"p{i}", i, stop=("cab", "b")) for i in range(6)]
    first, again = ([(c.text, c.score, c.finish_reason) for c in answers(engine, requests)] for _ in range(2))
    assert first == again
    assert all(finish in ("stop", "length") and "b" not in text for text, _, finish in first)
    assert len({text for text, *_ in first}) > 1
    assert not engine.running


def test_ends_and_counts(serve):
    said = [
        ("", "stop", None, ["</s>"]),
        ("ab", "stop", None, ["a", "b", "</s>"]),
        ("ab", "stop", "x", ["a", "b"]),
        ("abcd", "length", None, [*"abcd"]),
    ]
    for pieces in (False, True):
        server, engine = serve(text=said.__getitem__, token_pieces=pieces)
        family_of_four = family(engine, 4, 4, stop=("x",))
        assert [b.finish for b in family_of_four] == ["stop", "stop", "stop", None]
        assert [b.token_ids[-1] == END for b in family_of_four] == [True, True, False, False]
        assert (
            [b.text for b in family_of_four] == [engine.vocabulary.decode(b.token_ids) for b in family_of_four] == ["", "ab", "ab", "abcd"]
        )
        assert [len(b.token_ids) for b in family_of_four] == ([1, 3, 2, 4] if pieces else [2, 2, 2, 4])  # 10 tokens - 4, in three
        assert len(unique([(b, 0.0) for b in family_of_four])) == 4
        assert family_of_four[0].token_counter.forward_tokens == {"base": 17}
        assert server.requests[0].get("logprobs") == (0 if pieces else None)


def test_one_answer_is_counted_by_the_server(serve):
    _, engine = serve(text=lambda i: ("ab", "stop", None, [*"abc", "</s>"]))
    assert [len(b.token_ids) for b in family(engine, 1, 9)] == [4]


def test_unnamed_stop_counts_as_the_end(serve):
    _, engine = serve(text=lambda i: ("ab", "stop", "x", ["ab", "x"]), names_stops=False)
    assert family(engine, 1, 9, stop=("x",))[0].token_ids[-1] == END


def test_equal_texts_are_one_hypothesis(serve):
    _, engine = serve(text=lambda i: (["ab", "ab", "ba"][i % 3], "length", None, [*"ab"]))
    children = family(engine, 6, 2)
    assert len({b.token_ids for b in children}) == len({b.text for b in children}) == 2
    assert len({b.key for b in children}) == 6 and all(b.inherits for b in children)
    assert not any(b.inherits for b in family(engine, 2, 2, keep=True))
    grandchildren = [c for b in children[:2] for c in family(engine, 2, 2, beam=b)]
    assert len(unique([(b, 0.0) for b in grandchildren])) == 1
    assert grandchildren[0].token_ids[:2] == children[0].token_ids
    _, engine = serve(text=lambda i: ("ab", "stop", None, ["a"] * (3 + i)))  # equal texts of different lengths
    assert len({b.token_ids for b in family(engine, 4, 9)}) == 1


def test_stop_string_across_the_border(serve):
    _, engine = serve(text=lambda i: (["bxx", "cdx", "dab"][i], "length", None, [*"abc"]))
    parent = Beam(new_key(), None, Prompt("p"), (5, 6, 7), "zca", None, TokenCounter(), engine.vocabulary)
    cut, inside, whole = family(engine, 3, 3, beam=parent, stop=("cab", "dx", "abb"), max_new_tokens=9)
    assert [b.text for b in (cut, inside, whole)] == ["z", "zcac", "zcadab"]
    assert [b.finish for b in (cut, inside, whole)] == ["stop", "stop", None]
    assert [len(b.token_ids) for b in (cut, inside, whole)] == [6, 6, 6]
    assert engine.vocabulary.decode(cut.token_ids) == "z" and END not in cut.token_ids
    again, deeper = family(engine, 2, 3, beam=parent, stop=("cab", "zcac"), max_new_tokens=9)
    assert again.token_ids == cut.token_ids and deeper.text == "" != again.text and deeper.token_ids != again.token_ids


def test_half_a_character_is_not_sent_back(serve):
    server, engine = serve(text=lambda i: ("é\ufffd", "length", None, [*"abc"]))
    (child,) = family(engine, 1, 3)
    assert (child.text, len(child.token_ids)) == ("é", 3)
    family(engine, 1, 3, beam=child)
    assert server.requests[-1]["prompt"] == "pé"
    (last,) = family(engine, 1, 3, max_new_tokens=3)  # nothing follows: the server's own word stands
    assert (last.text, last.finish) == ("é\ufffd", "length")


def test_chunks_that_bring_nothing_end(serve):
    _, engine = serve(text=lambda i: ("", "length", None, []))
    (got,) = answers(engine, [ask(Search(2, 2, 2, value=COUNT_A))])
    assert (got.text, got.finish_reason, len(got.token_ids)) == ("", "length", 12)


def test_trace_and_record(serve):
    _, engine = serve(token_pieces=True)
    request = replace(ask(Search(2, 2, 3, value=COUNT_A), ignore_eos=True), trace=True)
    (got,) = answers(engine, [request])
    assert got.guide_shift == (0.0,) * 12
    node = got.trace[-1].kept[0]
    assert node.tokens == tuple(node.text) and len(trace_node(node, {})["tokens"]) == 12


def test_greedy_asks_once(serve):
    server, engine = serve()
    children = family(engine, 3, temperature=0.0)
    assert [b["n"] for b in server.requests] == [1]
    assert len({b.token_ids for b in children}) == 1 and len({b.rng_path for b in children}) == 3


@pytest.mark.parametrize("mood", ["refuses", "ignores"])
def test_servers_that_make_one_answer_at_a_time(serve, mood):
    server, engine = serve(at_a_time=mood)
    children = family(engine, 4, ignore_eos=True)
    assert len(children) == len({b.text for b in children}) == 4
    tried = len(server.requests)
    family(engine, 4)
    assert [b["n"] for b in server.requests] == [4, *[1] * (tried - 1), *[1] * 4]


def test_spelling():
    assert split_tokens("ab c", ["ab", " c", "</s>"]) == ["ab", " c"]
    assert split_tokens("ab", ["a", "", "bc"]) == ["a", "b"]
    assert split_tokens("ab", ["▁a", "b"]) == ["ab"] and split_tokens("ab", []) == ["ab"] and split_tokens("", ["</s>"]) == []
    reply = SimpleNamespace(choices=[SimpleNamespace(index=0, text="a", finish_reason="length")], usage=None)
    assert read_choices(reply, 5)[0].tokens == 5
    reply.usage, reply.choices[0].index = SimpleNamespace(prompt_tokens="7", completion_tokens=None), None
    assert read_choices(reply, 5)[0].tokens == 5 and used_tokens(reply) == (0, 0)
    reply.usage.completion_tokens = 99  # more than were asked for
    assert read_choices(reply, 5)[0].tokens == 5
    reply.choices.append(SimpleNamespace(index=1, text="b", finish_reason="stop"))
    reply.usage.completion_tokens = 3  # fewer than one answer has
    assert [h.tokens for h in read_choices(reply, 5)] == [5, 1]


# What goes wrong


def test_errors_are_one_line_and_fail_only_their_request(serve):
    server, engine = serve(status={"unknown": 404, "key": 401, "broken": 500})
    prompts = ["good", "unknown", "key", "broken", "fine"]
    found = answers(engine, [ask(Search(2, 2, 3, value=COUNT_A), p) for p in prompts])
    assert [c.finish_reason == "error" for c in found] == [False, True, True, True, False]
    for prompt, status, got in zip(prompts[1:4], (404, 401, 500), found[1:4], strict=True):
        assert got.error == f"{server.url}/v1 answered {status}: no {prompt} here"


@pytest.mark.parametrize("says", [{"detail": [{"loc": "body"}]}, ["too long", "too hot"]])
def test_error_messages_need_not_be_text(serve, says):
    """Some send objects or lists as messages; an order that nothing comes of would be waited for for ever."""
    server, engine = serve(status={"p": 400}, says=says)
    (got,) = answers(engine, [Request(Prompt("p"), Search(), SamplingParams(max_new_tokens=4))])
    assert got.error == f"{server.url}/v1 answered 400: {says}" and got.error.said == str(says)


def test_an_unreadable_error_still_ends_its_request(serve, monkeypatch):
    _, engine = serve(status={"p": 400})
    monkeypatch.setattr("ivg.engines.endpoint.client.shortened", lambda *_: 1 / 0)
    (got,) = answers(engine, [Request(Prompt("p"), Search(), SamplingParams(max_new_tokens=4))])
    assert "failed: BadRequestError (ZeroDivisionError while reading that error)" in got.error


def test_retries_are_counted(serve):
    server, engine = serve(status={"p": 503}, retries=1)
    assert family(engine)[0].finish == "error"
    assert len(server.requests) == 2


@pytest.mark.parametrize(("moods", "said"), [
    ({"page": "<html>hello</html>"}, "expected a completion"), ({"finish": "abort"}, "stopped with finish_reason 'abort'"),
    ({"text": lambda i: (None, "stop", None, [])}, "expected a completion"), ({"url": "http://127.0.0.1:9"}, "cannot be reached"),
    ({"delay": 30.0, "timeout": 0.2}, "timed out after 1 attempts of 0.2 s; check the server"),
])  # fmt: skip
def test_what_no_server_should_do(serve, moods, said):
    _, engine = serve(**moods)
    (got,) = answers(engine, [ask(Search(1, 2, 3, value=COUNT_A))])
    assert got.finish_reason == "error"
    assert re.search(said, got.error) and "\n" not in got.error and got.error.startswith(engine.url)


def test_orders_that_cannot_be(serve):
    server, engine = serve()
    bad, good = expand_request(engine, 2, return_log_ratio=True), expand_request(engine, 2)
    refused, made = engine.extend([bad, good])
    assert [b.finish for b in refused] == ["error"] * 2 and "return_log_ratio" in refused[0].error
    assert not any(b.error for b in made) and len(server.requests) == 1
    with pytest.raises(ConfigError, match="cbs-explicit"):
        engine.check(TokenGuidance(COUNT_A))
    searcher = Searcher(engine)
    for cannot in (
        Search(guidance=TokenGuidance(COUNT_A)),
        Search(value=COUNT_A, chunk_length=8, rejection=Rejection(target=1.0, segment_min=1)),
    ):
        with pytest.raises(ConfigError, match=r"selects? chunks"):
            searcher.add(ask(cannot))


def test_prompts(serve):
    server, engine = serve()
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(PromptError, match="empty"):
        engine.open(Prompt(""), SamplingParams())
    with pytest.raises(PromptError, match="give the tokenizer"):
        engine.open(Prompt.of(messages), SamplingParams())
    assert engine.prompt_tokens(Prompt("three short words")) == 3
    _, framed = serve(template="Q: {prompt}\nA:")
    assert framed.base.text(Prompt.of(messages)) == "Q: hi\nA:"
    tokens = byte_tokenizer(chat=True, bos=True)
    tokens.chat_template = "<eos>" + tokens.chat_template
    _, chat = serve(tokenizer=tokens)
    assert chat.base.text(Prompt.of(messages)) == "<user>hi\n<assistant>"  # the server begins the text itself
    assert chat.prompt_tokens(Prompt.of(messages)) == len(tokens("<user>hi\n<assistant>").input_ids)
    assert chat.base.tokenizer.chat_template
    family(chat, prompt=messages)
    with load_endpoint(server.url, "m", tokenizer=path("base")) as loaded:
        assert loaded.prompt_tokens(Prompt("The movie was")) == len(
            load_tokenizer(path("base"), LoadOptions(), "x")("The movie was").input_ids
        )
    with pytest.raises(ModelError, match="the endpoint's m '/nowhere': no such directory"):
        load_endpoint(server.url, "m", tokenizer="/nowhere")


def test_without_the_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(MissingDependencyError, match=r"ivg\[endpoint\]"):
        EndpointEngine("http://h", "m")


# Many at once


def test_requests_overlap(serve):
    server, engine = serve(together=8)  # which answers nobody before so many have asked
    engine.extend([expand_request(engine, prompt=f"p{i}") for i in range(8)])
    assert server.peak == 8
    server, engine = serve(delay=0.05, concurrency=2)
    engine.extend([expand_request(engine, prompt=f"p{i}") for i in range(8)])
    assert server.peak == 2 and len(server.requests) == 8


def test_giving_up_reaches_the_server(serve):
    server, engine = serve(delay=300.0)
    searcher = Searcher(engine)
    numbers = [searcher.add(ask(Search(2, 2, 3, value=COUNT_A), f"p{i}")) for i in range(3)]
    searcher.step()
    assert server.wait_for(lambda: server.now == 3)
    for number in numbers:
        searcher.cancel(number)
    assert server.wait_for(lambda: server.gone == 3) and not searcher.busy
    assert engine.collect() == []


def submit_and_wait(engine, monkeypatch, requests):
    """Submit, and wait until every outcome is there to be collected."""
    send, futures = engine.client.send, []
    with monkeypatch.context() as patch:
        patch.setattr(engine.client, "send", lambda *given: futures.append(send(*given)) or futures[-1])
        engine.submit(requests)
    assert len(futures) == len(requests)
    for future in futures:
        future.result(timeout=200)


def test_old_news_of_a_beam_is_not_taken_for_new(serve, monkeypatch):
    server, engine = serve()
    first = expand_request(engine, 1, 3, ignore_eos=True)
    submit_and_wait(engine, monkeypatch, [first])
    engine.release([first.beam.key])
    second = replace(first, successors=2)
    assert len(engine.extend([second])[0]) == 2
    assert len(server.requests) == 2


def test_extend_keeps_outputs_of_other_requests(serve, monkeypatch):
    _, engine = serve()
    early, dropped = expand_request(engine, prompt="early"), expand_request(engine, prompt="dropped")
    submit_and_wait(engine, monkeypatch, [early, dropped])
    engine.extend([expand_request(engine, prompt="now")])
    engine.release([dropped.beam.key])
    assert [g.beam for g in engine.collect()] == [early.beam.key]


def test_closing_gives_everything_up(serve):
    before = set(threading.enumerate())
    server, engine = serve(delay=300.0)
    (thread,) = (t for t in threading.enumerate() if t.name == "ivg-endpoint" and t not in before)
    engine.submit([expand_request(engine)])
    assert server.wait_for(lambda: server.now)
    engine.close()
    engine.close()
    assert not thread.is_alive()
    assert server.wait_for(lambda: not server.now) and server.gone == 1
    with pytest.raises(ModelError, match="closed"):
        engine.collect()


# Numbers in place of tokens


def test_text_vocabulary():
    reader, words = tiny_lm(), TextVocabulary("there", kept=2)
    assert not reader.vocabulary.same_as(words) and not words.same_as(reader.vocabulary) and words.same_as(words)
    assert not words.same_as(TextVocabulary())
    a, b = words.intern("a"), words.intern("b")
    assert words.intern("a") == a != b and words.decode([a, FILLER, b, END]) == "ab"
    assert words.pieces[a] == "a" and words.size == b + 1
    assert words.intern("c") > b and words.decode([a]) == "" and words.intern("a") > b + 1  # forgotten, and its number with it
    ended = Beam(new_key(), None, Prompt("The film"), (b, END), " was", "stop", TokenCounter(), words)
    ids, _ = reader.ids(ended)
    assert ids == [*reader.tokenizer("The film was").input_ids, reader.tokenizer.eos_token_id]


# Our own server


def test_our_server_as_base_of_a_search():
    pytest.importorskip("fastapi")
    from serving_tools import Running

    exact = LoadOptions(dtype="float32")  # in bfloat16 a chunk read by itself may round otherwise
    library = GuidedModel.embedded(exact)
    value = ExplicitValue.from_pretrained(path("value"), options=exact)
    with Running(library, name="film") as server:
        with load_endpoint(server.url, "film:base", token_pieces=True) as engine:
            model = GuidedModel(engine.base, {"explicit": value}, engine=engine)
            prompts = ["The movie was", "I have to say"]
            found = model.generate(prompts, "cbs-explicit", width=2, successors=3, chunk_length=4, max_new_tokens=12, seed=1)
            (plain,) = model.generate(prompts[:1], "base", max_new_tokens=12, seed=1)
            assert model.generate(prompts[0], "base", max_new_tokens=4, top_k=5).error is None  # vLLM's name for it, and ours
        with load_endpoint(server.url, "film:base", extra={"use_beam_search": True}) as engine:
            refused = GuidedModel(engine.base, engine=engine).generate(prompts[0], "base", max_new_tokens=4)
        assert "answered 422" in refused.error or "answered 400" in refused.error
        assert plain.score is None and plain.text.strip() and plain.finish_reason == "length"
        for prompt, got in zip(prompts, found, strict=True):
            assert got.finish_reason == "length" and len(got.token_ids) == 12
            assert got.score == pytest.approx(library.score(prompt, [got.text])[0], abs=1e-3)
            assert got.usage.forward_tokens["base"] > 12 < got.usage.forward_tokens["explicit"]
        assert max(c.score for c in found) > library.score(prompts[0], [plain.text])[0]
        server.wait_until_idle()
        assert value.model.model.live_rows == 0


@pytest.mark.parametrize(("status", "shown", "code", "headers"), [
    (429, 503, "upstream_unavailable", {"retry-after": "1"}),
    (500, 503, "upstream_unavailable", {"retry-after": "1"}),
    (401, 502, "upstream_refused", {"x-should-retry": "false"}),
    (400, 400, "invalid_request", {}),
])  # fmt: skip
def test_clients_get_no_details_of_an_upstream_error(serve, caplog, status, shown, code, headers):
    """Whether to try again, and what of it is their own fault; never the other server's address, which stands in the log."""
    pytest.importorskip("fastapi")
    from serving_tools import Running

    _, engine = serve(status={"bad": status})
    recipe = Recipe.model_validate({"search": {"method": "base"}})
    ask = {"model": "tiny", "prompt": "bad", "max_tokens": 4, "guidance": {"method": "base"}}
    with Running(GuidedModel(engine.base, {"count": COUNT_A}, engine=engine), recipe) as server:
        answer, fine = server.post(ask), server.post(ask | {"prompt": "good"})
        streamed, ids = server.post(ask | {"stream": True}), server.post(ask | {"prompt": [1, 2]})
    assert (ids.status_code, ids.json()["error"]["param"]) == (400, "prompt")  # its numbers are not ours
    assert fine.status_code == 200 and len(fine.json()["choices"][0]["text"]) <= 4
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (shown, code)
    assert {name: answer.headers.get(name) for name in headers} == headers
    assert ("no bad here" in error["message"]) == (status == 400)
    assert engine.url not in answer.text + streamed.text and code in streamed.text
    assert f"{engine.url} answered {status}: no bad here" in caplog.text


def test_methods_that_a_text_cannot_serve_are_left_out(serve, tmp_path, ivg):
    """By the library, by the names of a server's models, and by `ivg compare`, which would stop at the first of them."""
    server, engine = serve()
    model = GuidedModel(engine.base, {"explicit": COUNT_A, "implicit": COUNT_A}, engine=engine)
    assert {"base", "bon", "cbs-explicit"} <= set(model.methods)
    assert not {"ivg", "eft", "token-explicit", "cards"} & set(model.methods)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'''
[run]
engine = "{server.url}"
[endpoint]
model = "m"
[models.value]
path = "{path("value")}"
template = "{{prompt}}"
''')
    code, said, _ = ivg("compare", "The film", "--recipe", recipe, "--max-new-tokens", "4", columns=160)
    assert code == 0
    shown = [line.split("│")[1].strip() for line in said.splitlines() if "│" in line]
    assert [name for name in shown if name] == ["base", "bon", "cbs-explicit"]
    assert "error" not in said and "gold" not in said  # the judge of film reviews knows nothing of that model


def test_an_upstream_fault_is_text_that_can_be_sent():
    fault = UpstreamError("http://x answered 429: slow down", 429, "slow down")
    again = pickle.loads(pickle.dumps(fault))
    assert json.dumps(fault) == '"http://x answered 429: slow down"'
    assert (again, again.status, again.said) == (fault, 429, "slow down")


def test_reset_caches_drops_submitted_requests(serve):
    _, engine = serve()
    engine.submit([expand_request(engine, prompt=f"p{i}") for i in range(4)])
    engine.reset_caches()
    (done,) = answers(engine, [Request(Prompt("p"), Search(), SamplingParams(max_new_tokens=4))])
    assert done.error is None
    assert engine.collect() == []


def test_laws_of_engines(serve):
    _, engine = serve()
    check_engine(engine, [Prompt("p"), Prompt("another prompt")])
