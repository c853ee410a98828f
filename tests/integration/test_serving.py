"""The server over a real socket, with OpenAI's own client: it answers what the library answers."""

import asyncio

import httpx
import openai
import pytest

from serving_tools import SAMPLING, Running, chunks, events, expected, numbers, tiny


@pytest.fixture(scope="module")
def running():
    with Running(tiny()) as server:
        yield server


@pytest.mark.parametrize(
    "method", ["base", "eft", "ivg", "bon", "cbs-implicit", "smc", "token-explicit", "rsd", "gsi", "mcts", "eft-kl", "rmod", "cbs-soft"]
)
def test_completion_equals_the_librarys(running, library, method):
    got = running.client().completions.create(model=f"tiny:{method}", prompt="The movie", seed=7, **SAMPLING)
    want = expected(library, "The movie", method, 7)
    assert got.choices[0].text == want.text
    assert got.choices[0].finish_reason == want.finish_reason
    assert got.usage.prompt_tokens == want.usage.prompt_tokens
    assert got.usage.completion_tokens == len(want.token_ids)
    assert got.ivg["method"] == method
    assert got.ivg["usage"] == dict(want.usage.forward_tokens)
    assert got.ivg.get("drafted_tokens", 0) == want.usage.drafted_tokens
    assert got.ivg["tokens_read"] == want.usage.total_forward_tokens
    assert got.ivg.get("kl_spent") == (None if want.kl_spent is None else pytest.approx(want.kl_spent, abs=1e-3))
    assert "choices" not in got.ivg  # it would say the same twice
    assert got.ivg["score"] == (None if want.score is None else pytest.approx(want.score, abs=1e-4))


@pytest.mark.parametrize("method", ["base", "eft", "ivg", "bon", "rsd", "mcts"])
def test_streams_add_up(running, library, method):
    chunks = list(running.client().completions.create(
        model=f"tiny:{method}", prompt="The movie", seed=3, stream=True, stream_options={"include_usage": True}, **SAMPLING
    ))  # fmt: skip
    want = expected(library, "The movie", method, 3)
    texts = [c.choices[0].text for c in chunks if c.choices]
    assert "".join(texts) == want.text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == want.finish_reason
    assert chunks[-1].usage.completion_tokens == len(want.token_ids)
    assert chunks[-2].ivg["tokens_read"] == want.usage.total_forward_tokens
    if method in ("base", "eft"):
        assert len([t for t in texts if t]) > 4


def test_chat(running, library):
    client = running.client()
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": [{"type": "text", "text": "The movie"}]}]
    got = client.chat.completions.create(model="tiny", messages=messages, seed=1, temperature=0.9, max_completion_tokens=12)
    want = expected(library, "Be kind.\nThe movie", "ivg", 1, max_new_tokens=12)
    assert got.choices[0].message.content == want.text
    assert got.choices[0].message.role == "assistant"
    streamed = client.chat.completions.create(
        model="tiny", messages=messages, seed=1, temperature=0.9, max_completion_tokens=12, stream=True
    )
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == want.text


def test_async_client_and_mixed_settings_share_rounds(running, library):
    async def ask():
        client = openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0)
        methods = ["base", "eft", "ivg", "bon", "cbs-explicit", "smc"] * 2
        asked = [client.completions.create(model=f"tiny:{m}", prompt=f"Film {i}", seed=i, **SAMPLING) for i, m in enumerate(methods)]
        return methods, await asyncio.gather(*asked)

    methods, answers = asyncio.run(ask())
    for i, (method, answer) in enumerate(zip(methods, answers, strict=True)):
        assert answer.choices[0].text == expected(library, f"Film {i}", method, i).text, method


