"""``ivg chat`` in the terminal, through pipes, and against a running server; standard input of the other verbs."""

import io
import json
import os
import pty
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from ivg import GuidedModel
from ivg.cli.chat_backends import Backend, LocalBackend, ServerBackend
from ivg.cli.chat_session import COMMANDS, ChatSession, trace_lines
from ivg.cli.trace import trace_node
from ivg.errors import ConfigError, GenerationError
from ivg.models.loading import LoadOptions
from ivg.testing import byte_tokenizer, tiny_model, tiny_value
from ivg.types import Completion, Step, TraceNode, Usage
from serving_tools import Running, tiny

LENGTH = ["--max-new-tokens", "6", "--ignore-eos", "--dtype", "float32", "--device", "cpu"]
SETTINGS = {"max_new_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Directories of tiny chat models."""
    folder = tmp_path_factory.mktemp("chat")
    for seed, name in enumerate(("base", "tuned", "untuned")):
        tiny_model("llama", seed, context=512).save_pretrained(folder / name)
        byte_tokenizer(chat=True).save_pretrained(folder / name)
    tiny_value("vocabulary", seed=7, tokenizer=byte_tokenizer(chat=True)).save_pretrained(folder / "value")
    return folder


@pytest.fixture
def models(folder):
    return [x for name in ("base", "tuned", "untuned", "value") for x in (f"--{name}", str(folder / name))] + LENGTH


@pytest.fixture(scope="module")
def library(folder):
    paths = {name: folder / name for name in ("tuned", "untuned", "value")}
    return GuidedModel.from_pretrained(folder / "base", **paths, options=LoadOptions(device="cpu", dtype="float32"))


class Terminal(io.StringIO):
    """Someone types these lines."""

    def isatty(self):
        return True


def type_in(monkeypatch, tmp_path, *lines):
    monkeypatch.setattr(sys, "stdin", Terminal("".join(f"{line}\n" for line in lines)))
    monkeypatch.setenv("IVG_CACHE", str(tmp_path))


def pipe(monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


# Pipes and arguments


def test_a_pipe_is_one_message(ivg, models, library, monkeypatch):
    pipe(monkeypatch, "Was it\ngood?\n")
    code, out, err = ivg("chat", *models, "--seed", 3)
    expected = library.generate([user("Was it\ngood?")], "ivg", seed=3, **SETTINGS)
    assert (code, out) == (0, expected.text + "\n")
    assert "ivg · score" in err
    pipe(monkeypatch, "Was it\ngood?\n")
    assert ivg("chat", *models, "--seed", 3, "--quiet") == (0, out, "")


def test_arguments_are_the_turns_of_one_conversation(ivg, models, library, monkeypatch):
    pipe(monkeypatch, "And you?\n")
    code, out, err = ivg("chat", "Hi", "-", *models, "--method", "eft", "--system", "Be kind.", "--json", "--compare", "base")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and err == "" and [row["method"] for row in rows] == ["eft", "base", "eft", "base"]
    first = [{"role": "system", "content": "Be kind."}, user("Hi")]
    assert rows[0]["messages"] == rows[1]["messages"] == first
    answers = [library.generate(first, m, **SETTINGS) for m in ("eft", "base")]
    assert [row["text"] for row in rows[:2]] == [a.text for a in answers]
    second = [*first, assistant(answers[0].text), user("And you?")]
    assert rows[2]["messages"] == second
    assert rows[2]["token_ids"] == list(library.generate(second, "eft", **SETTINGS).token_ids)


@pytest.mark.parametrize("text", ["", "\n", "  \n"])
def test_an_empty_pipe_is_an_error(ivg, models, monkeypatch, text):
    pipe(monkeypatch, text)
    code, out, err = ivg("chat", *models)
    assert code == 2 and out == "" and "standard input is empty" in err
    pipe(monkeypatch, text)
    assert ivg("generate", *models)[::2] == (2, "error: give prompts, or --input FILE (exactly one of the two)\n")
    pipe(monkeypatch, text)
    assert "standard input is empty" in ivg("generate", "-", *models)[2]
    pipe(monkeypatch, text)
    assert "no prompt - give one" in ivg("compare", *models)[2]


def test_a_failed_answer_has_an_exit_code(ivg, models):
    code, out, err = ivg("chat", "x" * 600, "Hi", *models)
    assert code == 2 and "context" in err and out.strip()  # the second message is answered


def test_generate_and_compare_read_pipes(ivg, models, monkeypatch):
    expected = ivg("generate", "The movie", *models, "--seed", 3)[1]
    for arguments in ((), ("-",)):
        pipe(monkeypatch, "The movie\n")
        assert ivg("generate", *arguments, *models, "--seed", 3, "--quiet") == (0, expected, "")
    pipe(monkeypatch, "The movie\n")
    code, out, _ = ivg("generate", "-", *models, "--seed", 3, "--json", "--quiet")
    (row,) = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and row["prompt"] == "The movie" and expected.strip().endswith(row["text"].strip())
    assert "--json and --output" in ivg("generate", "x", *models, "--json", "--output", "a.jsonl")[2]
    assert "got - twice" in ivg("generate", "-", "-", *models)[2]
    pipe(monkeypatch, "The movie\n")
    code, out, err = ivg("compare", *models, "--methods", "base,eft", "--beta", 2, "--json", "--quiet")
    found = json.loads(out)
    assert code == 0 and err == "" and found["prompt"] == "The movie" and found["judge"] == "explicit"
    assert [row["method"] for row in found["answers"]] == ["base", "eft"]
    assert all(isinstance(row[name], int | float) for row in found["answers"] for name in ("value", "tokens", "seconds"))


def test_a_real_pipe(models):
    line = [sys.executable, "-m", "ivg", "chat", *models, "--quiet", "--method", "base"]
    done = subprocess.run(line, input="Hi\n", capture_output=True, text=True, check=True)
    assert done.stdout.strip() and done.stderr == ""


def test_a_base_without_chat_template_continues_each_message(ivg, models, folder, tmp_path, monkeypatch):
    byte_tokenizer().save_pretrained(tmp_path / "plain")
    tiny_model("llama", 0, context=512).save_pretrained(tmp_path / "plain")
    plain = ["--base", tmp_path / "plain", *LENGTH]
    model = GuidedModel.from_pretrained(tmp_path / "plain", options=LoadOptions(device="cpu", dtype="float32"))
    type_in(monkeypatch, tmp_path, "One", "/system Be kind.", "Two")
    code, out, err = ivg("chat", *plain, "--method", "base")
    assert code == 0 and "each message is continued by itself" in err and "no system turn" in err
    answers = [model.generate(text, "base", **SETTINGS).text for text in ("One", "Two")]
    assert answers[0] in out and answers[1] in out
    assert ivg("chat", "x", *plain, "--method", "base", "--system", "Be kind.")[0] == 2


# A conversation


def test_a_conversation(ivg, models, library, monkeypatch, tmp_path):
    page = tmp_path / "page.html"
    lines = ["Hi", "/method eft", "/beta 2", "Why?", "/trace", f"/trace {page}", "/compare base", '"""a', 'b"""', "/compare off", "/retry"]
    type_in(monkeypatch, tmp_path, *lines)
    code, out, err = ivg("chat", *models, "--system", "Be kind.")
    assert code == 0
    turns = [{"role": "system", "content": "Be kind."}, user("Hi")]
    expected = []
    for method, settings, new in (("ivg", {}, "Why?"), ("eft", {"beta": 2.0}, "a\nb")):
        expected.append(library.generate(turns, method, **settings, **SETTINGS).text)
        turns += [assistant(expected[-1]), user(new)]
    expected += [library.generate(turns, m, **s, **SETTINGS).text for m, s in (("eft", {"beta": 2.0}), ("base", {}))]
    expected.append(library.generate(turns, "eft", beta=2.0, seed=1, **SETTINGS).text)
    places = [out.find(text) for text in expected]
    assert -1 not in places and places == sorted(places)
    assert "selection 1" in err and "<html" in page.read_text()
    assert out.count("[eft]") == out.count("[base]") == 1


class Echo(Backend):
    """Answers with what it was asked."""

    def __init__(self, chats=True, answer=None):
        super().__init__("echo", ("base", "eft", "ivg"), chats)
        object.__setattr__(self, "calls", [])
        object.__setattr__(self, "reply", answer or (lambda turns: turns[-1]["content"].upper()))

    def check(self, method, settings):
        if method == "args":
            raise ConfigError("no value for args")
        if "draft" in settings:
            raise ConfigError("draft needs a pair")

    def answer(self, turns, method, settings, show):
        self.calls.append((list(turns), method, dict(settings)))
        text = self.reply(turns)
        show(text)
        return Completion(text, (1,), None, "stop", Usage({"base": 3}, 1, 1, 0.0))


@pytest.fixture
def session():
    said = []
    made = ChatSession(Echo(), lambda method: {"temperature": 0.5, "beta": 3.0}, io.StringIO(), said.append, method="eft")
    made.said = said
    return made


def test_every_command_is_in_the_help(session):
    session.handle("/help")
    assert [line.split()[0] for line in session.said] == list(COMMANDS)


def test_settings_follow_the_method(session):
    session.handle("/set W=3")
    session.handle("/set top_p=0.5")
    ignored = "note: width=3 ignored: the method eft selects among nothing (select=VALUE makes it a search)"
    assert session.said == [ignored, "top_p=0.5"]
    session.handle("a")
    assert session.backend.calls[-1][1:] == ("eft", {"temperature": 0.5, "beta": 3.0, "top_p": 0.5, "seed": 0})
    session.handle("/method ivg")
    session.handle("/beta 1.5")
    assert session.said[-2:] == ["method ivg", "beta=1.5"]  # what was changed is said
    session.handle("/set seed=7")
    session.handle("b")
    assert session.backend.calls[-1][1:] == ("ivg", {"temperature": 0.5, "beta": 1.5, "width": 3, "top_p": 0.5, "seed": 7})
    session.handle("/set beta=")
    session.handle("/beta")
    assert session.said[-1] == "beta=3.0"
    session.handle("/set")
    assert session.said[-1] == "method=ivg, temperature=0.5, beta=3.0, width=3, top_p=0.5, seed=7"


@pytest.mark.parametrize(
    "line, error",
    [
        ("/set temprature=1", "unknown setting 'temprature'"),
        ("/set temperature=hot", "temperature"),
        ("/beta 5000", "beta must be"),
        ("/set seed=x", "expected a whole number"),
        ("/set draft=3", "draft needs a pair"),
        ("/method args", "no value for args"),
        ("/compare base,args", "no value for args"),
        ("/nothing", "no command /nothing"),
    ],
)
def test_a_wrong_command_changes_nothing(session, capsys, line, error):
    assert session.handle(line)
    assert error in capsys.readouterr().err
    assert (session.method, session.typed, session.compare, session.turns) == ("eft", {}, (), [])


def test_turns_system_and_reset(session):
    for line in ("/system Be brief.", "one", "two", "/system", "/system off", "three", "/reset", "four", " /a path"):
        assert session.handle(line)
    asked = [[t["content"] for t in turns] for turns, _, _ in session.backend.calls]
    assert asked == [
        ["Be brief.", "one"],
        ["Be brief.", "one", "ONE", "two"],
        ["one", "ONE", "two", "TWO", "three"],
        ["four"],
        ["four", "FOUR", " /a path"],
    ]
    assert not session.handle("/quit") and not session.handle("/exit")


def test_retry_draws_again_and_keeps_the_conversation(session):
    for line in ("/retry", "one", "/retry", "/retry", "two"):
        session.handle(line)
    assert [settings["seed"] for _, _, settings in session.backend.calls] == [0, 1, 2, 0]
    assert [t["content"] for t in session.turns] == ["one", "ONE", "two", "TWO"]


def test_the_beams_of_a_trace_are_in_the_order_of_their_scores():
    def node(text, score, kept):
        return TraceNode(0, None, text, (), (), score, kept, None)

    step = Step(0, (node("a", 0.5, True), node("b", 2.0, True)), (node("c", -1.0, False), node("d", 1.0, False)), "")
    completion = Completion("b", (1,), 2.0, "stop", Usage({}, 1, 1, 0.0), trace=(step, Step(0, (node("e", None, True),), (), "")))
    assert trace_lines(completion) == [
        "selection 1", " >   +2.000  'b'", "     +1.000  'd'", " >   +0.500  'a'", "     -1.000  'c'", "selection 2", " > 'e'",
    ]  # fmt: skip


def test_a_beam_of_a_server_shows_what_it_adds_to_its_parent():
    """A server counts beams from 0."""
    child = TraceNode(1, 0, "abc", ("a", "b", "c"), (0.0, 0.0, 1.0), None, True, None)
    assert trace_node(child, {0: 2})["tokens"] == [["c", 1.0]]
    assert len(trace_node(TraceNode(1, None, "ab", ("a", "b"), (0.0, 0.0), None, True, None), {0: 1})["tokens"]) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, GenerationError("broken")])
