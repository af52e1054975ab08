"""From a request to the draft of its ADMITTED entries: what can refuse it before it has a sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ostinato import errors
from ostinato.chain import NONCE_BYTES
from ostinato.digest import request_digest
from ostinato.errors import Violation
from ostinato.requests import RESPONSE_BYTES_METADATA
from ostinato.v1 import engine_pb2, generation_pb2, sequencer_pb2, types_pb2
from serving.hop import text_cost

from sidecar.config import Settings
from sidecar.journal.model import Admission

STAMP_BYTES = 512
"""A GenerateResponse without its results, at worst."""
VERDICT_BYTES = 2048
"""A result's comparison, at worst."""
SIGNED_BYTES = 1024
"""A receipt's signed head and path, at worst."""

FORMAT_BYTES = 64 * 1024
"""A grammar counts as this much text: it takes about as long to compile."""

GRADES = frozenset(types_pb2.Grade.values())
NUL, HAS_NUL = "\0", "must not have a NUL character: databases cannot store it"


def check_key(key: str) -> None:
    """Raises InvalidRequest for a key that no journal can hold."""
    if NUL in key:
        raise errors.invalid("idempotency_key", HAS_NUL)


def check(request: generation_pb2.GenerateRequest, settings: Settings) -> None:
    """What can be checked without an engine. Raises InvalidRequest with every bad field."""
    found = list[Violation]()
    if not request.items:
        found.append(Violation("items", "is empty"))
    elif len(request.items) > settings.batch_items_max:
        found.append(Violation("items", f"has {len(request.items)} items, at most {settings.batch_items_max} are allowed"))
    for field, most in (("idempotency_key", settings.idempotency_key_bytes_max), ("request_id", settings.request_id_bytes_max)):
        size = len(getattr(request, field).encode())
        if size > most:
            found.append(Violation(field, f"has {size} bytes, at most {most} are allowed"))
        if NUL in getattr(request, field):
            found.append(Violation(field, HAS_NUL))
    if request.required_grade not in GRADES:
        found.append(Violation("required_grade", f"{request.required_grade} is no grade"))
    if found:
        raise errors.InvalidRequest(violations=found)


def response_bytes_max(metadata: Iterable[tuple[str, str | bytes]], settings: Settings) -> int:
    """The largest response that this client reads. Raises InvalidRequest if its metadata is not a positive number."""
    for key, value in metadata:
        if key == RESPONSE_BYTES_METADATA:
            text = value if isinstance(value, str) else value.decode("ascii", "replace")
            if not (text.isascii() and text.isdigit()) or len(text) > 20 or int(text) == 0:
                raise errors.invalid(f"metadata.{RESPONSE_BYTES_METADATA}", f"{text[:32]!r} is no positive number")
            return min(int(text), settings.response_bytes_ceiling)
    return settings.max_response_bytes


def check_size(prepared: engine_pb2.PrepareResponse, most: int, *, verify: bool = False, signed: bool = False) -> None:
    """Raises InvalidRequest if the response may be larger than the client reads. `signed`: whether receipts are."""
    each = verify * VERDICT_BYTES + signed * SIGNED_BYTES
    worst = STAMP_BYTES + sum(item.result_bytes + each for item in prepared.items)
    if worst > most:
        what = f"the answer may have {worst} bytes, the client reads {most}: ask for fewer items, tokens or logprobs,"
        raise errors.invalid("items", f"{what} or raise metadata {RESPONSE_BYTES_METADATA}")


def draft(
    request: generation_pb2.GenerateRequest,
    prepared: engine_pb2.PrepareResponse,
    tenant: str,
    random_bytes: Callable[[int], bytes],
) -> Admission:
    """What is appended to the journal. Seeds that were not given are derived there, from the sequence."""
    digest, nonces = request_digest(request), random_bytes(NONCE_BYTES * len(prepared.items))
    shared = sequencer_pb2.AdmittedPayload(
        request_id=request.request_id,
        required_grade=request.required_grade,
        model_digest=prepared.model_digest,
        verify=request.verify,
    )
    items = []
    for place, item in enumerate(prepared.items):
        items.append(payload := sequencer_pb2.AdmittedPayload())
        payload.CopyFrom(shared)
        payload.token_ids.extend(item.token_ids)
        payload.parameters.CopyFrom(item.parameters)
        payload.seed, payload.seed_derived = item.seed, not item.HasField("seed")
        payload.nonce = nonces[NONCE_BYTES * place : NONCE_BYTES * (place + 1)]
    return Admission(tuple(items), digest, request.idempotency_key, tenant)


def prepare_cost(request: engine_pb2.PrepareRequest) -> int:
    """In bytes of text, for a TurnQueue."""
    parameters = (request.parameters, *(item.parameters for item in request.items))
    formats = {each.response_format.SerializeToString() for each in parameters if each.HasField("response_format")}
    return text_cost(request) + FORMAT_BYTES * len(formats)
