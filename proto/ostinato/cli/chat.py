"""`ostinato chat`: a conversation in the terminal, whose every answer can be asked for again.

The history file has one JSON object per line: a message as in OpenAI's API, and with an answer what repeats it (`Answer`).
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, aclosing, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any, NamedTuple

import typer
from google.protobuf import json_format

from ostinato import errors, requests
from ostinato.cli import documents, show
from ostinato.cli.generate import SAMPLING, Screen, TemplateKwargs, Tools, chat_arguments, placed, sampling_of
from ostinato.cli.session import FAILED, Session, lock, options, usage, wrong
from ostinato.client import Client
from ostinato.compare import first_difference
from ostinato.v1 import generation_pb2, types_pb2

HELP = """/again   ask for the last answer once more, and compare
/undo    forget the last question and its answer
/help    this list
/exit    end; so does end of input
A line that begins with // is a message that begins with /."""
HISTORY_BYTES_MAX = 64 * 2**20


class Answer(NamedTuple):
    """What repeats an answer, beside the messages before it."""

    sequence: int
    parameters: dict[str, Any]
    """Parameters in protobuf's JSON, with the seed in effect."""
    options: dict[str, str]
    """Tools and arguments of the template, as `requests.chat` takes them."""
    token_ids: list[int]
    finish_reason: str
    fingerprint: str
    """Its digest, in hexadecimal digits."""


@dataclass
class Turn:
    message: dict[str, Any]
    answer: Answer | None = None

    def line(self) -> bytes:
        return json.dumps(self.message | (self.answer._asdict() if self.answer else {})).encode() + b"\n"


@dataclass
class Conversation:
    """The messages so far, and how they are sent."""

    client: Client
    timeout: float | None
    parameters: types_pb2.Parameters
    options: dict[str, str]
    """As in Answer."""
    history: IO[bytes] | None = None
    """Locked: one conversation at a time."""
    turns: list[Turn] = field(default_factory=list)

    async def ask(self, text: str) -> bool:
        """Whether there is an answer."""
        turns = [*self.turns, Turn({"role": "user", "content": text})]
        result = await self._answered(turns, self.parameters, self.options)
        if not result.HasField("output"):
            return False
        parameters = show.as_dict(self.parameters) | {"seed": str(result.output.seed)}
        new = [turns[-1], Turn(_message(result.output), _answer(result, parameters, self.options))]
        self.turns += new
        self.save(new, os.SEEK_END)
        return True

    async def again(self) -> bool:
        """Whether the last answer is the same."""
        if len(self.turns) < 2 or (recorded := self.turns[-1].answer) is None:
            show.note("error: there is no answer yet")
            return False
        parameters = json_format.ParseDict(recorded.parameters, types_pb2.Parameters())
        result = await self._answered(self.turns[:-1], parameters, recorded.options)
        if not result.HasField("output"):
            return False
        again = _answer(result, recorded.parameters, recorded.options)
        difference = first_difference(recorded.token_ids, again.token_ids)
        if difference is None and again.finish_reason == recorded.finish_reason:
            show.line(f"MATCH: sequence {again.sequence} has the {len(again.token_ids)} tokens of sequence {recorded.sequence}")
            return True
        at = len(recorded.token_ids) if difference is None else difference
        verdict = "DIVERGED" if again.fingerprint == recorded.fingerprint else "INCOMPARABLE, the fingerprint is another"
        show.line(f"{verdict}: sequence {again.sequence} parts from sequence {recorded.sequence} at token {at}")
        return False

    def undo(self) -> None:
        """Forget the last question and what follows it."""
        asked = [place for place, turn in enumerate(self.turns) if turn.message["role"] == "user"]
        if not asked:
            show.note("error: there is no question yet")
            return
        del self.turns[asked[-1] :]
        self.save(self.turns, os.SEEK_SET)

    def save(self, turns: Iterable[Turn], whence: int) -> None:
        """Writes these turns at the file's end, or in place of all."""
        if self.history is not None:
            self.history.seek(0, whence)
            self.history.truncate()
            self.history.write(b"".join(turn.line() for turn in turns))
            self.history.flush()

    async def _answered(
        self, turns: list[Turn], parameters: types_pb2.Parameters, options: Mapping[str, Any]
    ) -> types_pb2.Result:
        """Shows the answer while it comes."""
        item = types_pb2.Item(chat=requests.chat([turn.message for turn in turns], **options))
        request = generation_pb2.GenerateRequest(items=[item], parameters=parameters)
        async with aclosing(self.client.stream(request, timeout=self.timeout)) as events:
            with placed("question"), closing(Screen()) as screen:
                async for event in events:
                    screen.take(event)
                    if event.HasField("finished") or event.HasField("failed"):
                        return event.finished if event.HasField("finished") else event.failed
        raise errors.Disconnected("the stream ended without an outcome")


