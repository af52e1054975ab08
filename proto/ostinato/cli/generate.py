"""`ostinato generate`: prompts from arguments, stdin and files; outputs as a table, JSON, a stream, or a file (--output).

Prompts become requests of --batch prompts each (a Batch), --concurrency of them at once. Results keep the prompts' order.
"""

from __future__ import annotations

import asyncio
import codecs
import json
import re
import sys
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, count, islice, repeat
from pathlib import Path
from typing import Annotated, Any, NamedTuple, cast

import typer

from ostinato import digest, errors, requests
from ostinato.cli import documents, show
from ostinato.cli.session import FAILED, STDIN, Key, Session, lock, option, options, usage, wrong
from ostinato.client import DEFAULT_RESPONSE_BYTES, Client
from ostinato.v1 import generation_pb2, types_pb2

NO_PROMPT = "no prompt: give some as arguments, with --file, or with - on stdin"
LINE_BYTES_MAX = 64 * 2**20
"""A sidecar does not accept a larger request."""
RUN_NAME_BYTES_MAX = 128
COPIES_MAX, CONCURRENCY_MAX = 1_000_000, 10_000


def _sampling(kind: Any, text: str, *names: str, metavar: str | None = None) -> Any:
    option = typer.Option(*names, help=text, metavar=metavar, rich_help_panel="Sampling", show_default=False)
    return Annotated[kind | None, option]


SAMPLING: Mapping[str, Any] = {
    "seed": _sampling(int, "Any uint64; the same for all prompts. Default: one derived for each."),
    "temperature": _sampling(float, "0 to 100; 0 is greedy. Default 1."),
    "top_k": _sampling(int, "Sample from the K likeliest tokens; 0, the default, is off."),
    "top_p": _sampling(float, "Sample from the likeliest tokens of this total probability; 1, the default, is off."),
    "min_p": _sampling(float, "Lowest probability relative to the likeliest token; 0, the default, is off."),
    "repetition_penalty": _sampling(float, "Above 0, up to 10; 1, the default, is off."),
    "max_new_tokens": _sampling(int, "Default 128, or what the context leaves."),
    "min_new_tokens": _sampling(int, "Do not end before this many tokens. Default 0."),
    "stop": _sampling(list[str], "End before this string. May be repeated.", metavar="TEXT"),
    "stop_token_ids": _sampling(list[int], "End with this token. May be repeated.", "--stop-token-id", metavar="ID"),
    "bad_words": _sampling(list[str], "A token that must not appear. May be repeated.", "--bad-word", metavar="TEXT"),
    "ignore_eos": _sampling(bool, "Do not end at the model's end of sequence."),
    "logprobs": _sampling(int, "0: of the chosen tokens; n: of the n likeliest too."),
    "include_stop": _sampling(bool, "Keep what ended the output in its text."),
    "skip_special_tokens": _sampling(bool, "Leave control tokens out of the text, the default."),
    "parse": _sampling(list[str], "Parse this out of the text: tools, reasoning. May be repeated.", metavar="WHAT"),
    "json_schema": _sampling(str, "The output follows this schema: JSON, or @ and a file.", metavar="JSON|@FILE"),
    "regex": _sampling(str, "The whole output matches this expression."),
    "ebnf": _sampling(str, "The output follows this grammar, or @ and a file.", metavar="TEXT|@FILE"),
    "structural_tag": _sampling(str, "The output follows these structural tags, or @ and a file.", metavar="JSON|@FILE"),
}
"""Options by parameter name; the last four are its response_format."""
FORMATS = ("json_schema", "regex", "ebnf", "structural_tag")

File = Annotated[
    Path | None,
    typer.Option(help="JSON lines: strings, or objects with text, token_ids or messages, and any parameters. - is stdin."),
]
Output = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Write one JSON line per prompt of --file to this file, and a summary. If the file exists, continue it.",
        show_default=False,
        dir_okay=False,
    ),
]
RequireGrade = Annotated[str | None, typer.Option(metavar="exact|serial|best-effort", help="Fail below this grade.")]
RESPONSE_BYTES_OPTION = "--max-response-bytes"
MaxResponseBytes = Annotated[int, typer.Option(min=1, max=2**31 - 1, help="Largest response to a request.")]


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """The options of a run."""

    prompts: Callable[[], Iterator[Prompt]]
    """Reads the file again at each call."""
    common: generation_pb2.GenerateRequest
    """A request without its prompts."""
    batch: int
    concurrency: int
    progress: bool | None
    max_response_bytes: int

    async def batch_size(self, client: Client, timeout: float | None) -> int:
        """`batch`, or the model's limit."""
        return min(self.batch, (await client.model(timeout=timeout)).limits.batch_items_max or self.batch)


