"""What the commands share: options, the session that they describe, how a command is registered, and its exit code.

--target, --json and --timeout may stand before or after the command's name.
"""

from __future__ import annotations

import asyncio
import fcntl
import functools
import inspect
import os
import re
import signal
import sys
from collections.abc import Callable, Coroutine, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from json import JSONDecodeError
from pathlib import Path
from typing import IO, Annotated, Any, TypeAlias

import grpc
import typer
from google.protobuf.message import Message

from ostinato import __version__, errors, requests, tracing
from ostinato.cli import show
from ostinato.client import DEFAULT_RESPONSE_BYTES, DEFAULT_TARGET, Client, bearer, tls

STDIN = "-"

FAILED, USAGE, UNJUDGED, INTERRUPTED, BROKEN_PIPE = 1, 2, 3, 130, 141
"""Exit codes. The last two are those of a shell for SIGINT and SIGPIPE."""


@dataclass(frozen=True, slots=True)
class Session:
    """The options of a call that all commands have."""

    target: str = DEFAULT_TARGET
    target_option: str = "--target"
    json: bool = False
    timeout: float | None = None
    credentials: grpc.ChannelCredentials | None = None
    token: str | None = field(default=None, repr=False)
    allow_plaintext_token: bool = False

    def against(self, target: str) -> Session:
        """For another sidecar, which --against names."""
        return replace(self, target=target, target_option="--against")

    def client(self, max_response_bytes: int = DEFAULT_RESPONSE_BYTES) -> Client:
        with options(target=self.target_option, token="token"):  # noqa: S106  # an argument of which no option has the name
            return Client(
                self.target,
                credentials=self.credentials,
                token=self.token,
                allow_plaintext_token=self.allow_plaintext_token,
                max_response_bytes=max_response_bytes,
            )

    def print(self, answer: Message | Mapping[str, Any], in_words: Callable[[], object]) -> None:
        """Prints an answer with --json as one line of JSON, else as `in_words` prints it."""
        if self.json:
            show.as_json(answer)
        else:
            in_words()


_TARGET = ("--target", "-t")
_TARGET_HELP = f"Sidecar: host:port, https://host:port or unix:/path. Default: OSTINATO_TARGET, or {DEFAULT_TARGET}."

Target = Annotated[str | None, typer.Option(*_TARGET, help=_TARGET_HELP)]
TargetOrEnvironment = Annotated[
    str | None, typer.Option(*_TARGET, envvar="OSTINATO_TARGET", show_envvar=False, help=_TARGET_HELP)
]
"""The option before the command's name. The one after it does not read the environment, which would override the first."""

Json = Annotated[bool | None, typer.Option("--json", help="One JSON object per line.")]
Timeout = Annotated[float | None, typer.Option(help="Deadline of each call in seconds. Default: none.")]


def _credential(variable: str, text: str) -> Any:
    return typer.Option(envvar=variable, help=text, metavar="FILE", rich_help_panel="Credentials")


TokenFile = Annotated[Path | None, _credential("OSTINATO_TOKEN_FILE", "Holds the token, which may also be in OSTINATO_TOKEN.")]
PlaintextToken = Annotated[
    bool,
    typer.Option(
        "--allow-plaintext-token",
        envvar="OSTINATO_ALLOW_PLAINTEXT_TOKEN",
        help="Send the token without TLS beyond loopback, where it can be read.",
        rich_help_panel="Credentials",
    ),
]
TlsCa = Annotated[Path | None, _credential("OSTINATO_TLS_CA", "PEM: the authorities to trust. Turns TLS on.")]
TlsCertificate = Annotated[Path | None, _credential("OSTINATO_TLS_CERTIFICATE", "PEM: the client's certificate, if required.")]
TlsKey = Annotated[Path | None, _credential("OSTINATO_TLS_KEY", "PEM: the certificate's private key.")]
Traces = Annotated[str, typer.Option(envvar="OSTINATO_TRACES", help="Export spans to otlp:http://host:4318.", metavar="TARGET")]

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich" if sys.stderr.isatty() else None,  # no boxes in a log
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        show.line(f"ostinato {__version__}")
        raise typer.Exit


@app.callback()
def common(
    context: typer.Context,
    target: TargetOrEnvironment = None,
    json: Json = None,
    timeout: Timeout = None,
    token_file: TokenFile = None,
    allow_plaintext_token: PlaintextToken = False,
    tls_ca: TlsCa = None,
    tls_certificate: TlsCertificate = None,
    tls_key: TlsKey = None,
    traces: Traces = "",
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print name and version.")
    ] = False,
) -> None:
    """Reproducible text generation: serve, generate, read the journal, replay it, verify the receipts."""
    try:
        secured = any((tls_ca, tls_certificate, tls_key))
        credentials = tls(tls_ca, certificate=tls_certificate, key=tls_key) if secured else None
    except ValueError as error:
        raise wrong(f"--tls-{error}") from None  # it begins with the argument's name
    session = Session(credentials=credentials, token=_token(token_file), allow_plaintext_token=allow_plaintext_token)
    if traces:
        with usage():
            tracing.start(traces, "ostinato.cli", "", os.environ)
    context.obj = _with(session, target, json, timeout)


Code: TypeAlias = int | None
"""An exit code; None is 0."""


