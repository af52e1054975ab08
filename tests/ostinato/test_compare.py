"""Verdicts, against a simple oracle."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ostinato.compare import Side, compare, compare_prefix, margin
from ostinato.digest import fingerprint_digest, output_digest
from ostinato.v1 import types_pb2

LENGTH, STOP = types_pb2.FINISH_REASON_LENGTH, types_pb2.FINISH_REASON_STOP_STRING
MATCH, DIVERGED, INCOMPARABLE = types_pb2.VERDICT_MATCH, types_pb2.VERDICT_DIVERGED, types_pb2.VERDICT_INCOMPARABLE
TWIN = types_pb2.COMPARISON_KIND_TWIN

token_lists = st.lists(st.integers(0, 2), max_size=6)
outputs = st.builds(
    types_pb2.Output,
    token_ids=token_lists,
    finish_reason=st.sampled_from([LENGTH, STOP]),
    matched_stop=st.sampled_from(["", "."]),
)
fields = st.dictionaries(st.sampled_from(["device", "driver", "model"]), st.sampled_from(["1", "2"]))
sides = st.builds(Side, outputs, st.sampled_from([b"input", b"other"]), st.sampled_from([b"fingerprint", b"other"]))


def naive(expected: list[int], actual: list[int]) -> int | None:
    """The first index at which they differ, by a slow search."""
    for index in range(max(len(expected), len(actual))):
        if expected[index : index + 1] != actual[index : index + 1]:
            return index
    return None


def output(*token_ids: int, reason: types_pb2.FinishReason.ValueType = LENGTH, stop: str = "") -> types_pb2.Output:
    return types_pb2.Output(token_ids=token_ids, finish_reason=reason, matched_stop=stop)


def verdict(expected: types_pb2.Output, actual: types_pb2.Output) -> types_pb2.Comparison:
    """Two runs with equal inputs and fingerprints."""
    return compare(Side(expected, b"i", b"f"), Side(actual, b"i", b"f"), TWIN, 7)


@given(sides, sides)
@example(Side(output(1, 2), b"input", b"other"), Side(output(1, 2, reason=STOP), b"input", b"other"))
@example(Side(output(1, 2), b"input", b"other"), Side(output(1, 2, stop="."), b"input", b"other"))
def test_a_verdict(expected: Side, actual: Side) -> None:
    """Drift is INCOMPARABLE; else equal tokens, reason and stop are a MATCH, and others DIVERGED at the first difference: for
    equal tokens with another reason or stop, after the last token."""
    said = compare(expected, actual, TWIN, 7)

    drift = [
        name
        for name, differs in (
            ("input", expected.input_digest != actual.input_digest),
            ("fingerprint", expected.fingerprint_digest != actual.fingerprint_digest),
        )
        if differs
    ]
    place = naive(list(expected.output.token_ids), list(actual.output.token_ids))
    shared = len(expected.output.token_ids) if place is None else place
    assert (said.sequence, said.kind, list(said.drift), said.compared_tokens) == (7, TWIN, drift, shared)
    assert (said.expected_output_digest, said.actual_output_digest) == (
        output_digest(expected.output),
        output_digest(actual.output),
    )
    equal = expected.output == actual.output
    assert said.verdict == (INCOMPARABLE if drift else MATCH if equal else DIVERGED)
    apart = not equal and "input" not in drift
    assert (said.HasField("first_difference"), said.first_difference) == (apart, shared if apart else 0)
    assert not said.HasField("margin")


@given(fields, fields)
def test_the_fields_that_differ(expected: dict[str, str], actual: dict[str, str]) -> None:
    """Two known fingerprints drift in the fields that differ; with an unknown one the drift is `fingerprint`."""
    run = output(1)

    def drift(one: dict[str, str] | None, other: dict[str, str] | None) -> list[str]:
        first, second = (
            Side(run, b"i", fingerprint_digest({"un": "known"} if given is None else given), fingerprint_fields=given)
            for given in (one, other)
        )
        return list(compare(first, second, TWIN, 7).drift)

    differing = {f"fingerprint.{name}" for name, _ in expected.items() ^ actual.items()}
    assert drift(expected, actual) == sorted(differing)
    assert drift(expected, None) == drift(None, actual) == ["fingerprint"]


# ---- the margin

RAW, PROCESSED = types_pb2.LOGPROB_KIND_RAW, types_pb2.LOGPROB_KIND_PROCESSED


def likely(*tops: list[float], kind: types_pb2.LogprobKind.ValueType = RAW) -> types_pb2.Output:
    """An output of tokens 0, 1 and so on, with these logprobs of the likeliest tokens."""
    logprobs = [
        types_pb2.TokenLogprobs(top=[types_pb2.TopLogprob(token_id=rank, logprob=value) for rank, value in enumerate(top)])
        for top in tops
    ]
    return types_pb2.Output(token_ids=range(len(tops)), finish_reason=LENGTH, logprobs=logprobs, logprob_kind=kind)


def test_the_margin_is_the_recorded_runs_at_the_difference() -> None:
    """The margin is of the recorded run, at the first difference; NaN if both choices are impossible; none after its end."""
    said = verdict(likely([-0.1, -5.0], [-0.5, -0.75, -3.0]), output(0, 9))
    assert (said.first_difference, said.margin) == (1, 0.25)
    assert math.isnan(margin(likely([-math.inf, -math.inf]), 0) or 0.0)
    after = verdict(likely([-0.5, -0.75]), output(0, 1))
    assert (after.first_difference, after.HasField("margin")) == (1, False)


@pytest.mark.parametrize(
    "recorded",
    [
        likely([-0.5, -0.75], kind=PROCESSED),
        likely([-0.5, -0.75], kind=types_pb2.LOGPROB_KIND_UNSPECIFIED),
        likely([-0.5]),
        likely([]),
        output(0),
    ],
    ids=["processed", "of no kind", "one choice", "the chosen token's only", "no logprobs"],
)
def test_no_margin(recorded: types_pb2.Output) -> None:
    """The margin needs RAW logprobs of two tokens or more."""
    assert margin(recorded, 0) is None
    assert not verdict(recorded, output(9)).HasField("margin")


# ---- recovery


@given(token_lists, token_lists, st.sampled_from([[], ["fingerprint.device"]]))
def test_a_recovery(sent: list[int], made: list[int], drift: list[str]) -> None:
    """The sent tokens must be a prefix of the last attempt's output; only that many are compared."""
    said = compare_prefix(sent, output(*made), 7, drift)

    place = naive(sent, made[: len(sent)])
    assert said.kind == types_pb2.COMPARISON_KIND_RECOVERY
    assert said.compared_tokens == (len(sent) if place is None else place)
    assert said.verdict == (INCOMPARABLE if drift else MATCH if made[: len(sent)] == sent else DIVERGED)
    assert list(said.drift) == drift
    assert said.HasField("first_difference") == (place is not None)
    assert said.first_difference == (place or 0)


@given(sides, sides)
def test_a_dropped_output(expected: Side, actual: Side) -> None:
    """If only whether the first output was equal is known, the verdict is the same, without a first difference."""
    full = compare(expected, actual, TWIN, 7)
    equal = full.expected_output_digest == full.actual_output_digest
    bare = compare(replace(expected, output=types_pb2.Output()), actual, TWIN, 7, dropped_equal=equal)

    if not equal:
        for unknown in ("first_difference", "compared_tokens", "expected_output_digest"):
            full.ClearField(unknown)
    assert bare == full