Tools = Annotated[str | None, typer.Option(help="A JSON list of tools, for chats; or @ and a file.", metavar="JSON|@FILE")]
TemplateKwargs = Annotated[
    str | None, typer.Option(help="A JSON object of arguments of the chat template.", metavar="JSON|@FILE")
]


def chat_arguments(tools: str | None, template_kwargs: str | None) -> dict[str, str]:
    """Those of the two options that are given, as `requests.chat` takes them."""
    given = {"tools": tools, "template_kwargs": template_kwargs}
    return {name: _text_or_file(option(name), value) for name, value in given.items() if value}


def generate(
    session: Session,
    texts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="Prompts; - reads stdin, one per line.")] = None,
    file: File = None,
    output: Output = None,
    messages: Annotated[
        str | None, typer.Option(help="A chat as one prompt: a JSON list of messages, or @ and a file.", metavar="JSON|@FILE")
    ] = None,
    tools: Tools = None,
    template_kwargs: TemplateKwargs = None,
    n: Annotated[int, typer.Option("-n", min=1, max=COPIES_MAX, help="Copies of each prompt; --seed is the same for all.")] = 1,
    chat: Annotated[bool, typer.Option("--chat", help="A text is a user's message, not a text to continue.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Prompts in a request, at most the model's limit.")] = 32,
    concurrency: Annotated[
        int, typer.Option(min=1, max=CONCURRENCY_MAX, help="Requests at once. With 1, sequences ascend with the prompts.")
    ] = 1,
    key: Key = None,
    request_id: Annotated[str, typer.Option(help="Label for logs and traces.", show_default=False)] = "",
    require_grade: RequireGrade = None,
    verify: Annotated[bool, typer.Option("--verify", help="Generate each output twice; fail if two differ.")] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Show the tokens of one prompt as they come.")] = False,
    progress: Annotated[bool | None, typer.Option(help="Progress on stderr. Default: if it is a terminal.")] = None,
    max_response_bytes: MaxResponseBytes = DEFAULT_RESPONSE_BYTES,
    **sampling: Annotated[Any, SAMPLING],
) -> Coroutine[Any, Any, int]:
    """Generates an output for each prompt.

    Prints a table, or with --json one line per result.
    Without --seed every item gets its own seed, which is shown and gives the same output when it is given again.
    With --key, the same command again returns the recorded outputs; the second of several requests has KEY/2, and so on.
    With --output, --file may have any length, and the same command continues after an interruption.
    """
    with options():
        parameters = sampling_of(sampling)
        common = requests.batch(types_pb2.Item(), key or "", request_id, require_grade, parameters, verify=verify)
    arguments = chat_arguments(tools, template_kwargs)
    if arguments and not (chat or file or messages is not None):
        raise wrong(f"{', '.join(map(option, arguments))}: for chats: add --chat, or give --messages or --file")
    prompts = partial(_prompts, texts or [], messages, file, n, chat, arguments)
    given = GenerateOptions(prompts, common, batch, concurrency, progress, max_response_bytes)
    if output is not None:
        if file is None or str(file) == STDIN or texts or stream:
            raise typer.BadParameter("--output: takes the prompts of --file, which is read twice, and no others")
        return _bulk(session, given, file, output)
    listed = list(prompts())
    if not listed:
        raise _no_prompt(file)
    if stream:
        if len(listed) > 1:
            raise wrong(f"--stream: shows one prompt, not {len(listed)}")
        common.items[0].CopyFrom(listed[0].item)
        return _stream(session, common, listed[0].place, max_response_bytes)
    return _print_table(session, listed, given)


def _no_prompt(file: Path | None) -> typer.BadParameter:
    return wrong(NO_PROMPT if file is None else f"--file: {file} has no prompt")


def sampling_of(given: Mapping[str, Any]) -> requests.Sampling:
    """From the options of SAMPLING."""
    made: dict[str, Any] = {name: value or None if isinstance(value, list) else value for name, value in given.items()}
    formats = {name: value for name in FORMATS if (value := made.pop(name)) is not None}
    if len(formats) > 1:
        raise wrong(f"{', '.join(map(option, formats))}: give one of them")
    for name, value in formats.items():
        made["response_format"] = {name: value if name == "regex" else _text_or_file(option(name), value)}
    return cast(requests.Sampling, made)


