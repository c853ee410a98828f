"""A conversation in the terminal: messages, commands that begin with ``/``, and what stays from turn to turn."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from ivg.cli.chat_backends import Backend, Turn, without_trace
from ivg.cli.options import plain_value
from ivg.cli.printing import cost_line
from ivg.cli.progress import print_error
from ivg.errors import ConfigError, IVGError
from ivg.search.unused import unused_settings
from ivg.settings.sampling import SamplingParams
from ivg.settings.schema import check, settings_of
from ivg.settings.search import SearchSettings
from ivg.types import Completion

SettingsFor = Callable[[str | None], dict[str, Any]]
OFF = ("off", "none")


@dataclass
class ChatSession:
    """One conversation.

    Attributes:
        backend: answers.
        settings_for: the settings of command line and recipe for a method.
        out: where answers go.
        say: where everything else goes, a line at a time; nothing where only answers are wanted.
        method: None: the server's own.
        compare: further methods that answer every message; their answers do not join the conversation.
        system: content of the system turn.
        as_json: one JSON object for each answer, in place of the text.
        seed: of all answers.
        typed: settings of ``/set`` and ``/beta``.
        turns: messages and answers so far.
    """

    backend: Backend
    settings_for: SettingsFor
    out: TextIO
    say: Callable[[str], None]
    method: str | None = None
    compare: tuple[str, ...] = ()
    system: str | None = None
    as_json: bool = False
    seed: int = 0
    typed: dict[str, Any] = field(default_factory=dict)
    turns: list[Turn] = field(default_factory=list)
    attempt: int = 0
    failures: int = 0
    """Answers that failed."""
    last: list[tuple[str, Completion]] = field(default_factory=list)
    """Method and completion of the last answers."""

    def handle(self, line: str) -> bool:
        """Send a message, or obey a command; False: the conversation is over. Errors are printed."""
        if not line.strip():
            return True
        name, _, rest = line.partition(" ")
        if not name.startswith("/"):
            self.send(line)
            return True
        command = COMMANDS.get("/quit" if name == "/exit" else name)
        if command is None:
            print_error(f"no command {name}\n  /help lists them; a message that begins with / needs a space before it")
            return True
        try:
            return command[2](self, rest.strip()) is not False
        except IVGError as e:
            print_error(str(e))
            return True

    # Messages

    def send(self, text: str) -> bool:
        """Answer a message; False where that failed, and the message is then forgotten."""
        self.turns.append({"role": "user", "content": text})
        self.attempt = 0
        return self._answer()

    def _answer(self) -> bool:
        """Answer the last message, by the method and those it is compared with."""
        names = tuple(dict.fromkeys((self.method, *self.compare)))
        found: list[tuple[str, Completion]] = []
        for name in names:
            try:
                found.append(self._answer_by(name, header=len(names) > 1))
            except KeyboardInterrupt:
                self.out.write("\n")
                self.say("stopped" if found else "stopped; the message is forgotten")
                break
            except IVGError as e:
                if not self.as_json:
                    self.out.write("\n")
                print_error(str(e))
                self.failures += 1
                if name == names[0]:
                    break
        if not found:
            self.turns.pop()
            return False
        self.last = found
        self.turns.append({"role": "assistant", "content": found[0][1].answer})
        return True

    def _answer_by(self, method: str | None, *, header: bool) -> tuple[str, Completion]:
        shown = method or "answer"
        settings = self.settings(method)
        if header and not self.as_json:
            self.out.write(f"[{shown}]\n")

        def show(piece: str) -> None:
            if not self.as_json:
                self.out.write(piece)
                self.out.flush()

        completion = self.backend.answer(self._sent, method, {**settings, "seed": self.seed + self.attempt}, show)
        if self.as_json:
            row = {"messages": self._sent, **({"method": method} if method else {}), **without_trace(completion)}
            self.out.write(json.dumps(row, ensure_ascii=False) + "\n")
        else:
            self.out.write("\n")
        self.out.flush()
        for note in completion.notes:
            self.say(f"note: {note}")
        self.say(cost_line(completion, shown))
        return shown, completion

    @property
    def _sent(self) -> list[Turn]:
        """What the models read."""
        if not self.backend.chats:
            return self.turns[-1:]
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def settings(self, method: str | None) -> dict[str, Any]:
        """The settings of a method: those of command line and recipe, and over them what was typed here."""
        known = {k: v for k, v in self.typed.items() if k in settings_of(SearchSettings)}
        unused = unused_settings(method, known) if method is not None else {}
        return {**self.settings_for(method), **{k: v for k, v in self.typed.items() if k not in unused}}

    # Commands

    def show_help(self, _: str) -> None:
        """The commands."""
        for name, (argument, text, _run) in COMMANDS.items():
            self.say(f"{f'{name} {argument}'.strip():24}{text}")

    def set_method(self, name: str) -> None:
        """Change the method, or say which there are."""
        if not name:
            self.say(f"method {self.method or 'of the server'}; there are: {', '.join(self.backend.methods)}")
            return
        self.backend.check(name, self.settings(name))
        self.method = name
        self.say(f"method {name}")
        self._note_unused()

    def set_beta(self, text: str) -> None:
        """Change the weight of token guidance."""
        self.set_setting(f"beta={text}" if text else "beta")

    def set_setting(self, text: str) -> None:
        """Change a setting of search or sampling, take it back (NAME=), or say what is set."""
        name, sign, value = (part.strip() for part in text.partition("="))
        if not name:
            mine = {**({"method": self.method} if self.method else {}), **self.settings(self.method), "seed": self.seed}
            self.say(", ".join(f"{key}={got}" for key, got in mine.items()))
            return
        if name == "seed" and sign:
            found = plain_value(value)
            if not isinstance(found, int) or isinstance(found, bool):
                raise ConfigError(f"seed={value}\n  expected a whole number")
            self.seed = found
            return
        name = _setting(name)
        if not sign:
            self._say_setting(name)
            return
        kept = dict(self.typed)
        kept.pop(name, None)
        if value:
            kind = SearchSettings if name in settings_of(SearchSettings) else SamplingParams
            kept[name] = plain_value(value)
            check(kind, name, kept[name])
        before, self.typed = self.typed, kept
        try:
            self.backend.check(self.method, self.settings(self.method))
        except IVGError:
            self.typed = before
            raise
        if not self._note_unused(name):
            self._say_setting(name)

    def _say_setting(self, name: str) -> None:
        self.say(f"{name}={self.settings(self.method).get(name, 'as the method has it')}")

    def _note_unused(self, only: str | None = None) -> bool:
        """Say which settings the method ignores; True: some."""
        known = {k: v for k, v in self.typed.items() if k in settings_of(SearchSettings) and only in (None, k)}
        unused = unused_settings(self.method, known) if self.method else {}
        for name, reason in unused.items():
            self.say(f"note: {name}={known[name]} ignored: {reason}")
        return bool(unused)

    def set_compare(self, text: str) -> None:
        """Let other methods answer, too."""
        names = tuple(part.strip() for part in text.split(",") if part.strip())
        names = () if names and names[0] in OFF else names or ("base",)
        for name in names:
            self.backend.check(name, self.settings(name))
        self.compare = names
        self.say(f"compared with {', '.join(names)}" if names else "not compared")

    def set_system(self, text: str) -> None:
        """Change the system turn, or say what it is."""
        if not text:
            self.say(f"system: {self.system or 'none'}")
            return
        if not self.backend.chats:
            raise ConfigError(
                "the base has no chat template, so there is no system turn\n  give --template base=…, or write it into the message"
            )
        self.system = None if text in OFF else text

    def show_trace(self, path: str) -> None:
        """Show the search behind the last answers, or write it as a page."""
        if not any(c.trace for _, c in self.last):
            self.say("no search to show: send a message first")
            return
        question = next((t["content"] for t in reversed(self.turns) if t["role"] == "user"), "")
        if path:
            from ivg.cli.trace import write_trace

            write_trace(Path(path), [(question, c) for _, c in self.last], " and ".join(name for name, _ in self.last))
            self.say(f"written: {path}")
            return
        for name, completion in self.last:
            self.say(f"[{name}]")
            for line in trace_lines(completion):
                self.say(line)

    def retry(self, _: str) -> None:
        """Answer the last message again, with other draws."""
        if not self.turns:
            self.say("no message to answer again")
            return
        answer = self.turns.pop() if self.turns[-1]["role"] == "assistant" else None
        question, before = self.turns[-1], self.attempt
        self.attempt += 1
        if not self._answer() and answer is not None:  # the old answer stays
            self.turns += [question, answer]
            self.attempt = before

    def reset(self, _: str) -> None:
        """Forget messages and answers; method, settings and system turn stay."""
        self.turns, self.last, self.attempt = [], [], 0

    def quit(self, _: str) -> bool:
        """End the conversation."""
        return False


Command = tuple[str, str, Callable[[ChatSession, str], Any]]
COMMANDS: dict[str, Command] = {
    "/method": ("[NAME]", "answer by this method from now on; alone: which there are", ChatSession.set_method),
    "/beta": ("[NUMBER]", "weight of token guidance", ChatSession.set_beta),
    "/set": (
        "[NAME=VALUE]",
        "any setting of search or sampling, or seed; NAME= takes it back; alone: what is set",
        ChatSession.set_setting,
    ),
    "/compare": ("[METHODS]", "also answer by these methods (base); off: no more", ChatSession.set_compare),
    "/system": ("[TEXT]", "system turn of the conversation; off: none", ChatSession.set_system),
    "/trace": ("[FILE]", "the search behind the last answer, or as an HTML page in FILE", ChatSession.show_trace),
    "/retry": ("", "answer the last message again, with other draws", ChatSession.retry),
    "/reset": ("", "forget the messages", ChatSession.reset),
    "/help": ("", "this list", ChatSession.show_help),
    "/quit": ("", "end; so do /exit and Ctrl-D", ChatSession.quit),
}


def _setting(name: str) -> str:
    """The setting that has this name or alias.

    Raises:
        ConfigError: none has.
    """
    for kind in (SearchSettings, SamplingParams):
        for known, declared in settings_of(kind).items():
            if name in (known, *declared.setting.aliases):
                return known
    listed = ", ".join((*settings_of(SearchSettings), *settings_of(SamplingParams), "seed"))
    raise ConfigError(f"unknown setting {name!r}\n  expected one of: {listed}")


def trace_lines(completion: Completion) -> list[str]:
    """The search as lines: for each selection the beams, best first; > marks those that were kept."""
    lines = []
    for number, step in enumerate(completion.trace, 1):
        lines.append(f"selection {number}")
        nodes = [*step.kept, *step.dropped]
        for node in sorted(nodes, key=lambda n: -(n.score or 0.0)):
            score = "" if node.score is None else f"{node.score:+8.3f}  "
            lines.append(f" {'>' if node.kept else ' '} {score}{node.text!r}")
    return lines
