"""Output. Results go to stdout, everything else to stderr; only a terminal gets colours and boxes."""

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

from ostinato import chain, digest, enums, errors
from ostinato.compare import first_difference
from ostinato.v1 import sequencer_pb2, types_pb2

UNBOUNDED_COLUMNS = 10_000
"""Wider than any terminal."""

NOT_COMPARED = "not compared"
"""In place of a verdict."""
VERDICTS = ("match", "diverged", "incomparable", NOT_COMPARED)
RESULT_COLUMNS = ("sequence", "seed", "grade", "finish", "digest", "tokens", "ms", "text")


def line(text: str) -> None:
    """Prints to stdout and flushes: the reader of a pipe waits for lines."""
    print(safe(text), flush=True)


def lines(texts: Iterable[str]) -> None:
    """Prints each in one line."""
    for text in texts:
        line(visible(text))


def note(text: str) -> None:
    """Prints to stderr."""
    print(safe(text), file=sys.stderr, flush=True)


def safe(text: str) -> str:
    """The text, in its lines, without characters that control a terminal: names of fields and files may have some, too."""
    return text if text.isprintable() else "\n".join("\t".join(map(visible, row.split("\t"))) for row in text.split("\n"))


def as_dict(message: Message) -> dict[str, Any]:
    """Protobuf's JSON with the contract's names. 64-bit numbers are strings."""
    made: dict[str, Any] = json_format.MessageToDict(message, preserving_proto_field_name=True)
    return made


def as_json(message: Message | Mapping[str, Any]) -> None:
    """Prints one line of JSON in ASCII, because a text may contain any line separator."""
    line(json.dumps(as_dict(message) if isinstance(message, Message) else message))


def entry(given: sequencer_pb2.Entry) -> dict[str, Any]:
    """A journal entry, with its payload decoded beside the payload's bytes."""
    made = as_dict(given)
    if given.payload and given.header.kind in chain.PAYLOADS:
        made["decoded"] = as_dict(chain.PAYLOADS[given.header.kind].FromString(given.payload))
    return made


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints rows under a header. If the terminal is too narrow for whole words, prints one line per cell and a blank line
    between rows."""
    listed = list(rows)
    if not _is_terminal():
        _aligned([columns, *listed])
        return
    console = Console()
    made = Table(*map(safe, columns), box=box.SIMPLE_HEAD, pad_edge=False)
    for row in listed:
        made.add_row(*map(Text, map(safe, row)))
    # Measured at an unbounded width: at the console's width rich may already report that it breaks words.
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
    """Prints names and values, one pair per line."""
    _aligned([(visible(name), visible(str(value))) for name, value in pairs])


def _aligned(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        line("  ".join(cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)).rstrip())


@contextmanager
def progress(what: str, total: int | None, wanted: bool | None = None) -> Iterator[Callable[..., None]]:
    """A bar on stderr, by default if stderr is a terminal. Yields a function that takes the number done, and the total if that
    was not known."""
    if not (sys.stderr.isatty() if wanted is None else wanted):
        yield lambda done, total=None: None
        return
    console = Console(stderr=True, force_terminal=True)
    # Lines for the same terminal have to be printed above the bar. Lines for a pipe must not be.
    with Progress(console=console, transient=True, redirect_stdout=sys.stdout.isatty()) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done, total=None: bar.update(task, completed=done, total=total)


def result(given: types_pb2.Result) -> tuple[str, ...]:
    """RESULT_COLUMNS of one item."""
    millis = f"{given.timing.total_micros / 1000:.1f}"
    if given.HasField("status"):
        error = errors.from_status(given.status)
        return (str(given.sequence), "", "", error.reason, "", "", millis, visible(error.message))
    output = given.output
    return (
        str(given.sequence),
        str(output.seed),
        word(output, "grade"),
        word(output, "finish_reason"),
        short(digest.output_digest(output)),
        str(len(output.token_ids)),
        millis,
        visible(output.text),
    )


def failure(error: errors.OstinatoError, targets: str = "--target or OSTINATO_TARGET") -> None:
    """Prints an error in one line, and a hint. `targets`: how the sidecar of the call is chosen."""
    reason = error.reason if error.reason != errors.OstinatoError.reason else error.code.name
    if isinstance(error, errors.InvalidRequest) and error.violations:
        count = len(error.violations)
        note(f"error: {reason}: the request has {count} bad {'field' if count == 1 else 'fields'}")
        for violation in error.violations:
            note(f"  {visible(violation.field)}: {visible(violation.description)}")
    else:
        note(f"error: {reason}: {visible(error.message)}")
    if isinstance(error, errors.Disconnected) and error.target:
        note(f"  Is a sidecar running at {error.target}? Choose another with {targets}.")
    if isinstance(error, errors.Unauthenticated):
        note("  Give a token with --token-file, before the command, or in OSTINATO_TOKEN.")
    if error.retry_after is not None:
        note(f"  Try again in {error.retry_after:g} s.")


def visible(text: str) -> str:
    """The text in one line, without characters that control a terminal."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def verdict(given: types_pb2.Comparison) -> str:
    """In words."""
    return NOT_COMPARED if given.HasField("status") or not given.verdict else word(given, "verdict")


