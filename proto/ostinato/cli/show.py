"""What the command prints. Answers go to stdout, everything else to stderr; only a terminal gets colours and boxes."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from ostinato import digest, enums, errors
from ostinato.v1 import sequencer_pb2, types_pb2

PAYLOADS: Mapping[types_pb2.EntryKind.ValueType, type[Message]] = {
    types_pb2.ENTRY_KIND_OPENED: sequencer_pb2.OpenedPayload,
    types_pb2.ENTRY_KIND_ADMITTED: sequencer_pb2.AdmittedPayload,
    types_pb2.ENTRY_KIND_COMPLETED: sequencer_pb2.CompletedPayload,
    types_pb2.ENTRY_KIND_FAILED: sequencer_pb2.EndedPayload,
    types_pb2.ENTRY_KIND_CANCELLED: sequencer_pb2.EndedPayload,
    types_pb2.ENTRY_KIND_ABANDONED: sequencer_pb2.EndedPayload,
    types_pb2.ENTRY_KIND_AUDITED: sequencer_pb2.AuditedPayload,
    types_pb2.ENTRY_KIND_LOST: sequencer_pb2.LostPayload,
}
"""What an entry's payload is, by kind."""

UNBOUNDED_COLUMNS = 10_000
"""Wider than any terminal."""

RESULT_COLUMNS = ("sequence", "seed", "grade", "finish", "digest", "tokens", "ms", "text")


def line(text: str) -> None:
    """To stdout, at once: a reader of a pipe waits for lines, not for blocks."""
    print(text, flush=True)


def note(text: str) -> None:
    """To stderr."""
    print(text, file=sys.stderr, flush=True)


def as_dict(message: Message) -> dict[str, Any]:
    """Protobuf's JSON, with the contract's names; 64-bit numbers are strings."""
    made: dict[str, Any] = json_format.MessageToDict(message, preserving_proto_field_name=True)
    return made


def as_json(message: Message | Mapping[str, Any]) -> None:
    """One line of JSON, in ASCII: a text may hold any kind of line separator."""
    line(json.dumps(as_dict(message) if isinstance(message, Message) else message))


def entry(given: sequencer_pb2.Entry) -> dict[str, Any]:
    """A journal entry, with what its payload says beside the payload's own bytes."""
    made = as_dict(given)
    if given.payload and given.header.kind in PAYLOADS:
        made["decoded"] = as_dict(PAYLOADS[given.header.kind].FromString(given.payload))
    return made


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Rows under a header; on a terminal too narrow for whole words a line for each cell, and a blank line between rows."""
    listed = list(rows)
    if not _is_terminal():
        _aligned([columns, *listed])
        return
    console = Console()
    made = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in listed:
        made.add_row(*map(Text, row))
    # Measured as if there were room for all: in less, rich may already report that it breaks words.
    if console.measure(made, options=console.options.update(max_width=UNBOUNDED_COLUMNS)).minimum <= console.width:
        console.print(made)
        return
    for number, row in enumerate(listed):
        if number:
            line("")
        _aligned([(name, value) for name, value in zip(columns, row, strict=True) if value])


def _is_terminal() -> bool:
    return sys.stdout.isatty()


def card(pairs: Iterable[tuple[str, object]]) -> None:
    """Names and values, one pair a line."""
    _aligned([(name, visible(str(value))) for name, value in pairs])


def _aligned(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        line("  ".join(cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)).rstrip())


@contextmanager
def progress(what: str, total: int | None, wanted: bool | None = None) -> Iterator[Callable[..., None]]:
    """A bar on stderr, by default if that is a terminal; yields what is told how many are done, and of how many if that was
    not known before."""
    if not (sys.stderr.isatty() if wanted is None else wanted):
        yield lambda done, total=None: None
        return
    console = Console(stderr=True, force_terminal=True)
    # Lines for the same terminal have to pass above the bar; lines for a pipe must not come near it.
    with Progress(console=console, transient=True, redirect_stdout=sys.stdout.isatty()) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done, total=None: bar.update(task, completed=done, total=total)


def result(given: types_pb2.Result) -> tuple[str, ...]:
    """RESULT_COLUMNS of one item."""
    if given.HasField("status"):
        error = errors.from_status(given.status)
        return (str(given.sequence), "", "", error.reason, "", "", _millis(given), visible(error.message))
    output = given.output
    return (
        str(given.sequence),
        str(output.seed),
        word(output, "grade"),
        word(output, "finish_reason"),
        short(digest.output_digest(output)),
        str(len(output.token_ids)),
        _millis(given),
        visible(output.text),
    )


def _millis(given: types_pb2.Result) -> str:
    return f"{given.timing.total_micros / 1000:.1f}"


def failure(error: errors.OstinatoError, target: str) -> None:
    """An error in a line, and what helps."""
    reason = error.reason if error.reason != errors.OstinatoError.reason else error.code.name
    if isinstance(error, errors.InvalidRequest) and error.violations:
        note(f"error: {reason}: the request has {_count(len(error.violations), 'bad field')}")
        for violation in error.violations:
            note(f"  {visible(violation.field)}: {visible(violation.description)}")
    else:
        note(f"error: {reason}: {visible(error.message)}")
    if isinstance(error, errors.Disconnected):
        note(f"  Does a sidecar run at {target}? Choose another with --target or OSTINATO_TARGET.")
    if isinstance(error, errors.Unauthenticated):
        note("  Give a token with --token-file, before the command, or in OSTINATO_TOKEN.")
    if error.retry_after is not None:
        note(f"  Try again in {error.retry_after:g} s.")


def visible(text: str) -> str:
    """The text in one line, with nothing in it that a terminal would obey."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def verdicts(results: Iterable[types_pb2.Result]) -> str:
    """How many of each, such as "2 match, 1 diverged"."""
    counts = Counter(word(each.comparison, "verdict") for each in results if each.HasField("comparison"))
    return ", ".join(f"{count} {'not compared' if name == 'unspecified' else name}" for name, count in counts.items()) or "none"


def word(message: Message, field: str) -> str:
    """An enum field's value as people write it: GRADE_BEST_EFFORT is best-effort."""
    kind, value = message.DESCRIPTOR.fields_by_name[field].enum_type, getattr(message, field)
    assert kind is not None
    return enums.words(kind).get(value, str(value)).lower().replace("_", "-")


def short(hash_: bytes) -> str:
    """Enough of a digest to tell it from others: 12 hexadecimal digits."""
    return hash_.hex()[:12]


def moment(unix_millis: int) -> str:
    """UTC, to the millisecond."""
    return datetime.fromtimestamp(unix_millis / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
