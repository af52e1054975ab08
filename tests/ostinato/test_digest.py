"""The digests against docs/protocol.md, implemented here a second time, and against their properties."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from base64 import b64decode
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor as Field
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ostinato import chain, digest
from ostinato.digest import f64, i64, u64
from ostinato.v1 import generation_pb2, types_pb2

Given = Mapping[str, Any]
"""A message in protobuf's JSON mapping: 64-bit numbers are text, unset fields are missing."""

VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_text())["vectors"]


# The specification, read without the code that it specifies.


def number(value: object) -> bytes:
    named = {
        name: enum.number
        for kind in (types_pb2.Grade, types_pb2.FinishReason, types_pb2.EntryKind, types_pb2.Parse)
        for name, enum in kind.DESCRIPTOR.values_by_name.items()
    }
    return struct.pack(">Q", named.get(value, int(value) if value not in named else 0) % 2**64)  # type: ignore[call-overload]


def real(value: object) -> bytes:
    as_float = float(value)  # type: ignore[arg-type]
    return b"\xff" * 8 if math.isnan(as_float) else struct.pack(">d", as_float or 0.0)


def string(value: object) -> bytes:
    data = value if isinstance(value, bytes) else str(value).encode()
    return struct.pack(">Q", len(data)) + data


def many(write: Callable[[Any], bytes]) -> Callable[[Iterable[Any]], bytes]:
    return lambda values: struct.pack(">Q", len(list(values))) + b"".join(write(value) for value in values)


def perhaps(message: Given, field: str, write: Callable[[Any], bytes]) -> bytes:
    return b"\1" + write(message[field]) if field in message else b"\0"


WRITERS: Mapping[str, tuple[Callable[[Any], bytes], object]] = {
    "n": (number, 0),
    "r": (real, 0),
    "s": (string, ""),
    "N": (many(number), []),
    "S": (many(string), []),
}
"""By kind: numbers, reals, strings, lists of numbers and of strings; each with its default."""


def layout(message: Given, *fields: str) -> bytes:
    """The fields in this order. `name:kind`: always there; `name?kind`: after a byte that says whether it is set."""
    parts = []
    for field in " ".join(fields).split():
        name, kind = field[:-2], field[-1]
        write, default = WRITERS[kind]
        parts.append(perhaps(message, name, write) if field[-2] == "?" else write(message.get(name, default)))
    return b"".join(parts)


def call(one: Given) -> bytes:
    return layout(one, "id:s name:s arguments:s")


def sha(name: str, *parts: bytes) -> bytes:
    return hashlib.sha256(b"ostinato/" + name.encode() + b"/v1\0" + b"".join(parts)).digest()


def response_format(message: Given) -> bytes:
    for tag, field in ((1, "jsonSchema"), (2, "regex"), (3, "ebnf"), (4, "structuralTag")):
        if field in message:
            return number(tag) + string(message[field])
    return number(0)


def parameters(p: Given) -> bytes:
    return (
        layout(p, "seed?n temperature?r topK?n topP?r minP?r repetitionPenalty?r maxNewTokens?n minNewTokens?n")
        + layout(p, "stop:S stopTokenIds:N badWords:S ignoreEos?n logprobs?n")
        + perhaps(p, "responseFormat", response_format)
        + extended(p, "includeStop?n skipSpecialTokens?n parse:N")
    )


def extended(message: Given, fields: str) -> bytes:
    """Fields that came later: nothing if none of them is set."""
    return b"\2" + layout(message, fields) if {field[:-2] for field in fields.split()} & message.keys() else b""


def chat(message: Given) -> bytes:
    def turn(turn: Given) -> bytes:
        return layout(turn, "role:s content:s")

    def long_turn(message: Given) -> bytes:
        called = many(call)(message.get("toolCalls", []))
        return turn(message) + layout(message, "parts:S name:s toolCallId:s") + called + layout(message, "reasoning:s")

    turns = message.get("messages", [])
    if message.keys() <= {"messages"} and all(each.keys() <= {"role", "content"} for each in turns):
        return b"\1" + many(turn)(turns)
    others = "tools:s templateKwargs:s addGenerationPrompt?n continueFinalMessage:n allowControlTokens:n"
    return b"\2" + many(long_turn)(turns) + layout(message, others)