def test_n_prompts_and_token_ids(running, library):
    client = running.client()
    got = client.completions.create(model="tiny:base", prompt=["One", "Two"], n=2, seed=5, **SAMPLING)
    assert sorted(c.index for c in got.choices) == [0, 1, 2, 3]
    texts = [c.text for c in sorted(got.choices, key=lambda c: c.index)]
    wanted = [expected(library, p, "base", 5, i) for p in ("One", "Two") for i in (0, 1)]
    assert texts == [c.text for c in wanted]
    assert got.usage.completion_tokens == sum(len(c.token_ids) for c in wanted)  # of all answers
    assert got.ivg["tokens_read"] == sum(c.usage.total_forward_tokens for c in wanted)
    assert [c["tokens_read"] for c in got.ivg["choices"]] == [c.usage.total_forward_tokens for c in wanted]
    assert [c["index"] for c in got.ivg["choices"]] == [0, 1, 2, 3]
    assert len(set(texts)) > 1
    ids = library.base.tokenizer("One").input_ids
    assert client.completions.create(model="tiny:base", prompt=ids, seed=5, **SAMPLING).choices[0].text == texts[0]
    assert got.usage.prompt_tokens == 6


def test_guidance_of_one_request(running, library):
    guidance = {"method": "custom", "token_value": "implicit", "select_value": "explicit", "beta": 0.5, "w": 2, "k": 3, "l": 4}
    body = {"guidance": {**guidance, "top_k": 20}}
    got = running.client().completions.create(model="tiny", prompt="Film", seed=2, extra_body=body, **SAMPLING)
    settings = {"token": "implicit", "select": "explicit", "beta": 0.5, "width": 2, "successors": 3, "chunk_length": 4, "top_k": 20}
    assert got.choices[0].text == expected(library, "Film", "custom", 2, **settings).text
    body = {"guidance": {"method": "eft", "weights": {"implicit": 1.0, "explicit": 0.3}}}
    got = running.client().completions.create(model="tiny", prompt="Film", seed=2, extra_body=body, **SAMPLING)
    assert got.choices[0].text == expected(library, "Film", "eft", 2, weights={"implicit": 1.0, "explicit": 0.3}).text


def test_stop_strings_never_leak(running, library):
    plain = expected(library, "Film", "base", 4, max_new_tokens=40).text
    stop = plain[20:23]
    cut = plain[: plain.index(stop)]
    got = running.client().completions.create(
        model="tiny:base", prompt="Film", seed=4, temperature=0.9, max_tokens=40, stop=[stop], stream=True
    )
    shown = ""
    for chunk in got:
        shown += chunk.choices[0].text
        assert cut.startswith(shown)
    assert shown == cut


def test_utf8_is_never_cut(running, library):
    """The tiny model writes random bytes; sent text stays, and no partial character is sent."""
    for seed in range(3):
        want = expected(library, "é", "base", seed, max_new_tokens=60).text
        shown = ""
        for chunk in running.client().completions.create(
            model="tiny:base", prompt="é", seed=seed, temperature=0.9, max_tokens=60, stream=True
        ):
            shown += chunk.choices[0].text
            assert want.startswith(shown)
        assert shown == want


def test_logprobs_of_completions(running, library):
    got = running.client().completions.create(model="tiny:eft", prompt="Film", seed=6, logprobs=3, **SAMPLING).choices[0]
    want = expected(library, "Film", "eft", 6, alternatives=3)
    kept = [d for d in want.details if d.text or d.token not in library.base.vocabulary.eos_ids][: len(got.logprobs.tokens)]
    assert "".join(got.logprobs.tokens) == got.text == want.text
    assert got.logprobs.token_logprobs == pytest.approx([d.logprob for d in kept], abs=1e-4)
    assert all(max(top.values()) <= 0 and len(top) <= 4 for top in got.logprobs.top_logprobs)
    pairs = zip(got.logprobs.top_logprobs, got.logprobs.token_logprobs, strict=True)
    drawn = [next(p for p in top.values() if p == logp) for top, logp in pairs]
    assert drawn == got.logprobs.token_logprobs  # the drawn token is among them, as OpenAI says
    alone = running.client().completions.create(model="tiny:eft", prompt="Film", seed=6, logprobs=0, **SAMPLING).choices[0].logprobs
    assert [list(top.values()) for top in alone.top_logprobs] == [[p] for p in alone.token_logprobs]
    assert got.logprobs.text_offset[:2] == [0, len(got.logprobs.tokens[0])]
    stream = running.client().completions.create(model="tiny:eft", prompt="Film", seed=6, logprobs=3, stream=True, **SAMPLING)
    pieces = [c.choices[0].logprobs for c in stream if c.choices and c.choices[0].logprobs]
    assert len(pieces) > 1
    assert [o for p in pieces for o in p.text_offset] == got.logprobs.text_offset  # from the answer's beginning, not the piece's