def test_a_message_whose_answer_is_stopped_is_forgotten(session, capsys, error):
    session.handle("one")

    def fail(turns):
        raise error

    object.__setattr__(session.backend, "reply", fail)
    session.handle("two")
    assert [t["content"] for t in session.turns] == ["one", "ONE"]
    session.handle("/retry")
    assert [t["content"] for t in session.turns] == ["one", "ONE"]
    object.__setattr__(session.backend, "reply", lambda turns: "three")
    session.handle("/retry")
    assert [t["content"] for t in session.turns] == ["one", "three"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, GenerationError("broken")])
def test_a_method_that_is_compared_may_fail(session, capsys, error):
    """The conversation goes on with the answer that is there."""

    def reply(turns):
        if len(session.backend.calls) % 2 == 0:  # the second of each two answers
            raise error
        return "fine"

    object.__setattr__(session.backend, "reply", reply)
    session.handle("/compare base")
    assert session.send("one")
    assert [t["content"] for t in session.turns] == ["one", "fine"] and [name for name, _ in session.last] == ["eft"]
    assert not any("forgotten" in line for line in session.said)
    assert session.failures == int("broken" in capsys.readouterr().err)


def test_a_comparison_that_fails_has_an_exit_code(ivg, models, monkeypatch):
    answer = LocalBackend.answer

    def fail(self, turns, method, settings, show):
        if method == "eft":
            raise GenerationError("broken")
        return answer(self, turns, method, settings, show)

    monkeypatch.setattr(LocalBackend, "answer", fail)
    code, out, err = ivg("chat", "Hi", *models, "--method", "base", "--compare", "eft", "--json")
    assert (code, len(out.splitlines()), err) == (1, 1, "error: broken\n")