def prompt(message: Given) -> bytes:
    return (
        perhaps(message, "text", string)
        + perhaps(message, "tokenIds", lambda ids: many(number)(ids.get("ids", [])))
        + (chat(message["chat"]) if "chat" in message else b"\0")
        + perhaps(message, "parameters", parameters)
    )


def request(message: Given) -> bytes:
    return sha(
        "request",
        many(prompt)(message.get("items", [])),
        perhaps(message, "parameters", parameters),
        number(message.get("requiredGrade", 0)),
        number(message.get("verify", False)),
    )


def resolved(p: Given) -> bytes:
    return (
        layout(p, "temperature:r topK:n topP:r minP:r repetitionPenalty:r maxNewTokens:n minNewTokens:n")
        + layout(p, "stop:S stopTokenIds:N badTokenIds:N ignoreEos:n logprobs?n")
        + perhaps(p, "responseFormat", response_format)
        + extended(p, "includeStop:n keepSpecialTokens:n parse:N")
    )


def item_input(message: Given) -> bytes:
    return sha("input", many(number)(message["tokenIds"]), resolved(message["parameters"]), number(message["seed"]))


def unseeded_input(message: Given) -> bytes:
    return sha("unseeded-input", many(number)(message["tokenIds"]), resolved(message["parameters"]))


def output(message: Given) -> bytes:
    return sha("output", layout(message, "tokenIds:N finishReason:n matchedStop:s"))


def logprobs(message: Given) -> bytes:
    def position(one: Given) -> bytes:
        return layout(one, "logprob:r") + many(lambda top: layout(top, "tokenId:n logprob:r"))(one.get("top", []))

    positions = message.get("logprobs", [])
    return sha("logprobs", many(position)(positions)) if positions else b""


def fingerprint(fields: Given) -> bytes:
    ordered = sorted(fields.items(), key=lambda field: field[0].encode())
    return sha("fingerprint", many(lambda field: string(field[0]) + string(field[1]))(ordered))


def model(fields: Given) -> bytes:
    return sha("model", *(string(fields.get(name, "")) for name in ("model", "weights", "tokenizer", "template")))


def derived_seed(message: Given, name: str = "seed") -> int:
    return int.from_bytes(sha(name, string(message["logId"]), number(message["sequence"]))[:8], "big")


def output_text(message: Given) -> bytes:
    def parsed(one: Given) -> bytes:
        return layout(one, "content:s reasoning:s") + many(call)(one.get("toolCalls", [])) + layout(one, "fault:s")

    return sha("text", layout(message, "text:s"), perhaps(message, "parsed", parsed))


def sealed(message: Given, name: str) -> bytes:
    return sha(name, bytes.fromhex(message["nonce"]), bytes.fromhex(message["digest"]))


def entry(message: Given) -> bytes:
    header = dict(message["header"])
    header |= {name: b64decode(value) for name, value in header.items() if name.endswith("Digest")}
    return sha(
        "sealed-entry" if "form" in header else "entry",
        bytes.fromhex(message["previousHash"]),
        layout(header, "index:n kind:n logId:s writer:s"),
        layout(header, "epoch:n sequence:n firstSequence:n count:n attempt:n timeUnixMillis:n seed:n grade:n"),
        layout(header, "inputDigest:s outputDigest:s logprobsDigest:s fingerprintDigest:s payloadDigest:s"),
        layout(header, "form:n textDigest:s") if "form" in header else b"",
    )


