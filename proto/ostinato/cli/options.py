"""The options that many commands or long signatures share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from ostinato import requests
from ostinato.cli.session import usage
from ostinato.v1 import generation_pb2


def _sampling(kind: Any, text: str, *names: str, metavar: str | None = None) -> Any:
    option = typer.Option(*names, help=text, metavar=metavar, rich_help_panel="Sampling", show_default=False)
    return Annotated[kind | None, option]


SAMPLING: Mapping[str, Any] = {
    "seed": _sampling(int, "Any uint64; the same for all prompts. Default: one derived for each."),
    "temperature": _sampling(float, "0 to 100; 0 is greedy. Default 1."),
    "top_k": _sampling(int, "Sample from so many likeliest tokens; 0 is off, the default."),
    "top_p": _sampling(float, "Sample from this mass of likeliest tokens; 1 is off, the default."),
    "min_p": _sampling(float, "Least probability relative to the likeliest; 0 is off, the default."),
    "repetition_penalty": _sampling(float, "Above 0 to 10; 1 is off, the default."),
    "max_new_tokens": _sampling(int, "Default 128, or what the context leaves."),
    "min_new_tokens": _sampling(int, "No end before so many tokens. Default 0."),
    "stop": _sampling(list[str], "End before this string. May be repeated.", metavar="TEXT"),
    "stop_token_ids": _sampling(list[int], "End with this token. May be repeated.", "--stop-token-id", metavar="ID"),
    "bad_words": _sampling(list[str], "A token that must not appear. May be repeated.", "--bad-word", metavar="TEXT"),
    "ignore_eos": _sampling(bool, "Go on behind the model's end of sequence."),
    "logprobs": _sampling(int, "0: of the chosen tokens; n: of the n likeliest too."),
    "json_schema": _sampling(str, "The answer obeys this schema: JSON, or @ and a file.", metavar="JSON|@FILE"),
    "regex": _sampling(str, "The whole answer matches this expression."),
}
"""By the names of what `sampling` is given."""

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
Key = Annotated[str | None, typer.Option("--key", help="Idempotency key.", show_default=False)]


def sampling(given: Mapping[str, Any]) -> requests.Sampling:
    """The parameters that these options make."""
    made: dict[str, Any] = {name: value or None if isinstance(value, list) else value for name, value in given.items()}
    json_schema, regex = made.pop("json_schema"), made.pop("regex")
    if json_schema is not None and regex is not None:
        raise typer.BadParameter("--json-schema, --regex: give one of them")
    if json_schema is not None and json_schema.startswith("@"):
        try:
            json_schema = Path(json_schema[1:]).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise typer.BadParameter(f"--json-schema: {error}") from None
    if json_schema is not None:
        made["response_format"] = {"json_schema": json_schema}
    elif regex is not None:
        made["response_format"] = {"regex": regex}
    return cast(requests.Sampling, made)


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
