"""A completions endpoint in a thread, for tests: its answers follow from the prompt and the seed, and it misbehaves to order."""

import json
import select
import socket
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from ivg.utils.rng import mix

LETTERS = "abcdefgh"


def written(prompt, seed, tokens, stops=(), ends=True):
    """What the server writes: (text, finish_reason, stop string, letters and an end), from the prompt's hash and the seed."""
    text, spelt = "", []
    for i in range(tokens):
        place = mix(zlib.crc32(prompt.encode()), seed, i) % (len(LETTERS) + 1)
        if place == len(LETTERS):
            if not ends:
                place = 0
            else:
                return text, "stop", None, [*spelt, "</s>"]
        text += LETTERS[place]
        spelt.append(LETTERS[place])
        for stop in stops:
            if text.endswith(stop):
                return text[: -len(stop)], "stop", stop, spelt
    return text, "length", None, spelt


class Server:
    """An endpoint whose behaviour is set by attributes; keeps its requests."""

    def __init__(self, **behaviour):
        self.delay, self.together, self.status, self.at_a_time = 0.0, 0, {}, "many"
        self.text, self.page, self.finish, self.names_stops, self.says, self.reports = None, None, None, True, None, True
        self.names_ends = True
        self.__dict__.update(behaviour)
        self.requests, self.gone, self.now, self.peak, self.changed = [], 0, 0, 0, threading.Condition()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with outer.changed:
                    outer.requests.append(body | {"path": self.path, "key": self.headers["authorization"]})
                    outer.now += 1
                    outer.peak = max(outer.peak, outer.now)
                    outer.changed.notify_all()
                try:
                    if self.lives(outer.delay):
                        self.reply(*outer.answer(body))
                finally:
                    with outer.changed:
                        outer.now -= 1
                        outer.changed.notify_all()

            def lives(self, seconds):
                """Wait, unless the client goes away."""
                outer.wait_for(lambda: outer.peak >= outer.together)
                if select.select([self.connection], [], [], seconds)[0] and not self.connection.recv(1, socket.MSG_PEEK):
                    with outer.changed:
                        outer.gone += 1
                        outer.changed.notify_all()
                    return False
                return True

            def reply(self, status, body):
                data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("content-type", "text/html" if isinstance(body, str) else "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def wait_for(self, condition, seconds=200):
        """Wait until ``condition()`` holds; False if it does not within ``seconds``."""
        with self.changed:
            return self.changed.wait_for(condition, seconds)

    def answer(self, body):
        for word, status in self.status.items():
            if word in body["prompt"]:
                return status, {"error": {"message": self.says or f"no {word}\nhere", "type": "x"}}
        if self.page:
            return 200, self.page
        if self.at_a_time == "refuses" and body["n"] > 1:
            return 400, {"error": {"message": "Only one completion choice is allowed"}}
        n, total, choices = 1 if self.at_a_time == "ignores" else body["n"], 0, []
        for i in range(n):
            text, finish, stop, spelt = self.text(i) if self.text else written(
                body["prompt"], body["seed"] + i, body["max_tokens"], body.get("stop", ()), not body.get("ignore_eos")
            )  # fmt: skip
            total += len(spelt)
            choice = {"index": i, "text": text, "finish_reason": self.finish or finish, "logprobs": None}
            choice |= {"logprobs": self.logprobs(spelt, body["logprobs"])} if "logprobs" in body and self.reports else {}
            choices.insert(0, choice | ({"stop_reason": stop} if self.names_stops else {}))  # in no particular order
        usage = {"prompt_tokens": 7, "completion_tokens": total, "total_tokens": 7 + total}
        return 200, {"id": "x", "object": "text_completion", "created": 0, "model": body["model"], "choices": choices, "usage": usage}

    def logprobs(self, spelt, count):
        """The letter's place in the alphabet as its log-probability, and the two before it as likelier ones."""
        spelt = [letter for letter in spelt if self.names_ends or letter != "</s>"]
        drawn = [-float(LETTERS.find(letter) + 2) for letter in spelt]
        top = [{letter: p, "y": p + 0.5, "z": p + 1} for letter, p in zip(spelt, drawn, strict=True)]
        return {"tokens": spelt, "token_logprobs": drawn} | ({"top_logprobs": top} if count else {})

    def stop(self):
        self.http.shutdown()
        self.http.server_close()