def _text_or_file(option: str, given: str) -> str:
    """The text, or after @ that of a file."""
    with usage(option):
        return Path(given[1:]).read_text("utf-8") if given.startswith("@") else given


async def _print_table(session: Session, prompts: Sequence[Prompt], options: GenerateOptions) -> int:
    """Prints the results in the prompts' order. FAILED if an item has no output, or a verification failed."""
    results: list[types_pb2.Result] = []
    key = options.common.idempotency_key
    async with session.client(options.max_response_bytes) as client:
        size = await options.batch_size(client, session.timeout) if len(prompts) > 1 else 1
        source = batches(prompts, options.common, size, lambda number, _: f"{key}/{number}" if key and number > 1 else key)
        answered = answers(client, session.timeout, source, options.concurrency)
        # One request has no progress between its beginning and its end.
        bar = False if len(prompts) <= size and options.progress is None else options.progress
        try:
            with show.progress("generate", len(prompts), bar) as done:
                async with aclosing(answered):
                    async for _, response in answered:
                        results.extend(response.results)
                        done(len(results))
                        if session.json:
                            for result in response.results:
                                show.as_json(result)
        finally:
            if results and not session.json:
                show.table(show.RESULT_COLUMNS, map(show.result, results))
                if options.common.verify:
                    show.note(f"verified: {show.verdicts(results)}")
    complete = all(result.HasField("output") for result in results)
    return FAILED if not complete or any(each.comparison.verdict == types_pb2.VERDICT_DIVERGED for each in results) else 0


# Prompts.
@dataclass(frozen=True, slots=True)
class Prompt:
    item: types_pb2.Item
    place: str
    """Such as `questions.jsonl:7`, for error messages."""


def _prompts(
    texts: Sequence[str], messages: str | None, file: Path | None, n: int, chat: bool, arguments: Mapping[str, str]
) -> Iterator[Prompt]:
    """The prompts of all sources, each `n` times. `chat`: a text is a chat of one message. `arguments`: of each chat that has
    none of its own; as of `chat_arguments`."""
    for prompt in _given(texts, messages, file):
        item = prompt.item
        if chat and item.HasField("text"):
            item.chat.CopyFrom(requests.chat([{"role": "user", "content": item.text}]))
            item.ClearField("text")
        if item.HasField("chat"):
            for name, value in arguments.items():
                if not getattr(item.chat, name):
                    setattr(item.chat, name, value)
        yield from repeat(prompt, n)


def _given(texts: Sequence[str], messages: str | None, file: Path | None) -> Iterator[Prompt]:
    """A text is a prompt; `-` is one per line of stdin, as of the file without blank lines."""
    for number, argument in enumerate(texts, 1):
        for place, text in _lines(STDIN) if argument == STDIN else [(f"prompt {number}", argument)]:
            with usage(place):
                yield Prompt(requests.item(text, "text"), place)
    if messages is not None:
        with usage("--messages"):
            given = documents.loads(_text_or_file("--messages", messages))
            yield Prompt(types_pb2.Item(chat=requests.chat(given)), "--messages")
    for place, line in _lines(file) if file is not None else ():
        with usage(place):
            yield Prompt(_item(documents.loads(line)), place)


def _lines(path: Path | str) -> Iterator[tuple[str, str]]:
    """Place and text of each line that is not blank. The file is read line by line and may have any length."""
    stdin = str(path) == STDIN
    with usage(), nullcontext(sys.stdin.buffer) if stdin else Path(path).open("rb") as file:
        number = 0
        while line := file.readline(LINE_BYTES_MAX + 1):
            number += 1
            line = line if number > 1 else line.removeprefix(codecs.BOM_UTF8)
            place = f"{'stdin' if stdin else path}:{number}"
            if len(line) > LINE_BYTES_MAX:
                raise wrong(f"{place}: longer than {LINE_BYTES_MAX} bytes")
            if line.strip():
                with usage(place):
                    text = line.removesuffix(b"\n").removesuffix(b"\r").decode()
                yield place, text


PROMPTS = ("text", "token_ids", "messages")
BESIDE_MESSAGES = ("tools", "template_kwargs", "add_generation_prompt", "continue_final_message", "allow_control_tokens")