CHAT_TYPES = (openai.types.chat.ChatCompletion, openai.types.chat.ChatCompletionChunk)


@pytest.mark.parametrize(
    ("path", "types", "logprobs"),
    [
        ("/v1/chat/completions", CHAT_TYPES, {"logprobs": True, "top_logprobs": 2}),
        ("/v1/completions", (openai.types.Completion, openai.types.Completion), {"logprobs": 2}),
    ],
)
def test_responses_fit_openais_types(running, path, types, logprobs):
    """By validation; OpenAI's client itself does not validate."""
    content = {"messages": [{"role": "user", "content": "Film"}]} if "chat" in path else {"prompt": "Film"}
    body = {"model": "tiny:eft", "seed": 1, "n": 2, **content, **logprobs, **SAMPLING}
    types[0].model_validate(running.post(body, path).json())
    for chunk in chunks(running.post(body | {"stream": True, "stream_options": {"include_usage": True}}, path)):
        for choice in chunk["choices"] if "chat" not in path else ():
            choice["finish_reason"] = choice["finish_reason"] or "stop"  # null in a stream, although OpenAI's type has no null
        types[1].model_validate(chunk)
    for model in httpx.get(f"{running.url}/v1/models").json()["data"]:
        openai.types.Model.model_validate(model)


@pytest.mark.parametrize("method", ["eft", "ivg"])
def test_logprobs_of_chats(running, library, method):
    ask = {"model": f"tiny:{method}", "messages": [{"role": "user", "content": "Film"}], "seed": 6, "logprobs": True, "top_logprobs": 2}
    client = running.client()
    whole = client.chat.completions.create(**ask, **SAMPLING).choices[0]
    streamed = [c.choices[0] for c in client.chat.completions.create(**ask, **SAMPLING, stream=True)]
    tokens = [t for c in streamed if c.logprobs for t in c.logprobs.content]
    assert [t.token for t in tokens] == [t.token for t in whole.logprobs.content]
    assert [t.logprob for t in tokens] == pytest.approx([t.logprob for t in whole.logprobs.content], abs=1e-4)
    assert "".join(t.token for t in tokens) == whole.message.content
    assert all(len(t.top_logprobs) == 2 for t in tokens)
    want = expected(library, "Film", method, 6, alternatives=2).details[: len(tokens)]
    assert [t.logprob for t in tokens] == pytest.approx([d.logprob for d in want], abs=1e-4)


def test_beam_events_form_a_tree(running, library):
    got = events(running, model="tiny:ivg", prompt="Film", seed=2, stream_options={"include_beams": True}, max_tokens=15, temperature=0.9)
    selections = [data for name, data in got if name == "ivg.beams"]
    assert [b["step"] for b in selections] == list(range(len(selections))) and len(selections) == 3
    known = set()
    for i, selection in enumerate(selections):
        nodes = selection["kept"] + selection["dropped"]
        assert len(selection["kept"]) == 4 and len(nodes) == 16
        assert all((n["parent"] is None) if i == 0 else (n["parent"] in known) for n in nodes)
        assert all(len(n["tokens"]) == len(n["shift"]) for n in nodes)
        assert (
            all(n["text"].startswith(selection["committed"]) for n in selection["kept"]) or selection is selections[-1]
        )  # then it is the answer
        assert min(n["score"] for n in selection["kept"]) >= max(n["score"] for n in selection["dropped"])
        known |= {n["key"] for n in nodes}
    text = "".join(d["choices"][0]["text"] for n, d in got if n is None)
    assert text == expected(library, "Film", "ivg", 2, max_new_tokens=15).text
    tokens = [t for n, d in got if n == "ivg.tokens" for t in d["tokens"]]
    assert "".join(t["text"] for t in tokens) == text
    assert got[-1][1]["ivg"]["score"] == pytest.approx(max(n["score"] for n in selections[-1]["kept"]), abs=1e-4)