def test_keys_of_a_terminal(models, tmp_path):
    """A real terminal: history is kept, Ctrl-D ends."""
    ours, theirs = pty.openpty()
    line = [sys.executable, "-m", "ivg", "chat", *models, "--method", "base"]
    environment = {**os.environ, "IVG_CACHE": str(tmp_path), "TERM": "dumb"}
    process = subprocess.Popen(line, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, close_fds=True)
    os.close(theirs)
    seen = b""
    sent = iter([b"Hi\r", b"\x04"])
    try:
        while (piece := os.read(ours, 4096)) or True:
            seen += piece
            if seen.endswith(b"> ") and (keys := next(sent, None)):
                os.write(ours, keys)
    except OSError:  # the other end is closed
        pass
    assert process.wait(60) == 0
    assert b"/help lists commands" in seen and re.search(rb"base .* 6 tokens", seen)
    assert (tmp_path / "chat_history").read_text().splitlines()[-1] == "Hi"


# A running server


@pytest.fixture(scope="module")
def server():
    with Running(tiny(), api_keys=("secret-key-1",)) as running:
        yield running


@pytest.mark.parametrize("method", ["base", "ivg"])
def test_a_server_answers_as_its_models_do(ivg, server, monkeypatch, method):
    monkeypatch.setenv("IVG_API_KEY", "secret-key-1")
    settings = {"max_new_tokens": 6, "temperature": 0.5, "top_k": 7, "seed": 5}
    code, out, err = ivg(
        "chat", "Film", "--url", server.url, "-m", method, "--max-new-tokens", 6, "--temperature", 0.5, "--top-k", 7, "--seed", 5, "--json"
    )
    expected = server.served.model.generate("Film", method, **settings)
    row = json.loads(out)
    assert (code, err, row["text"], row["finish_reason"]) == (0, "", expected.text, expected.finish_reason)
    assert row["usage"]["forward_tokens"] == expected.usage.forward_tokens and "token_ids" not in row
    assert row["score"] == (None if method == "base" else pytest.approx(expected.score, abs=1e-4))