def _item(given: object) -> types_pb2.Item:
    """A JSON string, or an object with one prompt and any parameters. Raises TypeError or ValueError."""
    if isinstance(given, str):
        given = {"text": given}
    if not isinstance(given, dict):
        raise TypeError("must be a JSON string or object")
    kinds = [name for name in PROMPTS if name in given]
    if len(kinds) != 1:
        raise ValueError(f"{', '.join(kinds or PROMPTS)}: exactly one of them")
    prompt = given.pop(kinds[0])
    match kinds[0]:
        case "text":
            item = types_pb2.Item(text=requests.text("text", prompt))
            if not item.text:
                raise ValueError("text: empty")
        case "token_ids":
            item = types_pb2.Item(token_ids=requests.token_ids(prompt))
        case _:
            item = types_pb2.Item(
                chat=requests.chat(prompt, **{name: given.pop(name) for name in BESIDE_MESSAGES if name in given})
            )
    if isinstance(given.get("seed"), str) and given["seed"].isdecimal():
        given["seed"] = int(given["seed"])  # as protobuf's JSON writes it
    if parameters := requests.parameters(given):
        item.parameters.CopyFrom(parameters)
    return item


# Batches.
class Batch(NamedTuple):
    """Some of the prompts, and their request. Numbers begin at 1."""

    number: int
    prompts: Sequence[Prompt]
    request: generation_pb2.GenerateRequest


def batches(
    prompts: Iterable[Prompt],
    common: generation_pb2.GenerateRequest,
    size: int,
    key: Callable[[int, generation_pb2.GenerateRequest], str],
) -> Iterator[Batch]:
    """Takes `size` prompts at a time. `key` makes the idempotency key of a batch from its number and its request."""
    source = iter(prompts)
    for number in count(1):
        part = list(islice(source, size))
        if not part:
            return
        request = generation_pb2.GenerateRequest()
        request.CopyFrom(common)
        del request.items[:]
        request.items.extend(each.item for each in part)
        request.idempotency_key = key(number, request)
        yield Batch(number, part, request)


Answer = generation_pb2.GenerateResponse | errors.OstinatoError


async def answers(
    client: Client, timeout: float | None, source: Iterable[Batch], concurrency: int
) -> AsyncGenerator[tuple[Batch, generation_pb2.GenerateResponse], None]:
    """The responses in the batches' order. After a failure no batch starts; those that run are waited for, then the first
    failure is raised."""
    waiting = iter(source)
    running: deque[tuple[Batch, asyncio.Task[Answer]]] = deque()
    failure: errors.OstinatoError | None = None
    try:
        while True:
            if failure is None:
                for each in islice(waiting, concurrency - len(running)):
                    running.append((each, asyncio.create_task(_send(client, timeout, each))))
            if not running:
                break
            batch, task = running[0]
            answer = await task
            running.popleft()
            if isinstance(answer, errors.OstinatoError):
                failure = failure or answer
            else:
                yield batch, answer
    finally:
        for _, task in running:
            task.cancel()
    if failure is not None:
        raise failure


async def _send(client: Client, timeout: float | None, batch: Batch) -> Answer:
    try:
        with placed(*(prompt.place for prompt in batch.prompts), response_bytes=RESPONSE_BYTES_OPTION):
            return await client.generate(batch.request, timeout=timeout)
    except errors.OstinatoError as error:
        return error


@contextmanager
def placed(*places: str, response_bytes: str = "") -> Iterator[None]:
    """Bad fields of items have the places of their prompts: `items[3].parameters.top_p` is `questions.jsonl:7:
    parameters.top_p`. `response_bytes`: the option to name instead of the call's metadata, if there is one."""
    metadata = f"metadata {requests.RESPONSE_BYTES_METADATA}"

    def named(violation: errors.Violation) -> errors.Violation:
        field = violation.field
        found = re.fullmatch(r"items\[(\d+)\]\.?(.*)", field)
        if found is not None and int(found[1]) < len(places):
            field = ": ".join(filter(None, (places[int(found[1])], found[2])))
        return errors.Violation(field, violation.description.replace(metadata, response_bytes or metadata))

    try:
        yield
    except errors.InvalidRequest as error:
        raise errors.InvalidRequest(error.message, violations=map(named, error.violations)) from None