def verdicts(results: Iterable[types_pb2.Result]) -> str:
    """Such as "2 match, 1 diverged"."""
    return counts(Counter(verdict(each.comparison) for each in results if each.HasField("comparison")))


def counts(given: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in given.items()) or "none"


def word(message: Message, field: str) -> str:
    """The value of an enum field in lower case: GRADE_BEST_EFFORT is best-effort."""
    kind, value = message.DESCRIPTOR.fields_by_name[field].enum_type, getattr(message, field)
    assert kind is not None
    return enums.words(kind).get(value, str(value)).lower().replace("_", "-")


def short(value: bytes) -> str:
    """The first 12 hexadecimal digits."""
    return value.hex()[:12]


def moment(unix_millis: int) -> str:
    """UTC, to the millisecond."""
    return datetime.fromtimestamp(unix_millis / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def span(given: sequencer_pb2.TokenSpan | sequencer_pb2.CompanyShare) -> str:
    """`4` or `4-7`."""
    return str(given.first) if given.first == given.last else f"{given.first}-{given.last}"


def occupancy(given: sequencer_pb2.CompanyShare) -> str:
    """Runs that the engine held: `1 run`, `4-7 runs`, or `not known`."""
    return span(given) + (" run" if given.last == 1 else " runs") if given.last else "not known"


# A recorded run and another run of the same input, side by side.
MARK = "▶"
"""Where the texts differ. The first differing token may begin with the same characters."""
BEFORE, AFTER = 40, 60
"""Characters shown around it."""
NEAR_TIE_NATS = 0.1
"""A margin that the rounding of half-precision arithmetic can turn."""


def headline(found: types_pb2.Comparison) -> str:
    """One line about a comparison whose verdict is not MATCH."""
    if found.verdict == types_pb2.VERDICT_DIVERGED:
        return f"{found.sequence} diverged at token {found.first_difference}"
    if found.HasField("status"):
        return f"{found.sequence} not compared: {visible(errors.from_status(found.status).message)}"
    difference = f"the outputs differ from token {found.first_difference} on" if found.HasField("first_difference") else ""
    equal = "" if difference or "input" in found.drift else "the outputs are equal"
    drift = f"{found.sequence} incomparable: {visible(', '.join(found.drift))}"
    return "; ".join(filter(None, [drift, difference, equal]))


def side_by_side(response: sequencer_pb2.ReplayResponse) -> None:
    """Prints where both runs differ, and their input."""
    found, given = response.comparison, response.record.input
    at, outputs = found.first_difference, (response.record.result.output, found.actual)
    table(
        ("", "recorded", "now"),
        [
            ("text", *_texts(*(output.text for output in outputs))),
            (f"token {at}", *(str(each.token_ids[at]) if at < len(each.token_ids) else "none" for each in outputs)),
            ("logprob", *(f"{each.logprobs[at].logprob:.6f}" if at < len(each.logprobs) else "unknown" for each in outputs)),
            ("tokens", *(f"{len(output.token_ids)}, {word(output, 'finish_reason')}" for output in outputs)),
        ],
    )
    shift = _shift(*outputs, at)
    about = {
        "margin": f"{found.margin:.6f}, {_meaning(found.margin, given.parameters)}" if found.HasField("margin") else "",
        "shift": "" if shift is None else f"the same tokens' logprobs there moved by at most {shift:.6f}",
        "seed": f"{given.seed}{' (derived)' if given.seed_derived else ''}",
        "parameters": ", ".join(_parameters(given.parameters)),
    }
    card((name, value) for name, value in about.items() if value)


def _texts(expected: str, actual: str) -> list[str]:
    difference = first_difference(expected, actual)
    at = len(expected) if difference is None else difference
    start = max(0, at - BEFORE)
    return [
        visible(
            f"{'…' if start else ''}{text[start:at]}{MARK}{text[at : at + AFTER]}" + ("…" if len(text) > at + AFTER else "")
        )
        for text in (expected, actual)
    ]


def _shift(expected: types_pb2.Output, actual: types_pb2.Output, at: int) -> float | None:
    """The largest difference of a token's logprob at this index between the runs; None: not known."""
    if expected.logprob_kind != actual.logprob_kind or at >= min(len(expected.logprobs), len(actual.logprobs)):
        return None
    before, now = ({top.token_id: top.logprob for top in output.logprobs[at].top} for output in (expected, actual))
    return max((abs(before[token_id] - now[token_id]) for token_id in before.keys() & now.keys()), default=None)


def _meaning(margin: float, parameters: types_pb2.ResolvedParameters) -> str:
    if parameters.temperature and parameters.top_k != 1:
        return "but sampled: the draw decides, not the likeliest token"
    return "a near-tie" if margin <= NEAR_TIE_NATS else "no near-tie"


def _parameters(parameters: types_pb2.ResolvedParameters) -> Iterator[str]:
    yield f"temperature {parameters.temperature:g}"
    for field, value in parameters.ListFields():
        if field.name != "temperature":
            yield f"{field.name} {list(value) if field.is_repeated else visible(str(value).strip())}"
