"""A recorded run and another one of the same input, side by side."""

from __future__ import annotations

from collections.abc import Iterator

from ostinato import errors
from ostinato.cli import show
from ostinato.compare import first_difference
from ostinato.v1 import sequencer_pb2, types_pb2

MARK = "▶"
"""Stands where the texts part: tokens have no texts of their own, and the first that differ may begin alike."""
BEFORE, BEHIND = 40, 60
"""Characters shown around it."""
NEAR_TIE = 0.1
"""In nats: a margin within reach of the rounding of half-precision arithmetic."""


def headline(found: types_pb2.Comparison) -> str:
    """A comparison that is no MATCH, in a line."""
    if found.verdict == types_pb2.VERDICT_DIVERGED:
        return f"{found.sequence} diverged at token {found.first_difference}"
    if found.HasField("status"):
        return f"{found.sequence} not compared: {show.visible(errors.from_status(found.status).message)}"
    parts = f"the outputs part at token {found.first_difference}" if found.HasField("first_difference") else ""
    same = "" if parts or "input" in found.drift else "the outputs are equal"
    return "; ".join(filter(None, [f"{found.sequence} incomparable: {show.visible(', '.join(found.drift))}", parts, same]))


def side_by_side(response: sequencer_pb2.ReplayResponse) -> None:
    """Prints both runs, where they part, and what they were asked."""
    found, given = response.comparison, response.record.input
    at, outputs = found.first_difference, (response.record.result.output, found.actual)
    show.table(
        ("", "recorded", "now"),
        [
            ("text", *_texts(*(output.text for output in outputs))),
            (f"token {at}", *(_token(output, at) for output in outputs)),
            ("logprob", *(_logprob(output, at) for output in outputs)),
            ("tokens", *(f"{len(output.token_ids)}, {show.word(output, 'finish_reason')}" for output in outputs)),
        ],
    )
    show.card([(name, value) for name, value in _about(found, given, *outputs) if value])


def _texts(expected: str, actual: str) -> list[str]:
    parting = first_difference(expected, actual)
    shared = len(expected) if parting is None else parting
    start = max(0, shared - BEFORE)
    return [
        show.visible(
            f"{'…' if start else ''}{text[start:shared]}{MARK}{text[shared : shared + BEHIND]}"
            + ("…" if len(text) > shared + BEHIND else "")
        )
        for text in (expected, actual)
    ]


def _token(output: types_pb2.Output, at: int) -> str:
    return str(output.token_ids[at]) if at < len(output.token_ids) else "none"


def _logprob(output: types_pb2.Output, at: int) -> str:
    return f"{output.logprobs[at].logprob:.6f}" if at < len(output.logprobs) else "unknown"


def _about(
    found: types_pb2.Comparison, given: sequencer_pb2.AdmittedPayload, expected: types_pb2.Output, actual: types_pb2.Output
) -> Iterator[tuple[str, str]]:
    if found.HasField("margin"):
        yield "margin", f"{found.margin:.6f}, {_weight(found.margin, given.parameters)}"
    moved = _moved(expected, actual, found.first_difference)
    yield "shift", "" if moved is None else f"the same tokens' logprobs there moved by at most {moved:.6f}"
    yield "seed", f"{given.seed}{' (derived)' if given.seed_derived else ''}"
    yield "parameters", ", ".join(_set(given.parameters))


def _moved(expected: types_pb2.Output, actual: types_pb2.Output, at: int) -> float | None:
    """How far the distributions at this token lie apart, as far as both runs tell."""
    if expected.logprob_kind != actual.logprob_kind or at >= min(len(expected.logprobs), len(actual.logprobs)):
        return None
    before, now = ({top.token_id: top.logprob for top in output.logprobs[at].top} for output in (expected, actual))
    return max((abs(before[token_id] - now[token_id]) for token_id in before.keys() & now.keys()), default=None)


def _weight(margin: float, parameters: types_pb2.ResolvedParameters) -> str:
    """What a margin means."""
    if parameters.temperature and parameters.top_k != 1:
        return "but sampled: the draw decides, not the likeliest token"
    return "a near-tie" if margin <= NEAR_TIE else "no near-tie"


def _set(parameters: types_pb2.ResolvedParameters) -> Iterator[str]:
    yield f"temperature {parameters.temperature:g}"
    for field, value in parameters.ListFields():
        if field.name != "temperature":
            yield f"{field.name} {list(value) if field.is_repeated else show.visible(str(value).strip())}"