# --stream: the text on stdout as it comes, everything else on stderr.
async def _stream(session: Session, request: generation_pb2.GenerateRequest, place: str, max_response_bytes: int) -> int:
    """FAILED if the item has no output."""
    code = FAILED
    async with (
        session.client(max_response_bytes) as client,
        aclosing(client.stream(request, timeout=session.timeout)) as events,
    ):
        with placed(place, response_bytes=RESPONSE_BYTES_OPTION), closing(Screen()) as screen:
            async for event in events:
                if event.HasField("finished"):
                    code = 0
                session.print(event, partial(screen.take, event))
    return code


class Screen:
    """The text that has been shown."""

    def __init__(self) -> None:
        self._shown = ""

    def take(self, event: generation_pb2.GenerateEvent) -> None:
        match event.WhichOneof("event"):
            case "tokens":
                for run in event.tokens.runs:
                    self._write(run.text)
            case "restarted":
                self.close()
                show.note(f"restarted: attempt {event.restarted.attempt} has other tokens; discard what came before")
            case "finished":
                # Text that could begin a stop string was held back until now.
                self._write(event.finished.output.text.removeprefix(self._shown))
                self.close()
                show.note(_summary(event.finished))
                if event.finished.HasField("comparison"):
                    show.note(f"verified: {show.verdicts([event.finished])}")
            case "failed":
                self.close()
                show.note(_summary(event.failed))

    def close(self) -> None:
        """Ends an unfinished line."""
        if self._shown and not self._shown.endswith("\n"):
            show.line("")
        self._shown = ""

    def _write(self, text: str) -> None:
        self._shown += text
        if sys.stdout.isatty():
            text = show.safe(text)
        print(text, end="", flush=True)


def _summary(result: types_pb2.Result) -> str:
    cells = zip(show.RESULT_COLUMNS, show.result(result), strict=True)
    return ", ".join(f"{name} {cell}" for name, cell in cells if cell and (name != "text" or result.HasField("status")))


# --output: a file of prompts of any length. Only the running batches are in memory.
#
# Each batch has a key, `RUN/FIRST-LAST/DIGEST`: the name of the run (--key, or the name of the prompts' file), the numbers of
# its prompts from 1, and the first half of the request's digest. Results that are in the output file are not requested again;
# those that the sidecar has or is working on are found by their key. So nothing is generated twice while it keeps its keys.
def _bulk(session: Session, options: GenerateOptions, file: Path, output: Path) -> Coroutine[Any, Any, int]:
    """Reads every line first, so that a bad one is reported before anything is sent."""
    if not options.common.idempotency_key:
        options.common.idempotency_key = file.name.encode()[:RUN_NAME_BYTES_MAX].decode(errors="ignore")
    total = sum(1 for _ in options.prompts())
    if not total:
        raise _no_prompt(file)
    return _write_output(session, options, total, output)


async def _write_output(session: Session, options: GenerateOptions, total: int, path: Path) -> int:
    """FAILED if a prompt has no output, or a verification failed."""

    def note_interrupted() -> None:
        show.note(f"interrupted: {output.lines} of {total} results are in {path}; the same command continues")

    with closing(OutputFile(path)) as output:
        try:
            async with session.client(options.max_response_bytes) as client:
                with show.progress("generate", total, options.progress) as done:
                    await _run(client, session, options, output, done)
        except OSError as error:
            show.note(f"error: {path}: {error.strerror}")
        except (asyncio.CancelledError, errors.OstinatoError):
            note_interrupted()
            raise
        if output.lines < total:
            note_interrupted()
            return FAILED
        summary = output.summary()
    told = [(name.replace("_", " "), show.counts(n) if isinstance(n, dict) else n) for name, n in summary.items()]
    session.print(summary, lambda: show.card(told))
    failed = summary["outcomes"].get("completed") != total or "diverged" in summary.get("verified", {})
    return FAILED if failed else 0


async def _run(
    client: Client, session: Session, options: GenerateOptions, output: OutputFile, done: Callable[[int], None]
) -> None:
    size = await options.batch_size(client, session.timeout)

    def key(number: int, request: generation_pb2.GenerateRequest) -> str:
        first = (number - 1) * size + 1
        request_digest = digest.request_digest(request).hex()[:32]
        return f"{options.common.idempotency_key}/{first}-{first + len(request.items) - 1}/{request_digest}"

    source = batches(options.prompts(), options.common, size, key)
    for first in source:
        if not output.has(first):
            break
        done(output.lines)
        await asyncio.sleep(0)  # lets an interrupt through
    else:
        output.expect_end()
        return
    written = first.number - 1
    async with aclosing(answers(client, session.timeout, chain([first], source), options.concurrency)) as answered:
        async for batch, response in answered:
            if batch.number == written + 1:  # otherwise an earlier batch failed; the journal keeps this one
                output.write(batch, response.results)
                written += 1
                done(output.lines)


