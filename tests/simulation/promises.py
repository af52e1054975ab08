"""One checker for each promise of docs/order.md, by its number: what is wrong in a history; nothing where it was kept."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator

from ostinato import errors
from ostinato.chain import OUTCOMES, check_result, entry_hash
from ostinato.digest import input_digest, request_digest
from ostinato.v1 import engine_pb2, sequencer_pb2, types_pb2

from sidecar.answers import result_of
from sidecar.journal.model import Sealed
from tests.simulation.history import Call, History, Submission
from tests.simulation.stores import WRITER

ADMITTED, OPENED = types_pb2.ENTRY_KIND_ADMITTED, types_pb2.ENTRY_KIND_OPENED
COMPLETED, ABANDONED = types_pb2.ENTRY_KIND_COMPLETED, types_pb2.ENTRY_KIND_ABANDONED
HEARD_SECONDS = 10.0
"""In which a client hears of an outcome that is durable, while it can be reached."""
COME_BACK = errors.QueueFull | errors.JournalFull | errors.JournalUnavailable | errors.EngineUnavailable | errors.Draining


class Disk:
    """The entries, by what they are about."""

    def __init__(self, history: History) -> None:
        self.entries = history.disk
        self.admitted = {e.header.sequence: e for e in self.entries if e.header.kind == ADMITTED}
        self.given = {n: sequencer_pb2.AdmittedPayload.FromString(e.payload) for n, e in self.admitted.items()}
        self.outcomes = defaultdict[int, list[Sealed]](list)
        for entry in self.entries:
            if entry.header.kind in OUTCOMES:
                self.outcomes[entry.header.sequence].append(entry)

    def by_request(self) -> dict[str, list[int]]:
        """Sequences by the request_id that they were admitted with."""
        found = defaultdict[str, list[int]](list)
        for number, given in self.given.items():
            found[given.request_id].append(number)
        return found


def primaries(history: History) -> list[Submission]:
    return [one for one in history.submissions if one.purpose == engine_pb2.PURPOSE_PRIMARY]


def gapless(history: History) -> Iterator[str]:
    """1. Numbers are 1, 2, 3 and so on; a batch has consecutive ones, all or none; none stands for two things."""
    disk = Disk(history)
    numbers = [entry.header.sequence for entry in history.disk if entry.header.kind == ADMITTED]
    if numbers != list(range(1, len(numbers) + 1)):
        yield f"the sequences on the disk are {numbers}"
    batches = defaultdict[int, list[Sealed]](list)
    for entry in disk.admitted.values():
        batches[entry.header.first_sequence].append(entry)
    for first, batch in batches.items():
        indexes, count = [entry.header.index for entry in batch], batch[0].header.count
        if [entry.header.sequence for entry in batch] != list(range(first, first + count)):
            yield f"the batch of sequence {first} is not whole"
        if indexes != list(range(indexes[0], indexes[0] + len(indexes))):
            yield f"the batch of sequence {first} was not written at once"
    said = defaultdict[int, set[str]](set)
    for call in history.calls:
        if call.stamp is not None:
            said[call.stamp.first_sequence].add(call.key or call.request.request_id)
            if call.stamp.count != len(call.request.items):
                yield f"{call} has {len(call.request.items)} items and {call.stamp.count} numbers"
    yield from (f"sequence {first} was given to {sorted(who)}" for first, who in said.items() if len(who) > 1)
    for one in history.submissions:
        given = disk.given.get(one.sequence)
        if given is not None and input_digest(given.token_ids, given.parameters, given.seed) != one.input:
            yield f"sequence {one.sequence} ran with another input than it was admitted with"


def ended_once(history: History) -> Iterator[str]:
    """2. A refusal burns no number and says when to come back; every number ends once, and all its callers hear the same."""
    disk = Disk(history)
    own = disk.by_request()
    for call in history.calls:
        if call.refused and own.get(call.request.request_id):
            yield f"{call} was refused ({call.error!r}) and has sequences {own[call.request.request_id]}"
        if isinstance(call.error, COME_BACK) and not call.error.retry_after:
            yield f"{call} was refused ({call.error.reason}) and not told when to come back"
        yield from (f"{call}: {fault}" for fault in call.faults)
        if call.ended_well and not call.complete:
            yield f"{call} ended without an error, and with {len(call.results)} results"
        for step, epoch in history.drains:
            if (
                any(disk.admitted[number].header.epoch == epoch for number in own.get(call.request.request_id, []))
                and call.sent > step
            ):
                yield f"{call} was admitted in epoch {epoch}, whose sidecar had been told to stop before it was sent"
    for number in disk.admitted:
        if len(disk.outcomes[number]) != 1:
            yield f"sequence {number} has {len(disk.outcomes[number])} outcomes"
    yield from (f"sequence {number} ended and was never admitted" for number in disk.outcomes if number not in disk.admitted)
    told = defaultdict[int, set[bytes]](set)
    for call in history.calls:
        for result in call.results:
            told[result.sequence].add(result.SerializeToString(deterministic=True))
    yield from (f"sequence {number}: {len(what)} different results were told" for number, what in told.items() if len(what) > 1)
    yield from _heard(history, disk)
    if history.unended:
        yield history.unended


def _heard(history: History, disk: Disk) -> Iterator[str]:
    """No call stays open without an answer when all its outcomes are durable and its client can be reached."""
    own, requests = disk.by_request(), _requests(history)
    keyed = defaultdict[tuple[str, bytes], list[int]](list)
    for number, given in disk.given.items():
        keyed[given.idempotency_key, given.request_digest].append(number)
    for call in history.calls:
        numbers = own.get(call.request.request_id)
        if not numbers and call.key:
            numbers = keyed.get((call.key, requests[call.key, _body(call)]))
        outcomes = [disk.outcomes[number][:1] for number in numbers or ()]
        if not call.closed or not outcomes or not all(outcomes):
            continue
        steps = [history.durable.get(outcome[0].header.index, call.closed) for outcome in outcomes]
        since = history.time_of(max(call.sent, *steps))
        until = since + HEARD_SECONDS
        for begin, end in sorted(history.out_of_reach):
            if begin < until:
                until = max(until, end + HEARD_SECONDS)
        if history.time_of(call.closed) > until:
            seconds = history.time_of(call.closed) - since
            yield f"{call} heard nothing for {seconds:.0f} s, though sequences {numbers} had ended and it could be reached"


def real_time(history: History) -> Iterator[str]:
    """3. What was acknowledged before something else was sent has the smaller numbers."""
    first_sent = dict[str, int]()
    acknowledged = list[tuple[int, int]]()
    stamped = dict[str, int]()
    for call in history.calls:
        name = call.key or call.request.request_id
        # One key may come with two requests; the sequence belongs to the one that was sent first.
        first_sent[name] = min(call.sent, first_sent.get(name, call.sent))
        if call.stamp is not None:
            acknowledged.append((call.acknowledged, call.stamp.first_sequence))
            stamped[name] = call.stamp.first_sequence
    for name, number in stamped.items():
        earlier = [other for step, other in acknowledged if step < first_sent[name] and other > number]
        if earlier:
            yield f"{name} got sequence {number}, though {max(earlier)} was acknowledged before it was sent"


def submitted_in_order(history: History) -> Iterator[str]:
    """4. The engine gets numbers in their order, each stream ascending, and never more at once than it can hold."""
    runs, others = primaries(history), _others(history)
    firsts = list(dict.fromkeys((one.epoch, one.sequence) for one in runs if one.sequence not in others))
    # Epoch by epoch: what ended while it waited, and lost its outcome to a crash, is submitted first when it is recovered.
    for (epoch, earlier), (next_epoch, later) in itertools.pairwise(sorted(firsts, key=lambda first: first[0])):
        if epoch == next_epoch and later < earlier:
            yield f"sequence {later} reached the engine behind {earlier}"
    welcomed = {stream: step for step, stream, _ in history.welcomed}
    # What is taken over while a stream is up is older than what has passed on it. On every later stream it has its place.
    placed = [one for one in runs if history.taken.get(one.sequence, 0) <= welcomed[one.stream]]
    for _, together in itertools.groupby(placed, key=lambda one: one.stream):
        for one, other in itertools.pairwise(together):
            if other.sequence <= one.sequence:
                yield f"sequence {other.sequence} was submitted behind {one.sequence} on stream {one.stream}"
    for stream in history.streams:
        yield from (f"the engine was given too much: {fault}" for fault in stream.overfull)
    known = {entry.header.sequence for entry in history.disk if entry.header.kind == ADMITTED}
    yield from (f"sequence {one.sequence} ran and was never admitted" for one in runs if one.sequence not in known)


def _others(history: History) -> set[int]:
    """Sequences that another writer of the log has given out."""
    return {e.header.sequence for e in history.disk if e.header.kind == ADMITTED and e.header.writer != WRITER}


def fenced(history: History) -> Iterator[str]:
    """5. Epochs rise. A sidecar that was replaced can neither write nor submit, and only one drives the engine."""
    newest = 0
    for entry in history.disk:
        header = entry.header
        if header.writer != WRITER:
            continue
        if header.kind == OPENED:
            if header.epoch <= newest:
                yield f"entry {header.index} opens epoch {header.epoch} after {newest}"
            newest = max(newest, header.epoch)
        elif header.epoch != newest:
            yield f"entry {header.index} was written in epoch {header.epoch}, after {newest} had begun"
    admitted = Disk(history).admitted
    for call in history.calls:
        if call.stamp is not None:
            own = admitted.get(call.stamp.first_sequence)
            if own is not None and own.header.epoch != call.stamp.epoch:
                yield f"{call} was told epoch {call.stamp.epoch}, the journal says {own.header.epoch}"
    highest, position = dict[int, int](), 0
    service_of = {stream.number: stream.service for stream in history.streams}
    last_of = dict[int, int]()
    for one in history.submissions:
        while position < len(history.welcomed) and history.welcomed[position][0] < one.step:
            _, number, epoch = history.welcomed[position]
            service = service_of[number]
            highest[service] = max(epoch, highest.get(service, 0))
            last_of[service] = number
            position += 1
        if one.epoch < highest.get(one.service, 0):
            yield f"sequence {one.sequence} was submitted in epoch {one.epoch}, after {highest[one.service]} had come"
        if one.stream != last_of.get(one.service):
            yield f"sequence {one.sequence} came on stream {one.stream}, which is not the one that was let in last"


def remembered(history: History) -> Iterator[str]:
    """6. A key has one range and one answer, byte for byte, for who sends the same again; another request is turned away."""
    disk = Disk(history)
    ranges = defaultdict[str, set[tuple[int, int]]](set)
    digest = dict[str, bytes]()
    for number, given in disk.given.items():
        header = disk.admitted[number].header
        if given.idempotency_key:
            ranges[given.idempotency_key].add((header.first_sequence, header.count))
            digest[given.idempotency_key] = given.request_digest
    yield from (f"{key} is bound to {sorted(bound)}" for key, bound in ranges.items() if len(bound) > 1)
    requests = _requests(history)
    for call in history.calls:
        if not call.key:
            continue
        if call.stamp is not None and (call.stamp.first_sequence, call.stamp.count) not in ranges[call.key]:
            yield f"{call} was told sequence {call.stamp.first_sequence} for {call.key}, which has {sorted(ranges[call.key])}"
        if call.stamp is not None and requests[call.key, _body(call)] != digest.get(call.key):
            yield f"{call} was answered under {call.key} with what another request had made"
        if isinstance(call.error, errors.KeyReused) and requests[call.key, _body(call)] == digest.get(call.key):
            yield f"{call} was told that {call.key} stands for another request, and it is this one's"
        again = isinstance(call.error, COME_BACK | errors.CallLost | errors.DeadlineExceeded)
        if call.afterwards and requests[call.key, _body(call)] == digest.get(call.key) and not call.complete and not again:
            yield f"{call} asked again for {call.key} and got {call.error!r}"
        for result in call.results:
            outcome = disk.outcomes[result.sequence]
            kept = result_of(outcome[0]).SerializeToString(deterministic=True) if outcome else b""
            if result.SerializeToString(deterministic=True) != kept:
                yield f"{call} was answered for sequence {result.sequence} with other bytes than the journal's"


def nothing_lost(history: History) -> Iterator[str]:
    """7. What was told is on the disk, and was before it was told; recovery takes up what has a key, and only that."""
    disk = Disk(history)
    yield from _chain(history)
    for call in history.calls:
        yield from _acknowledged(call, disk, history)
    for one in primaries(history):
        entry = disk.admitted.get(one.sequence)
        if entry is None:
            yield f"sequence {one.sequence} reached the engine, and is not on the disk"
            continue
        if not history.is_durable(entry, one.step):
            yield f"sequence {one.sequence} reached the engine before it was durable"
        yield from _attempt(one, entry, disk, history)
    for number, outcomes in disk.outcomes.items():
        keyed = bool(number in disk.given and disk.given[number].idempotency_key)
        for outcome in outcomes:
            if keyed and outcome.header.kind == ABANDONED:
                yield f"sequence {number} has a key, and was abandoned"
            if outcome.header.kind == COMPLETED:
                runs = [one.attempt for one in primaries(history) if one.sequence == number]
                if history.submissions and outcome.header.attempt not in runs:
                    yield f"sequence {number} completed in attempt {outcome.header.attempt}, the engine saw {runs}"
    yield from history.deaths


def _chain(history: History) -> Iterator[str]:
    previous = bytes(32)
    for index, entry in enumerate(history.disk, 1):
        if entry.header.index != index or entry.previous_hash != previous:
            yield f"entry {entry.header.index} stands at {index}, or not behind the one before"
        if entry.entry_hash != entry_hash(entry.previous_hash, entry.header):
            yield f"entry {index} has another hash than its header"
        previous = entry.entry_hash


def _acknowledged(call: Call, disk: Disk, history: History) -> Iterator[str]:
    if call.stamp is None:
        return
    first = call.stamp.first_sequence
    for number in range(first, first + call.stamp.count):
        entry = disk.admitted.get(number)
        if entry is None:
            yield f"{call}: sequence {number} was acknowledged, and is lost"
        elif not history.is_durable(entry, call.acknowledged):
            yield f"{call}: sequence {number} was acknowledged before it was durable"
    for result in call.results:
        outcome = disk.outcomes[result.sequence][:1]
        if not outcome or result_of(outcome[0]) != result:
            yield f"{call}: the result of sequence {result.sequence} was told, and the disk does not have it"
        elif not history.is_durable(outcome[0], call.answered[result.sequence]):
            yield f"{call}: the result of sequence {result.sequence} was told before it was durable"
        yield from (f"{call}: {fault}" for fault in (check_result(result) if result.HasField("output") else ()))
        if call.streamed and result.HasField("output"):
            streamed = call.tokens.get(result.sequence, []), call.texts.get(result.sequence, "")
            whole = list(result.output.token_ids), result.output.text
            # A stream that joins a run which was not streamed gets its end only.
            if streamed != (
                tuple(all_[: len(some)] for all_, some in zip(whole, streamed, strict=True)) if call.repeated else whole
            ):
                yield f"{call}: {streamed} was streamed of sequence {result.sequence}, its answer is {whole}"


def _attempt(one: Submission, entry: Sealed, disk: Disk, history: History) -> Iterator[str]:
    """Same number, one attempt more for every epoch, for a takeover, and for every engine that was lost under it in this
    epoch."""
    least = 1 + one.epoch - entry.header.epoch + (entry.header.writer != WRITER)
    earlier = [
        other
        for other in primaries(history)
        if other.sequence == one.sequence and other.epoch == one.epoch and other.step < one.step
    ]
    if not least <= one.attempt <= least + len(earlier):
        yield f"sequence {one.sequence} ran as attempt {one.attempt} in epoch {one.epoch}, {len(earlier)} runs before"
    if any(other.attempt > one.attempt for other in earlier):
        yield f"sequence {one.sequence} ran as attempt {one.attempt} behind a later one"
    if one.epoch > entry.header.epoch and not disk.given[one.sequence].idempotency_key:
        yield f"sequence {one.sequence} has no key, and ran again in epoch {one.epoch}"


def _body(call: Call) -> bytes:
    request = type(call.request)()
    request.CopyFrom(call.request)
    request.ClearField("request_id")
    return request.SerializeToString(deterministic=True)


def _requests(history: History) -> dict[tuple[str, bytes], bytes]:
    return {(call.key, _body(call)): request_digest(call.request) for call in history.calls}


PROMISES: dict[int, Callable[[History], Iterator[str]]] = {
    1: gapless,
    2: ended_once,
    3: real_time,
    4: submitted_in_order,
    5: fenced,
    6: remembered,
    7: nothing_lost,
}


def broken(history: History) -> dict[int, list[str]]:
    """The promises that were not kept, by number, with what is wrong."""
    found = {number: list(check(history)) for number, check in PROMISES.items()}
    return {number: faults for number, faults in found.items() if faults}