def test_beams_of_every_method_can_be_watched(running, library):
    """As the playground asks for them: whatever the method has no log-probabilities of is left out."""
    for model in [m.id for m in running.client().models.list()][1:]:
        method = model.partition(":")[2]
        more = {"contrast": "Be kind."} if method == "contrast" else {}
        watched = {"max_tokens": 4, "seed": 2, "stream_options": {"include_beams": True}, "guidance": more}
        got = events(running, model=model, prompt="Film", temperature=0.9, **watched)
        want = expected(library, "Film", method, 2, max_new_tokens=4, **more)
        assert "".join(d["choices"][0]["text"] for n, d in got if n is None and d["choices"]) == want.text, model


def test_token_events_are_streamed(running):
    got = events(running, model="tiny:eft", prompt="Film", seed=2, stream_options={"include_beams": True}, max_tokens=12, temperature=0.9)
    updates = [d["tokens"] for n, d in got if n == "ivg.tokens"]
    assert len(updates) > 3
    for t in (t for update in updates for t in update):
        assert t["shift"] == pytest.approx(t["logprob"] - t["base_logprob"], abs=1e-6)
        assert len(t["top"]) == len(t["top_base"]) == 5
        assert t["top"][0]["logprob"] >= t["top"][1]["logprob"]


def test_models(running):
    client = running.client()
    names = [m.id for m in client.models.list()]
    assert names[0] == "tiny" and {"tiny:base", "tiny:eft", "tiny:ivg"} <= set(names) and "tiny:genarm" not in names
    assert client.models.retrieve("tiny:eft").ivg["token"] == "implicit"
    extras = httpx.get(f"{running.url}/v1/models").json()["ivg"]
    assert extras["values"] == ["implicit", "explicit", "length"]
    assert extras["limits"]["max_tokens"] == 256
    assert extras["defaults"]["method"] == "ivg"
    assert extras["guides"] == ["implicit", "explicit", "length"]
    assert (extras["chat"], extras["end_at_sentence"]) == (False, True)


def test_health_and_metrics(running):
    assert httpx.get(f"{running.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{running.url}/ready").status_code == 200
    before = numbers(running)
    got = running.client().completions.create(
        model="tiny:eft", prompt="Metered", max_tokens=9, extra_body={"guidance": {"ignore_eos": True}}
    )
    running.wait_until_idle()
    after = numbers(running)
    for model, tokens in got.ivg["usage"].items():
        name = f'ivg_tokens_read_total{{model="{model}"}}'
        assert after[name] - before.get(name, 0) == tokens
    name = 'ivg_requests_total{endpoint="/v1/completions",status="200"}'
    assert after[name] - before.get(name, 0) == 1
    assert after["ivg_tokens_written_total"] - before["ivg_tokens_written_total"] == 9
    assert after["ivg_step_seconds_count"] > before["ivg_step_seconds_count"]
    assert after["ivg_first_text_seconds_count"] - before["ivg_first_text_seconds_count"] == 1
    assert after['ivg_cache_rows{model="base"}'] == after["ivg_queue_length"] == after["ivg_live_beams"] == 0