def chat(
    session: Session,
    system: Annotated[str | None, typer.Option(help="The system message of a new conversation.", show_default=False)] = None,
    history: Annotated[
        Path | None, typer.Option(help="Keeps the conversation, and continues it.", metavar="FILE", show_default=False)
    ] = None,
    tools: Tools = None,
    template_kwargs: TemplateKwargs = None,
    **sampling: Annotated[Any, SAMPLING],
) -> int:
    """A conversation in the terminal. /again asks for the last answer once more and says MATCH, or where it parted."""
    if session.json:
        raise wrong("--json: is for commands that print records; generate --messages prints an answer as JSON")
    with options():
        parameters = requests.parameters(sampling_of(sampling)) or types_pb2.Parameters()
    arguments = chat_arguments(tools, template_kwargs)
    with ExitStack() as stack:
        runner = stack.enter_context(asyncio.Runner())
        client = session.client()
        stack.callback(lambda: runner.run(client.close()))
        conversation = Conversation(client, session.timeout, parameters, arguments)
        if history is not None:
            with usage("--history"):
                opened = os.open(history, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)  # for this user, if it is new
                conversation.history = stack.enter_context(os.fdopen(opened, "r+b"))
            lock(conversation.history, f"--history: {history}: another conversation uses it")
            conversation.turns = _read(conversation.history, history)
        if system is not None:
            if conversation.turns:
                raise wrong(f"--system: {history} has a conversation already")
            conversation.turns = [Turn({"role": "system", "content": system})]
            conversation.save(conversation.turns, os.SEEK_END)
        return 0 if _converse(runner, conversation) else FAILED


def _converse(runner: asyncio.Runner, conversation: Conversation) -> bool:
    """Until the input ends. Whether no answer failed and none that was asked for again differed."""
    succeeded = True
    for line in _lines():
        try:
            match line.strip():
                case "":
                    continue
                case "/exit":
                    break
                case "/help":
                    show.line(HELP)
                case "/undo":
                    conversation.undo()
                case "/again":
                    succeeded &= runner.run(conversation.again())
                case command if command.startswith("/") and not command.startswith("//"):
                    show.note(f"error: no such command: {show.visible(command)}; /help lists them")
                case _:
                    text = line.removeprefix("/") if line.startswith("//") else line
                    succeeded &= runner.run(conversation.ask(text))
        except KeyboardInterrupt:
            show.note("interrupted; the question is forgotten")
        except errors.OstinatoError as error:
            show.failure(error)
            succeeded = False
    return succeeded


def _lines() -> Iterator[str]:
    """Of stdin, after a prompt if it is a terminal."""
    if not sys.stdin.isatty():
        for line in sys.stdin.buffer:
            yield line.decode(errors="replace").rstrip("\r\n")
        return
    with suppress(ImportError):
        import readline  # noqa: F401  # input() has line editing then
    while True:
        try:
            yield input("> ")
        except EOFError:
            show.line("")
            return


def _message(output: types_pb2.Output) -> dict[str, Any]:
    """The assistant's, with its parts if they were parsed."""
    if not output.HasField("parsed"):
        return {"role": "assistant", "content": output.text}
    message: dict[str, Any] = {"role": "assistant", "content": output.parsed.content}
    if output.parsed.reasoning:
        message["reasoning_content"] = output.parsed.reasoning
    if output.parsed.tool_calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in output.parsed.tool_calls
        ]
    return message


def _answer(result: types_pb2.Result, parameters: dict[str, Any], options: dict[str, str]) -> Answer:
    output = result.output
    reason = types_pb2.FinishReason.Name(output.finish_reason)
    fingerprint = result.receipt.header.fingerprint_digest.hex()
    return Answer(result.sequence, parameters, options, list(output.token_ids), reason, fingerprint)


def _read(file: IO[bytes], path: Path) -> list[Turn]:
    data = file.read(HISTORY_BYTES_MAX + 1)
    if len(data) > HISTORY_BYTES_MAX:
        raise wrong(f"--history: {path}: is larger than {HISTORY_BYTES_MAX} bytes")
    if data and not data.endswith(b"\n"):
        raise wrong(f"--history: {path}: its last line is not whole: remove it")
    turns = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            with usage(f"--history: {path}:{number}"):
                turns.append(_turn(documents.loads(line)))
    return turns


def _turn(given: object) -> Turn:
    """Raises ValueError or TypeError."""
    if not isinstance(given, dict):
        raise TypeError("must be a JSON object")
    answer = None
    options: dict[str, Any] = {}
    if "sequence" in given:
        try:
            answer = Answer(**{name: given.pop(name) for name in Answer._fields})
            json_format.ParseDict(answer.parameters, types_pb2.Parameters())
            options = {
                name: requests.text(name, answer.options[name]) for name in answer.options.keys() & {"tools", "template_kwargs"}
            }
            if answer.token_ids:
                requests.token_ids(answer.token_ids)
        except (KeyError, AttributeError, TypeError, json_format.ParseError) as error:
            raise ValueError(f"is not a turn of a conversation: {error}") from None
    requests.chat([given], **options)
    return Turn(given, answer)
