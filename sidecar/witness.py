"""Witnesses: signed heads of this log that are kept elsewhere, and heads of other logs that this one keeps.

A head that is kept where this sidecar's operator cannot change it shows later that the log has not been cut, and has one
history. A witness that cannot be reached stops nothing: the newest head goes out when it is there again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import ssl
from collections.abc import Awaitable, Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import ostinato
from ostinato import errors
from ostinato.client import bearer
from ostinato.signature import PublicKeys, envelope, head_fault, statement
from ostinato.v1 import sequencer_pb2, types_pb2
from serving import files, program
from serving.files import Source

from sidecar.config import Settings
from sidecar.journal.model import WITNESSED, JournalBroken, Witnessed
from sidecar.journal.writer import Journal
from sidecar.observe import Observer

log = logging.getLogger(__name__)

PUBLISH_SECONDS = 10.0
"""For one attempt."""
RETRY_SECONDS, RETRY_SECONDS_MAX = 1.0, 60.0
"""The first and the longest pause after a failure; it doubles."""
HEADER_BYTES_MAX = 1 << 14
"""Of the answer of a witness that is a URL."""
STATUS = re.compile(rb"HTTP/1\.[01] ([0-9]{3})\b")
LOG_ID = re.compile(r"[0-9a-f]{32}")

Publish = Callable[[types_pb2.SignedHead], Awaitable[object]]


# ---- heads of this log


class Publisher:
    """Gives signed heads to the witness: one as soon as there are `witness_entries` new entries, or new ones for
    `witness_seconds`."""

    def __init__(self, settings: Settings, journal: Journal, observer: Observer) -> None:
        """Raises StartupError for settings that cannot be used."""
        self._journal, self._observer = journal, observer
        self._entries, self._seconds = settings.witness_entries, settings.witness_seconds
        self._client = _client(settings) if settings.witness_is_log else None
        self._publish = self._client.witness if self._client is not None else _publish(settings)
        self._index = 0
        """Of the newest head that the witness has, as far as this process knows."""

    async def run(self) -> None:
        """Until it is cancelled."""
        pause_seconds = 0.0
        async with self._client or nullcontext():
            while True:
                await self._journal.wait(self._index + 1)
                self._observer.witness_behind()
                if self._index and not pause_seconds:
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._journal.wait(self._index + self._entries), self._seconds)
                published = await self._publish_newest()
                pause_seconds = 0.0 if published else min(max(RETRY_SECONDS, 2 * pause_seconds), RETRY_SECONDS_MAX)
                await asyncio.sleep(pause_seconds)

    async def _publish_newest(self) -> bool:
        """Whether the witness has a newer head now."""
        try:
            head = await self._journal.newest_signed()
            if head is None or head.last_index <= self._index:  # another sidecar of this log has no key
                return False
            await asyncio.wait_for(self._publish(head), PUBLISH_SECONDS)
        except JournalBroken:
            raise
        except Exception as error:  # noqa: BLE001  # whatever a witness does, the door serves
            self._observer.witness_failed(error)
            return False
        self._index = head.last_index
        self._observer.witnessed(head.last_index)
        return True


def _client(settings: Settings) -> ostinato.Client:
    """Of a witness that is another sidecar."""
    with program.configuring("--witness"):
        credentials = ostinato.tls(settings.witness_ca) if settings.witness_ca is not None else None
        return ostinato.Client(settings.witness, credentials=credentials, token=_token(settings.witness_token))


def _publish(settings: Settings) -> Publish:
    """To a witness that is a URL or a file."""
    witness, token = settings.witness, _token(settings.witness_token)
    if not witness.startswith(("http://", "https://")):
        return lambda head: asyncio.to_thread(_append, Path(witness), envelope(head))
    try:
        context = ssl.create_default_context(cafile=settings.witness_ca) if witness.startswith("https://") else None
    except OSError as error:
        why = f"--witness-ca: {settings.witness_ca}: {error.strerror or error}"
        raise program.StartupError(why, exit_code=program.BAD_CONFIGURATION) from error
    return lambda head: _post(witness, envelope(head), token, context)


def _token(path: Path | None) -> str | None:
    if path is None:
        return None
    with program.configuring(f"--witness-token: {path}"):
        token = Source("--witness-token", path, private=True).read().decode("ascii").strip()
        bearer(token)
        return token


async def _post(url: str, given: Mapping[str, object], token: str | None, context: ssl.SSLContext | None) -> None:
    """Raises OSError, EOFError or ValueError for any answer but success. A redirect is none: the token would go elsewhere.

    Nothing here waits in a thread, so a cancellation ends it, whatever the witness does. The answer's body is not read.
    """
    parts, body = urlsplit(url), json.dumps(given).encode()
    head = [
        f"POST {urlunsplit(('', '', parts.path or '/', parts.query, ''))} HTTP/1.1",
        f"Host: {parts.netloc}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
        *([f"Authorization: {bearer(token)}"] if token is not None else []),
    ]
    port = parts.port or (80 if context is None else 443)
    reader, writer = await asyncio.open_connection(parts.hostname, port, ssl=context, limit=HEADER_BYTES_MAX)
    try:
        writer.write("\r\n".join([*head, "", ""]).encode("ascii") + body)
        answer = STATUS.match(await reader.readuntil(b"\r\n\r\n"))
        if answer is None:
            raise ValueError("the answer is not HTTP")
        if not answer[1].startswith(b"2"):
            raise OSError(f"HTTP status {answer[1].decode()}")
    finally:
        writer.transport.abort()


def _append(path: Path, given: Mapping[str, object]) -> None:
    """A line at the file's end. Durable on return."""
    with os.fdopen(files.opened(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), "rb+", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        torn = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"  # a line that a crash has cut ends here
        file.write(b"\n" * torn + json.dumps(given).encode() + b"\n")
        os.fsync(file.fileno())
    if not size:
        files.sync_folder(path.parent)


# ---- heads of other logs


class Witness:
    """Records the heads of other logs in this one."""

    def __init__(self, path: Path, journal: Journal, observer: Observer) -> None:
        """`path`: lines of a log's id and a public key of it. Raises StartupError."""
        self._journal, self._observer = journal, observer
        with program.configuring(f"--witness-keys: {path}"):
            self._keys = _keys(Source("--witness-keys", path).read().decode())

    async def record(self, head: types_pb2.SignedHead) -> sequencer_pb2.WitnessResponse:
        """Durable on return; a head that is recorded already has its entry. Raises InvalidRequest that names the field."""
        if fault := head_fault(head):
            raise errors.invalid("head", fault)
        keys = self._keys.get(head.log_id)
        if keys is None:
            raise errors.invalid("head.log_id", "this sidecar has no key of this log")
        if head.key_id not in keys:
            raise errors.invalid("head.key_id", "is no key that this sidecar has of this log")
        if not keys.verify(head):
            raise errors.invalid("head.signature", "is not by this key")
        appended = await self._journal.append(Witnessed(head))
        if appended.entries:
            [entry] = appended.entries
            return sequencer_pb2.WitnessResponse(header=entry.header, entry_hash=entry.entry_hash)
        [note] = (await self._journal.notes(WITNESSED + head.log_id)).values()
        recorded = sequencer_pb2.Entry.FromString(note)
        newest = sequencer_pb2.WitnessedPayload.FromString(recorded.payload).head
        if head.last_index < newest.first_index:
            raise errors.invalid("head.last_index", f"is older than entry {newest.first_index}, which is recorded")
        if statement(head) != statement(newest):
            self._observer.forked(head)
            field = "entry_hash" if head.last_index == newest.last_index and head.entry_hash != newest.entry_hash else "root"
            why = f"another head of entries {newest.first_index} to {newest.last_index} is recorded: the log has two histories"
            raise errors.invalid(f"head.{field}", why)
        return sequencer_pb2.WitnessResponse(header=recorded.header, entry_hash=recorded.entry_hash)


def _keys(text: str) -> dict[str, PublicKeys]:
    """ValueError: a line is not one of log and key."""
    keys = dict[str, PublicKeys]()
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        log_id, key, *_ = [*line.split(), "", ""]
        if not LOG_ID.fullmatch(log_id):
            raise ValueError(f"line {number}: begins with no log id, 32 hexadecimal digits")
        try:
            keys.setdefault(log_id, PublicKeys()).add(f"-----BEGIN PUBLIC KEY-----\n{key}\n-----END PUBLIC KEY-----\n".encode())
        except ValueError as error:
            raise ValueError(f"line {number}: the key {error}: write the line between BEGIN and END of its PEM file") from None
    return keys