BY_HAND: Mapping[str, Callable[[Given], bytes | int]] = {
    "request": request,
    "input": item_input,
    "unseeded-input": unseeded_input,
    "output": output,
    "logprobs": logprobs,
    "fingerprint": fingerprint,
    "model": model,
    "seed": derived_seed,
    "audit": partial(derived_seed, name="audit"),
    "text": output_text,
    **{name: partial(sealed, name=name) for name in ("sealed-input", "sealed-output", "sealed-logprobs", "sealed-text")},
    "entry": entry,
    "sealed-entry": entry,
}


def by_code(name: str, message: Given) -> bytes | int:
    """The product's digest of a vector."""
    match name:
        case "request":
            return digest.request_digest(ParseDict(dict(message), generation_pb2.GenerateRequest()))
        case "input" | "unseeded-input":
            given = message["tokenIds"], ParseDict(message["parameters"], types_pb2.ResolvedParameters())
            return (
                digest.input_digest(*given, int(message["seed"])) if name == "input" else digest.unseeded_input_digest(*given)
            )
        case "output" | "logprobs" | "text":
            digest_of = {"output": digest.output_digest, "logprobs": digest.logprobs_digest, "text": digest.text_digest}
            return digest_of[name](ParseDict(dict(message), types_pb2.Output()))
        case "fingerprint":
            return digest.fingerprint_digest(message)
        case "model":
            return digest.model_digest(message)
        case "audit" | "seed":
            return digest.sampling_hash(name, message["logId"], int(message["sequence"]))
        case "entry" | "sealed-entry":
            header = ParseDict(message["header"], types_pb2.EntryHeader())
            return chain.entry_hash(bytes.fromhex(message["previousHash"]), header)
        case _:
            bare = bytes.fromhex(message["digest"])
            return chain.sealed(chain.FORM, bytes.fromhex(message["nonce"]), name.removeprefix("sealed-"), bare)


def expected(vector: Given) -> bytes | int:
    return int(vector["expected"]) if vector["digest"] in ("seed", "audit") else bytes.fromhex(vector["expected"])


each_vector = pytest.mark.parametrize("vector", [pytest.param(v, id=f"{v['digest']}: {v['name']}") for v in VECTORS])


@each_vector
def test_vector(vector: Given) -> None:
    """The product's digest of every vector is the expected one."""
    assert by_code(vector["digest"], vector["given"]) == expected(vector)


@each_vector
def test_vector_by_hand(vector: Given) -> None:
    """The independent implementation gives the expected digest of every vector."""
    assert BY_HAND[vector["digest"]](vector["given"]) == expected(vector)


def test_every_digest_has_a_vector() -> None:
    """Every digest has a vector, and vectors of one digest differ unless they are marked as equal."""
    assert {vector["digest"] for vector in VECTORS} == set(BY_HAND)
    digests = [(vector["digest"], vector["expected"]) for vector in VECTORS]
    same = [vector["name"] for vector, digest_ in zip(VECTORS, digests, strict=True) if digests.count(digest_) > 1]
    assert same == [
        "one prompt", "request_id and idempotency_key count for nothing", "temperature 0.0", "temperature -0.0 is 0.0",
    ]  # fmt: skip


# What the digests promise.


def scalars(field: Any) -> st.SearchStrategy[object]:
    match field.type:
        case Field.TYPE_STRING:
            return st.text(max_size=4)
        case Field.TYPE_BOOL:
            return st.booleans()
        case Field.TYPE_DOUBLE:
            return st.floats()
        case Field.TYPE_UINT64:
            return st.integers(0, 2**64 - 1)
        case Field.TYPE_UINT32:
            return st.integers(0, 2**32 - 1)
        case Field.TYPE_INT32 | Field.TYPE_ENUM:
            return st.integers(-(2**31), 2**31 - 1)
        case Field.TYPE_BYTES:
            return st.binary(max_size=4)
        case other:
            raise AssertionError(other)