class OutputFile:
    """The file of --output, locked by one run. It has one line per prompt, in their order, and whole batches.

    A line is a Result in protobuf's JSON, after the prompt's `line` and the `key` of its batch. The key identifies the request,
    so a later run knows whether the file answers its prompts. Ask with `has` for each batch until one is not there; from there
    on `write`.
    """

    _BEGINNING = b'{"line": '

    def __init__(self, path: Path) -> None:
        """Raises BadParameter if the path is not a file, or another run has it."""
        self._path = path
        self.lines = 0
        """Results that were found or written."""
        self.kept = 0
        """Of them those of an earlier run."""
        with usage("--output"):
            if path.exists() and not path.is_file():
                raise ValueError(f"{path} is not a file: it is read, to continue it")
            self._file = path.open("r+b" if path.exists() else "x+b")
        lock(self._file, f"--output: another run writes to {path}")

    def close(self) -> None:
        with suppress(OSError):  # a full disk, which has been reported
            self._file.close()

    def has(self, batch: Batch) -> bool:
        """Whether the next lines are this batch's results. Of an incomplete batch they are cut off. Raises BadParameter if they
        are of something else."""
        start = self._file.tell()
        for prompt in batch.prompts:
            line = self._file.readline()
            if not line.endswith(b"\n"):
                if not (line.startswith(self._BEGINNING) or self._BEGINNING.startswith(line)):
                    raise self._mismatch(prompt)  # not a line of ours that was cut short
                self._file.seek(start)
                self._file.truncate()
                return False
            try:
                key = json.loads(line)["key"]
            except (ValueError, TypeError, LookupError):
                key = None
            if key != batch.request.idempotency_key:
                raise self._mismatch(prompt)
        self.kept = self.lines = self.lines + len(batch.prompts)
        return True

    def write(self, batch: Batch, results: Sequence[types_pb2.Result]) -> None:
        """Raises OSError."""
        if len(results) != len(batch.prompts):
            raise errors.Internal(f"{len(results)} results for {len(batch.prompts)} prompts")
        for prompt, result in zip(batch.prompts, results, strict=True):
            place = {"line": int(prompt.place.rpartition(":")[2]), "key": batch.request.idempotency_key}
            self._file.write(f"{json.dumps(place | show.as_dict(result))}\n".encode())
        self._file.flush()
        self.lines += len(results)

    def expect_end(self) -> None:
        """Raises BadParameter if the file has more lines than there are prompts."""
        if self._file.read(1):
            raise wrong(f"--output: {self._path} has more than the {self.lines} results of these prompts")

    def summary(self) -> dict[str, Any]:
        """Of all results in the file. Raises BadParameter for a line that was edited."""
        outcomes, verdicts, tokens = Counter[str](), Counter[str](), Counter[str]()
        first = last = 0
        self._file.seek(0)
        for number, line in enumerate(self._file, 1):
            try:
                answer = json.loads(line)
                output, status = answer.get("output", {}), answer.get("status", {})
                reasons = [each["reason"] for each in status.get("details", ()) if "reason" in each]
                outcomes["completed" if "output" in answer else (reasons or [f"code {status.get('code')}"])[0]] += 1
                if "comparison" in answer:
                    verdict = answer["comparison"].get("verdict", "not compared")
                    verdicts[verdict.removeprefix("VERDICT_").lower()] += 1
                tokens.update(prompt_tokens=output.get("prompt_tokens", 0), tokens=len(output.get("token_ids", ())))
                sequence = int(answer["sequence"])
                first, last = min(first or sequence, sequence), max(last, sequence)
            except (ValueError, TypeError, LookupError, AttributeError):
                raise wrong(f"--output: {self._path}:{number}: is not a result") from None
        made = {"items": self.lines, "outcomes": dict(outcomes), "kept": self.kept, "sequences": f"{first}..{last}", **tokens}
        return made | ({"verified": dict(verdicts)} if verdicts else {})

    def _mismatch(self, prompt: Prompt) -> typer.BadParameter:
        return wrong(
            f"--output: what {self._path} has for {prompt.place} is of another prompt, parameter, --key, --batch or model's"
            " limit; or it is another kind of file"
        )