def test_a_conversation_with_a_server(ivg, server, monkeypatch, tmp_path):
    monkeypatch.setenv("IVG_API_KEY", "secret-key-1")
    type_in(
        monkeypatch, tmp_path, "/method", "One", "/method ivg", "/set max_new_tokens=7", "Two", "/trace", "/method nothing", "/set top_k=-3"
    )
    code, out, err = ivg("chat", "--url", f"{server.url}/v1", "--max-new-tokens", 5, "--seed", 1)
    assert code == 0 and "method of the server; there are: ivg, base, bon" in err
    model = server.served.model
    first = model.generate("One", "ivg", max_new_tokens=5, seed=1).text
    second = model.generate(f"One\n{first}\nTwo", "ivg", max_new_tokens=7, seed=1)
    assert first in out and second.text in out
    assert "selection 1" in err and repr(second.text) in err
    assert "unknown method 'nothing'" in err and "top_k" in err


def test_a_server_that_refuses_or_is_not_there(ivg, server, monkeypatch):
    monkeypatch.delenv("IVG_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    code, _, err = ivg("chat", "x", "--url", server.url)
    assert code == 2 and "no valid API key" in err and "set IVG_API_KEY" in err
    monkeypatch.setenv("IVG_API_KEY", "secret-key-1")
    assert "context" in ivg("chat", "x" * 5000, "--url", server.url)[2]
    assert "cannot reach http://127.0.0.1:9/v1/models" in ivg("chat", "x", "--url", "http://127.0.0.1:9")[2]
    assert "cannot reach" in ivg("chat", "x", "--url", "nonsense")[2]
    assert "lists no models" in ivg("chat", "x", "--url", f"{server.url}/openapi.json?")[2]
    assert (
        "got --url and base, tuned, dtype"
        in ivg("chat", "x", "--url", server.url, "--base", "y", "--tuned", "z", "--dtype", "float32", "--seed", "2")[2]
    )


def test_the_key_of_a_server(ivg, server, monkeypatch):
    monkeypatch.setenv("IVG_API_KEY", "secret-key-1\r\n")  # of a file
    assert ivg("chat", "x", "--url", server.url, "--max-new-tokens", 2)[0] == 0
    for key in ("secret\nkey", "schlüssel"):
        monkeypatch.setenv("IVG_API_KEY", key)
        code, out, err = ivg("chat", "x", "--url", server.url)
        assert (code, out) == (2, "") and "IVG_API_KEY cannot be sent" in err and key not in err


def test_methods_are_those_of_the_server(ivg, server, monkeypatch):
    """Its plugins may have methods that are not known here, and it may lack others."""
    monkeypatch.setenv("IVG_API_KEY", "secret-key-1")
    assert "unknown method 'nothing' - the server has: ivg, base" in ivg("chat", "x", "--url", server.url, "--method", "nothing")[2]
    monkeypatch.setattr(ServerBackend, "check", lambda *_: None)
    code, _, err = ivg("chat", "x", "--url", server.url, "--method", "of-its-plugin")
    assert code == 2 and "of-its-plugin" in err and "expected one of: ivg" not in err


def test_backends_say_what_they_are(server, monkeypatch):
    monkeypatch.setenv("IVG_API_KEY", "secret-key-1")
    backend = ServerBackend.connect(server.url)
    assert backend.name == f"tiny at {server.url}" and set(backend.methods) == set(server.served.model.methods)
    assert LocalBackend("x", ("base",), True, server.served.model).methods == ("base",)


class Foreign(BaseHTTPRequestHandler):
    """A server of OpenAI's protocol that is not ivg's; it sends the lines of ``events``."""

    def do_GET(self):
        self.reply([json.dumps({"data": [{"id": "other"}]})])

    def do_POST(self):
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.reply([f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n" for event in self.server.events])

    def reply(self, parts):
        body = "".join(parts).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def foreign():
    server = HTTPServer(("127.0.0.1", 0), Foreign)
    server.asked, server.events = [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    server.server_close()


def event(finish=None, **delta):
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


def test_thinking_of_a_server_does_not_join_the_conversation(foreign, capsys):
    usage = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}
    foreign.events = [event(reasoning_content="Hm"), event(reasoning_content=", "), event(content="Yes"), event("stop", content="."), usage]
    said = []
    session = ChatSession(ServerBackend.connect(foreign.url), lambda method: {"max_new_tokens": 4}, io.StringIO(), said.append)
    session.handle("one")
    session.handle("two")
    assert [t["content"] for t in foreign.asked[1]["messages"]] == ["one", "Yes.", "two"]
    assert session.out.getvalue() == "Hm, </think>Yes.\n" * 2
    ((_, completion),) = session.last
    assert (completion.reasoning_content, completion.answer) == ("Hm, ", "Yes.")
    assert re.fullmatch(r"answer · 1 token \(stop\) · 0\.\d s", said[-1])
    assert {name: foreign.asked[0][name] for name in ("max_tokens", "seed", "model", "stream")} == {
        "max_tokens": 4, "seed": 0, "model": "other", "stream": True,
    }  # fmt: skip
    assert "guidance" not in foreign.asked[0]


def test_settings_that_a_foreign_server_lacks_are_refused(ivg, foreign):
    foreign.events = [event("stop", content="Yes")]
    for option in (["--top-k", 7], ["--regex", "a"], ["--beta", 2], ["--method", "eft"], ["--ignore-eos"]):
        code, out, err = ivg("chat", "x", "--url", foreign.url, *option)
        assert (code, out) == (2, "") and "this server is not ivg's: it has no" in err
    options = [
        "--temperature",
        0.5,
        "--top-p",
        0.9,
        "--frequency-penalty",
        1,
        "--presence-penalty",
        1,
        "--stop",
        "a",
        "--max-new-tokens",
        3,
    ]
    assert ivg("chat", "x", "--url", foreign.url, *options, "--quiet") == (0, "Yes\n", "")
    wanted = {"temperature": 0.5, "top_p": 0.9, "frequency_penalty": 1, "presence_penalty": 1, "stop": ["a"], "max_tokens": 3}
    assert {name: foreign.asked[0][name] for name in wanted} == wanted


@pytest.mark.parametrize(
    "events, error",
    [
        ([event(content="Y")], "ended the answer in the middle"),
        ([event(content="Y"), '{"choices'], "ended the answer in the middle"),
        ([{"error": {"message": "too hot"}}], "too hot"),
        ([{"error": "too cold"}], "too cold"),
    ],
)
def test_a_stream_that_breaks_is_an_error(ivg, foreign, events, error):
    foreign.events = events
    code, _, err = ivg("chat", "x", "--url", foreign.url)
    assert code == 2 and error in err and "Traceback" not in err