@st.composite
def messages(draw: st.DrawFn, empty: Message) -> Message:
    """Any message of this type, each field set or not."""
    for field in empty.DESCRIPTOR.fields:
        if not draw(st.booleans()):
            continue
        if field.message_type is not None and field.is_repeated:
            for _ in range(draw(st.integers(0, 3))):
                draw(messages(getattr(empty, field.name).add()))
        elif field.message_type is not None:
            getattr(empty, field.name).SetInParent()
            draw(messages(getattr(empty, field.name)))
        elif field.is_repeated:
            getattr(empty, field.name).extend(draw(st.lists(scalars(field), max_size=3)))
        else:
            setattr(empty, field.name, draw(scalars(field)))
    return empty


requests = st.builds(generation_pb2.GenerateRequest).flatmap(messages)


def places(message: Message, path: str = "") -> Iterable[tuple[Message, Any, str]]:
    """All fields of a message and its submessages, set or not, with their paths."""
    for field in message.DESCRIPTOR.fields:
        yield message, field, f"{path}.{field.name}"
        if field.message_type is not None and field.is_repeated:
            for position, child in enumerate(getattr(message, field.name)):
                yield from places(child, f"{path}.{field.name}[{position}]")
        elif field.message_type is not None and message.HasField(field.name):
            yield from places(getattr(message, field.name), f"{path}.{field.name}")


def change(data: st.DataObject, message: Message, field: Any) -> None:
    """Changes a field: another value, one element more or less, or unset."""
    value = getattr(message, field.name)
    if field.is_repeated:
        if value and data.draw(st.booleans()):
            del value[data.draw(st.integers(0, len(value) - 1))]
        elif field.message_type is not None:
            value.add()
        else:
            value.append(data.draw(scalars(field)))
    elif field.message_type is not None:
        if message.HasField(field.name):
            message.ClearField(field.name)
        else:
            value.SetInParent()
    elif field.has_presence and message.HasField(field.name) and data.draw(st.booleans()):
        message.ClearField(field.name)
    else:
        setattr(message, field.name, data.draw(scalars(field)))


def equal(one: Message, other: Message) -> bool:
    """Whether they are equal; NaN equals NaN, and -0.0 equals 0.0."""
    texts = [message.SerializeToString(deterministic=True) for message in (one, other)]
    if texts[0] == texts[1]:
        return True
    ours, theirs = list(places(one)), list(places(other))
    if [path for _, _, path in ours] != [path for _, _, path in theirs]:
        return False
    for (left, field, _), (right, _, _) in zip(ours, theirs, strict=True):
        if field.message_type is not None:
            continue
        if field.has_presence and left.HasField(field.name) != right.HasField(field.name):
            return False
        values = getattr(left, field.name), getattr(right, field.name)
        if values[0] != values[1] and not all(isinstance(value, float) and math.isnan(value) for value in values):
            return False
    return True


@settings(deadline=None)
@given(requests, st.data())
def test_request_digest_sees_every_field(request: generation_pb2.GenerateRequest, data: st.DataObject) -> None:
    """A change of any field changes the digest, except request_id and idempotency_key."""
    other = generation_pb2.GenerateRequest()
    other.CopyFrom(request)
    message, field, path = data.draw(st.sampled_from(list(places(other))))
    change(data, message, field)
    assume(not equal(request, other))

    ignored = path in {".request_id", ".idempotency_key"}
    assert (digest.request_digest(request) == digest.request_digest(other)) == ignored, path


@settings(deadline=None)
@given(requests)
def test_request_digest_survives_the_wire(request: generation_pb2.GenerateRequest) -> None:
    """A message has the same digest after serialisation and parsing."""
    received = generation_pb2.GenerateRequest.FromString(request.SerializeToString())
    assert digest.request_digest(received) == digest.request_digest(request)


@settings(deadline=None)
@given(requests, st.binary(min_size=1, max_size=8))
def test_unknown_fields_are_ignored(request: generation_pb2.GenerateRequest, value: bytes) -> None:
    """Unknown fields do not change a digest."""
    unknown = bytes([0xFA, 0x7F, len(value)]) + value  # field 2047, length-delimited
    received = generation_pb2.GenerateRequest.FromString(request.SerializeToString() + unknown)
    assert digest.request_digest(received) == digest.request_digest(request)