def command(function: Callable[..., Code | Coroutine[Any, Any, Code]]) -> None:
    """Registers a command. The function's first parameter is the session, the others are the command's own options; a `**`
    parameter's annotation holds a mapping of options.

    The function returns the exit code, or a coroutine of it. What it does before it returns a coroutine runs without an event
    loop, and may block.
    """

    @functools.wraps(function)
    def run(context: typer.Context, target: Any, json: Any, timeout: Any, **own: Any) -> None:
        session = _with(context.obj, target, json, timeout)
        raise typer.Exit(_run(lambda: function(session, **own), own.get("against")))

    signature = inspect.signature(function, eval_str=True)
    _, *listed = signature.parameters.values()
    own = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in listed if each.kind is not each.VAR_KEYWORD]
    mappings = [each.annotation.__metadata__[0] for each in listed if each.kind is each.VAR_KEYWORD]
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    optional = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for kinds in (*mappings, {"target": Target, "json": Json, "timeout": Timeout})
        for name, kind in kinds.items()
    ]
    parameters = [context, *own, *optional]
    run.__signature__ = signature.replace(parameters=parameters, return_annotation=None)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    app.command(function.__name__)(run)


def _run(begin: Callable[[], Code | Coroutine[Any, Any, Code]], against: str | None) -> int:
    """Runs a command and returns its exit code. `against`: the target of its option --against."""
    try:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as `main` left it
            signal.signal(signal.SIGINT, signal.default_int_handler)
        begun = begin()
        code = asyncio.run(begun) if isinstance(begun, Coroutine) else begun
        return code or 0
    except errors.OstinatoError as error:
        if isinstance(error, errors.Disconnected) and error.target == against:
            show.failure(error, "--against")
        else:
            show.failure(error)
        return USAGE if isinstance(error, errors.InvalidRequest) else FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _discard_stdout()
        return BROKEN_PIPE
    except OSError as error:
        show.note(f"error: {_why(error)}")
        _discard_stdout()
        return FAILED
    finally:
        tracing.stop()


def _discard_stdout() -> None:
    """What is still buffered must not fail again when the interpreter flushes it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def wrong(text: str) -> typer.BadParameter:
    """Wrong usage. The text may have names of fields and files in it."""
    return typer.BadParameter(show.visible(text))


@contextmanager
def usage(where: str = "") -> Generator[None, None, None]:
    """Reports as wrong usage what makes a file unreadable or a request impossible. `where`: the option, or the place in a file.
    Only around code that reads a file or builds a request."""
    try:
        yield
    except (ImportError, OSError, RecursionError, TypeError, ValueError) as error:
        raise wrong(f"{where}: {_why(error)}" if where else _why(error)) from None


_ARGUMENT = re.compile(r"\A(?:response_format\.)?(\w+)(?:\[\d+\])?(?=: )")
_OPTIONS = {"required_grade": "--require-grade", "stop_token_ids": "--stop-token-id", "bad_words": "--bad-word"}
"""Of the arguments whose option has another name."""


def option(argument: str) -> str:
    return _OPTIONS.get(argument, f"--{argument.replace('_', '-')}")


@contextmanager
def options(**others: str) -> Generator[None, None, None]:
    """As `usage`, around code that checks options: an argument's name, with which its errors begin, becomes its option's, or
    what `others` has for it."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise wrong(_ARGUMENT.sub(lambda found: others.get(found[1], option(found[1])), str(error), count=1)) from None


def _why(error: Exception) -> str:
    match error:
        case RecursionError():
            return "is nested too deeply"
        case UnicodeDecodeError():
            return f"is not {error.encoding.upper()}: {error.reason} at byte {error.start}"
        case JSONDecodeError():
            return f"is not JSON: {error}"
        case OSError() if error.strerror:
            return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def lock(file: IO[bytes], why: str) -> None:
    """For this process alone, until the file is closed. Another process that has it is wrong usage."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise wrong(why) from None


def _token(file: Path | None) -> str | None:
    if file is None:
        source, token = "OSTINATO_TOKEN", os.environ.get("OSTINATO_TOKEN") or None
    else:
        source = f"--token-file {file}"
        with usage("--token-file"):
            token = file.read_text("ascii").strip()
    if token is not None:
        with usage(source):
            bearer(token)
    return token


def _with(session: Session, target: str | None, json: bool | None, timeout: float | None) -> Session:
    with options():
        requests.seconds(timeout)
        if target is not None:
            requests.target(target)
    given = {"target": target, "json": json, "timeout": timeout}
    return replace(session, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


# Options of more than one command.
def _not_empty(key: str | None) -> str | None:
    """An empty key, such as from an unset variable, would be no key."""
    if key == "":
        raise typer.BadParameter("is empty")
    return key


Key = Annotated[str | None, typer.Option("--key", help="The batch's idempotency key.", show_default=False, callback=_not_empty)]


def open_span(text: str) -> tuple[int, int]:
    """As `span`; also `A..`, up to the newest, and `..B`, from 1."""
    if text.startswith(".."):
        text = f"1{text}"
    return span(f"{text}{2**64 - 1}" if text.endswith("..") else text)


def span(text: str) -> tuple[int, int]:
    """`A..B`, both included, or `A` alone."""
    found = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", text, re.ASCII)
    if found is None:
        raise wrong(f"{text!r} is not a sequence or a range of sequences, such as 3..17")
    first, last = found.groups()
    with usage(text):
        made = requests.span(int(first), None if last is None else int(last))
    return made.first, made.last
