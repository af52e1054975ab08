"""The options that many commands or long signatures share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from ostinato import requests
from ostinato.cli.session import usage
from ostinato.v1 import generation_pb2


def _sampling(*names: str, text: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=text, metavar=metavar, rich_help_panel="Sampling", show_default=False)


Seed = Annotated[int | None, _sampling("--seed", text="Any uint64; the same for all prompts. Default: one derived for each.")]
Temperature = Annotated[float | None, _sampling("--temperature", text="0 to 100; 0 is greedy. Default 1.")]
TopK = Annotated[int | None, _sampling("--top-k", text="Sample from so many likeliest tokens; 0 is off, the default.")]
TopP = Annotated[float | None, _sampling("--top-p", text="Sample from this mass of likeliest tokens; 1 is off, the default.")]
MinP = Annotated[float | None, _sampling("--min-p", text="Least probability relative to the likeliest; 0 is off, the default.")]
RepetitionPenalty = Annotated[float | None, _sampling("--repetition-penalty", text="Above 0 to 10; 1 is off, the default.")]
MaxNewTokens = Annotated[int | None, _sampling("--max-new-tokens", text="Default 128, or what the context leaves.")]
MinNewTokens = Annotated[int | None, _sampling("--min-new-tokens", text="No end before so many tokens. Default 0.")]
Stop = Annotated[list[str] | None, _sampling("--stop", text="End before this string. May be repeated.", metavar="TEXT")]
StopTokenIds = Annotated[
    list[int] | None, _sampling("--stop-token-id", text="End with this token. May be repeated.", metavar="ID")
]
BadWords = Annotated[
    list[str] | None, _sampling("--bad-word", text="A token that must not appear. May be repeated.", metavar="TEXT")
]
IgnoreEos = Annotated[bool | None, _sampling("--ignore-eos/--no-ignore-eos", text="Go on behind the model's end of sequence.")]
Logprobs = Annotated[int | None, _sampling("--logprobs", text="0: of the chosen tokens; n: of the n likeliest too.")]
JsonSchema = Annotated[
    str | None, _sampling("--json-schema", text="The answer obeys this schema: JSON, or @ and a file.", metavar="JSON|@FILE")
]
Regex = Annotated[str | None, _sampling("--regex", text="The whole answer matches this expression.")]

File = Annotated[
    Path | None,
    typer.Option(help="JSON lines: strings, or objects with text, token_ids or messages, and any parameters. - is stdin."),
]
RequireGrade = Annotated[
    str | None, typer.Option(metavar="exact|serial|best-effort", help="Refuse to answer below this grade.")
]
MaxResponseBytes = Annotated[int, typer.Option(min=1, max=2**31 - 1, help="Largest answer to a request.")]
Output = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Write a JSON line for each prompt of --file in here, and sum up; go on if it exists.",
        show_default=False,
        dir_okay=False,
    ),
]
Key = Annotated[str, typer.Option("--key", help="Idempotency key.", show_default=False)]


def response_format(json_schema: str | None, regex: str | None) -> dict[str, object] | None:
    """The parameter of that name."""
    if json_schema is not None and regex is not None:
        raise typer.BadParameter("--json-schema, --regex: give one of them")
    if json_schema is not None and json_schema.startswith("@"):
        try:
            json_schema = Path(json_schema[1:]).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise typer.BadParameter(f"--json-schema: {error}") from None
    if json_schema is not None:
        return {"json_schema": json_schema}
    return None if regex is None else {"regex": regex}


def open_span(text: str) -> generation_pb2.SequenceRange:
    """As `span`, but `A..` goes on to the newest, and `..B` begins at 1."""
    if text.startswith(".."):
        text = f"1{text}"
    return span(f"{text}{2**64 - 1}" if text.endswith("..") else text)


def span(text: str) -> generation_pb2.SequenceRange:
    """`A..B`, both included, or `A` alone."""
    found = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", text, re.ASCII)
    if found is None:
        raise typer.BadParameter(f"{text}: must be a sequence or a range of them, such as 3..17")
    first, last = found.groups()
    with usage(text):
        return requests.span(int(first), None if last is None else int(last))