@settings(deadline=None)
@given(st.lists(st.builds(types_pb2.ResolvedParameters).flatmap(messages), min_size=2, max_size=2), st.data())
def test_input_digest_sees_every_parameter(pair: list[types_pb2.ResolvedParameters], data: st.DataObject) -> None:
    """Two inputs have equal digests only if tokens, parameters and seed are equal."""
    ids = data.draw(st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=3), min_size=2, max_size=2))
    seeds = data.draw(st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=2))
    alike = ids[0] == ids[1] and equal(pair[0], pair[1])
    digests = [digest.input_digest(*given) for given in zip(ids, pair, seeds, strict=True)]
    unseeded = [digest.unseeded_input_digest(*given) for given in zip(ids, pair, strict=True)]

    assert (unseeded[0] == unseeded[1]) == alike
    assert (digests[0] == digests[1]) == (alike and seeds[0] == seeds[1])


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=3), st.text(max_size=3)), st.randoms())
def test_fingerprint_digest_has_no_order(fields: dict[str, str], random: Any) -> None:
    """The fingerprint digest does not depend on the order of the fields, but on their names and values."""
    shuffled = list(fields.items())
    random.shuffle(shuffled)

    assert digest.fingerprint_digest(dict(shuffled)) == digest.fingerprint_digest(fields)
    assert digest.fingerprint_digest({**fields, "one more": ""}) != digest.fingerprint_digest(fields)


def test_what_came_from_a_cache_is_in_no_digest() -> None:
    """The output digest does not cover cached_tokens, which depend on earlier runs."""
    cold = types_pb2.Output(token_ids=[1, 2], logprobs=[types_pb2.TokenLogprobs(logprob=-1.5)], prompt_tokens=130)
    cached = types_pb2.Output()
    cached.CopyFrom(cold)
    cached.cached_tokens = 128

    assert cold != cached
    for digest_of in (digest.output_digest, digest.logprobs_digest):
        assert digest_of(cold) == digest_of(cached)


def test_encodings_at_their_edges() -> None:
    """Numbers out of range raise an error, and equal values have one encoding."""
    assert u64(2**64 - 1) == i64(-1) == b"\xff" * 8
    assert f64(-0.0) == f64(0.0) == bytes(8)
    assert f64(math.nan) == f64(-math.nan) != f64(math.inf)
    for write, value in ((u64, -1), (u64, 2**64), (i64, 2**63)):
        with pytest.raises(struct.error):
            write(value)


@pytest.mark.parametrize("name", ["audit", "seed"])
def test_sampling_is_uniform(name: str) -> None:
    """Sampling hashes of 64,000 items are uniform over 64 classes: chi-square with 63 degrees of freedom is below 120."""
    classes = Counter(digest.sampling_hash(name, "0123456789abcdef" * 2, sequence) >> 58 for sequence in range(1, 64_001))

    assert sum((classes[each] - 1000) ** 2 / 1000 for each in range(64)) < 120


def test_samples_are_independent() -> None:
    """Samples with different names are independent: 1 of 20 in each is 1 of 400 in both."""
    items = [sequence for sequence in range(1, 200_001) if digest.is_sampled("audit", "a" * 32, sequence, 0.05)]
    both = [sequence for sequence in items if digest.is_sampled("seed", "a" * 32, sequence, 0.05)]

    assert 9_500 < len(items) < 10_500
    assert 400 < len(both) < 600


@given(st.integers(0, 2**64 - 1), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_share_holds_a_smaller_one(sequence: int, rate: float, other: float) -> None:
    """A rate of 1 selects all items, 0 none, and a larger rate all items of a smaller one."""
    less, more = sorted((rate, other))

    assert digest.is_sampled("audit", "a" * 32, sequence, 1.0)
    assert not digest.is_sampled("audit", "a" * 32, sequence, 0.0)
    assert digest.is_sampled("audit", "a" * 32, sequence, less) <= digest.is_sampled("audit", "a" * 32, sequence, more)
