"""Compares two runs of one input. All comparisons use this module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ostinato.digest import output_digest
from ostinato.v1 import types_pb2


@dataclass(frozen=True, slots=True)
class Side:
    """A run: its output, and what it depends on."""

    output: types_pb2.Output
    input_digest: bytes
    """Equal ones are of equal inputs: bare, or both sealed with one nonce."""
    fingerprint_digest: bytes
    writer: str = ""
    """Of the entry that recorded it; empty: there is none."""
    sequence: int = 0
    """Of that entry."""
    company: int = 0
    """Batch occupancy: runs that the engine held when this one was submitted, itself included; 0: not known."""
    sampling: str = ""
    fingerprint_fields: Mapping[str, str] | None = None
    """The fields of fingerprint_digest; None: not known."""

    @classmethod
    def recorded(
        cls,
        header: types_pb2.EntryHeader,
        output: types_pb2.Output,
        fingerprint_fields: Mapping[str, str] | None,
        company: int = 0,
        sampling: str = "",
        input_digest: bytes | None = None,
    ) -> Side:
        """The run of a COMPLETED entry. `input_digest`: None is the header's."""
        made_of, made_on = header.input_digest if input_digest is None else input_digest, header.fingerprint_digest
        return cls(output, made_of, made_on, header.writer, header.sequence, company, sampling, fingerprint_fields)


def first_difference(expected: Sequence[object], actual: Sequence[object]) -> int | None:
    """The index of the first token, or character, that differs. If one is a prefix of the other, its length. None: they are
    equal."""
    for index, (a, b) in enumerate(zip(expected, actual, strict=False)):
        if a != b:
            return index
    return None if len(expected) == len(actual) else min(len(expected), len(actual))


def fingerprint_drift(expected: Mapping[str, str] | None, actual: Mapping[str, str] | None) -> list[str]:
    """The fields in which two fingerprints with different digests differ, such as `fingerprint.device`. Only `fingerprint` if
    one of them is not known, or no field differs."""
    if expected is None or actual is None:
        return ["fingerprint"]
    differing = (name for name in sorted(expected.keys() | actual.keys()) if expected.get(name) != actual.get(name))
    return [f"fingerprint.{name}" for name in differing] or ["fingerprint"]


def compare(
    expected: Side,
    actual: Side,
    kind: types_pb2.ComparisonKind.ValueType,
    sequence: int,
    *,
    dropped_equal: bool | None = None,
) -> types_pb2.Comparison:
    """MATCH if the output digests are equal, DIVERGED if not, INCOMPARABLE if inputs or fingerprints differ.

    If only fingerprints differ, the comparison still has the first difference of the outputs. `dropped_equal`: whether an
    expected output that was pruned was equal. Then the first difference is not known, and tokens count as compared only if it
    was; its digest is known only then, too.
    """
    actual_digest = output_digest(actual.output)
    expected_digest = output_digest(expected.output) if dropped_equal is None else actual_digest if dropped_equal else b""
    comparison = types_pb2.Comparison(
        sequence=sequence,
        kind=kind,
        expected_output_digest=expected_digest,
        actual_output_digest=actual_digest,
        expected_writer=expected.writer,
        expected_sequence=expected.sequence,
        grade=min(expected.output.grade, actual.output.grade),
        company=max(expected.company, actual.company),
        sampling=expected.sampling or actual.sampling,
    )
    same_input = expected.input_digest == actual.input_digest
    comparison.drift.extend([] if same_input else ["input"])
    if expected.fingerprint_digest != actual.fingerprint_digest:
        comparison.drift.extend(fingerprint_drift(expected.fingerprint_fields, actual.fingerprint_fields))
    equal = expected_digest == actual_digest
    if comparison.drift:
        comparison.verdict = types_pb2.VERDICT_INCOMPARABLE
    else:
        comparison.verdict = types_pb2.VERDICT_MATCH if equal else types_pb2.VERDICT_DIVERGED
    if dropped_equal is not None:
        comparison.compared_tokens = len(actual.output.token_ids) if equal else 0
        return comparison
    difference = first_difference(expected.output.token_ids, actual.output.token_ids)
    comparison.compared_tokens = len(expected.output.token_ids) if difference is None else difference
    if same_input and not equal:
        # Outputs with equal tokens and different finish reasons differ after the last token.
        comparison.first_difference = len(expected.output.token_ids) if difference is None else difference
        gap = margin(expected.output, comparison.first_difference)
        if gap is not None:
            comparison.margin = gap
    return comparison


def compare_prefix(
    sent: Sequence[int], output: types_pb2.Output, sequence: int, drift: Sequence[str] = ()
) -> types_pb2.Comparison:
    """A RECOVERY comparison: the tokens that a lost attempt had sent, against the output of the attempt that finished.

    `drift`: the result of `fingerprint_drift` if their fingerprints differ.
    """
    difference = first_difference(sent, output.token_ids[: len(sent)])
    comparison = types_pb2.Comparison(
        sequence=sequence,
        kind=types_pb2.COMPARISON_KIND_RECOVERY,
        actual_output_digest=output_digest(output),
        compared_tokens=len(sent) if difference is None else difference,
    )
    if drift:
        comparison.verdict = types_pb2.VERDICT_INCOMPARABLE
        comparison.drift.extend(drift)
    else:
        comparison.verdict = types_pb2.VERDICT_MATCH if difference is None else types_pb2.VERDICT_DIVERGED
    if difference is not None:
        comparison.first_difference = difference
    return comparison


def margin(output: types_pb2.Output, index: int) -> float | None:
    """The logprob of the likeliest token at this index minus that of the second, if RAW logprobs are known."""
    if output.logprob_kind != types_pb2.LOGPROB_KIND_RAW or index >= len(output.logprobs):
        return None
    top = output.logprobs[index].top
    return top[0].logprob - top[1].logprob if len(top) >= 2 else None