def test_playground_is_served(running):
    page = httpx.get(running.url)
    assert page.status_code == 200 and "text/html" in page.headers["content-type"]
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    reference = httpx.get(f"{running.url}/reference")
    assert reference.status_code == 200
    assert "text/html" in reference.headers["content-type"]
    listed = httpx.get(f"{running.url}/v1/models").json()
    assert all(f"<code>{e['ivg']['method']}</code>" in reference.text for e in listed["data"])
    assert "<code>kl_budget</code>" in reference.text
    assert "<code>/v1/chat/completions</code>" in reference.text


def test_the_reference_tells_nothing_of_the_models_where_a_key_is_wanted():
    with Running(tiny(), api_keys=("one-secret-key",)) as server:
        reference = httpx.get(f"{server.url}/reference")
        assert reference.status_code == 200 and "This server wants an API key" in reference.text
        for name in ("tiny", "cbs-explicit", "<code>eft</code>"):
            assert name not in reference.text
        assert "<code>kl_budget</code>" in reference.text and "<code>/v1/chat/completions</code>" in reference.text


def test_request_ids(running):
    assert httpx.get(f"{running.url}/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    other = httpx.get(f"{running.url}/health", headers={"x-request-id": "bad id, worse"}).headers["x-request-id"]
    assert len(other) == 32


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_logprobs_of_an_answer_without_tokens(running, library, path):
    ask = {"model": "tiny:eft", "logit_bias": {str(next(iter(library.base.vocabulary.eos_ids))): 100}, "temperature": 0, "max_tokens": 4}
    chat = {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 1}
    ask |= chat if "chat" in path else {"prompt": "x", "logprobs": 1}
    whole = running.post(ask, path).json()
    assert whole["usage"]["completion_tokens"] <= 1 and whole["choices"][0]["finish_reason"] == "stop"
    streamed = [c["choices"][0]["logprobs"] for c in chunks(running.post(ask | {"stream": True}, path)) if c["choices"]]
    assert [found for found in streamed if found] == [whole["choices"][0]["logprobs"]]


def test_a_prompt_that_comes_again_gets_new_samples(running, library):
    ask = running.client().completions.create
    got = ask(model="tiny:base", prompt=["One", "Two", "One", "One"], n=2, seed=5, **SAMPLING)
    wanted = [
        expected(library, p, "base", 5, i).text
        for p, i in zip(["One"] * 2 + ["Two"] * 2 + ["One"] * 4, [0, 1, 0, 1, *range(2, 6)], strict=True)
    ]
    assert [c.text for c in sorted(got.choices, key=lambda c: c.index)] == wanted
    assert len({c.text for c in ask(model="tiny:base", prompt=["One"] * 4, **SAMPLING).choices}) == 4


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_tokens_that_are_part_of_a_character(running, stream):
    body = {"model": "tiny:eft", "guided_choice": ["日🎬"], "seed": 1, "max_tokens": 7, "stream": stream}  # seven tokens, each a byte
    chat = {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 2}
    answer = running.post(body | chat, "/v1/chat/completions")
    parts = [c["choices"][0]["logprobs"] for c in chunks(answer)] if stream else [answer.json()["choices"][0]["logprobs"]]
    tokens = [token for part in parts if part for token in part["content"]]
    assert bytes(byte for t in tokens for byte in t["bytes"]) == "日🎬".encode() and "".join(t["token"] for t in tokens) == "日🎬"
    assert len(tokens) == 7
    for t in tokens:
        assert [(o["token"], o["bytes"]) for o in t["top_logprobs"] if o["logprob"] == t["logprob"]] == [(t["token"], t["bytes"])]
        assert all(o["bytes"] for o in t["top_logprobs"])
    answer = running.post(body | {"prompt": "日本 café", "echo": True, "logprobs": 1}, "/v1/completions")
    parts = [c["choices"][0]["logprobs"] for c in chunks(answer)] if stream else [answer.json()["choices"][0]["logprobs"]]
    shown = [pair for part in parts if part for pair in zip(part["tokens"], part["top_logprobs"], strict=True)]
    assert "".join(token for token, _ in shown) == "日本 café日🎬"
    assert shown[0][1] is None and all(token in tops for token, tops in shown[1:])
