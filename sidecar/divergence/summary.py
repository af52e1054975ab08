"""The tally as a report. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ostinato import enums
from ostinato.v1 import sequencer_pb2, types_pb2

from sidecar.divergence.statistics import Rate, life_table
from sidecar.divergence.stratum import Share, Stratum
from sidecar.divergence.tally import STRATA_MAX, Tally
from sidecar.divergence.verdicts import Moment


def report(
    tally: Tally, index: int, confidence: float, fingerprints: Mapping[bytes, types_pb2.Fingerprint]
) -> sequencer_pb2.ReportResponse:
    """Everything but log id and writer. Fingerprints by their digests."""
    seen = {bytes.fromhex(stratum.key.fingerprint) for stratum in tally.strata}
    return sequencer_pb2.ReportResponse(
        index=index,
        confidence=confidence,
        alarm=any(stratum.evidence.alarm for stratum in tally.strata),
        strata=[_stratum(stratum, confidence) for stratum in reversed(tally.strata)],
        fingerprints=[fingerprint for digest, fingerprint in sorted(fingerprints.items()) if digest in seen],
        collision_checks=tally.collision_checks,
        collisions=tally.collisions,
        not_compared=[
            sequencer_pb2.NotCompared(kind=enums.value(types_pb2.ComparisonKind, kind.upper()), reason=reason, count=count)
            for kind, reasons in sorted(tally.not_compared.items())
            for reason, count in sorted(reasons.items())
        ],
        strata_max=STRATA_MAX,
    )


def _stratum(stratum: Stratum, confidence: float) -> sequencer_pb2.Stratum:
    series = stratum.series
    return sequencer_pb2.Stratum(
        kind=enums.value(types_pb2.ComparisonKind, stratum.key.kind.upper()),
        grade=enums.value(types_pb2.Grade, stratum.key.grade.upper()),
        fingerprint_digest=bytes.fromhex(stratum.key.fingerprint),
        other_replica=stratum.key.other_replica,
        matched=stratum.matched,
        diverged=stratum.diverged,
        incomparable=stratum.incomparable,
        drift=stratum.drift,
        compared_tokens=stratum.compared_tokens,
        per_comparison=_rate(Rate(stratum.diverged, stratum.compared, confidence)),
        recent=_rate(stratum.recent_rate(confidence)),
        per_token=_rate(stratum.token_rate(confidence)),
        evidence_log10=stratum.evidence.log10,
        alarm=stratum.evidence.alarm,
        alarmed=_moment(stratum.alarmed),
        first=_moment(stratum.first),
        last=_moment(stratum.last),
        first_diverged=_moment(stratum.first_diverged),
        last_diverged=_moment(stratum.last_diverged),
        token_spans=_token_spans(stratum, confidence),
        samplings=[
            sequencer_pb2.SamplingShare(sampling=name, rate=_share(share, confidence))
            for name, share in sorted(stratum.samplings.items(), key=lambda item: item[1].worst_first)
        ],
        companies=[
            sequencer_pb2.CompanyShare(first=1 << length >> 1, last=(1 << length) - 1, rate=_share(share, confidence))
            for length, share in enumerate(stratum.companies)
            if share.compared
        ],
        times=[
            sequencer_pb2.TimeShare(
                time_unix_millis=number * series.bucket_millis,
                width_millis=series.bucket_millis,
                rate=_share(share, confidence),
            )
            for number, share in sorted(series.buckets.items())
        ],
    )


def _token_spans(stratum: Stratum, confidence: float) -> Iterable[sequencer_pb2.TokenSpan]:
    return [
        sequencer_pb2.TokenSpan(
            first=row.first,
            last=row.last,
            at_risk=row.at_risk,
            diverged=row.ended.diverged,
            censored=row.ended.clean,
            hazard=_rate(row.hazard),
            equal_before=row.equal_before,
        )
        for row in life_table(stratum.spans, confidence)
    ]


def _share(share: Share, confidence: float) -> sequencer_pb2.Rate:
    return _rate(Rate(share.diverged, share.compared, confidence))


def _rate(rate: Rate) -> sequencer_pb2.Rate:
    return sequencer_pb2.Rate(events=rate.events, trials=rate.trials, value=rate.value, lower=rate.lower, upper=rate.upper)


def _moment(moment: Moment | None) -> sequencer_pb2.Moment | None:
    return None if moment is None else sequencer_pb2.Moment(index=moment.index, time_unix_millis=moment.unix_millis)
