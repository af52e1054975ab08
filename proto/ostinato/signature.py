"""Signed heads: what a log signs, how it is signed, and how anyone verifies it.

Each transaction of a journal is signed once. The entry hashes of its entries are the leaves of a Merkle tree (RFC 9162), and a
signed head names the tree's root and the newest entry. A receipt has the head and the path from its entry to the root.

The signature is Ed25519 over a DSSE statement (Dead Simple Signing Envelope, version 1): JSON with sorted keys and no spaces,
numbers as decimal strings, hashes in hexadecimal digits. Making and verifying signatures needs the package `cryptography`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ostinato import install_hint
from ostinato.digest import DIGEST_BYTES
from ostinato.v1 import types_pb2

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

PAYLOAD_TYPE = "application/vnd.ostinato.head.v1+json"
_PEM = re.compile(rb"-----BEGIN [^-]*-----.*?-----END [^-]*-----", re.DOTALL)
_FIELDS = frozenset({"entry_hash", "first_index", "last_index", "log_id", "root"})


# ---- Merkle trees (RFC 9162, section 2.1)


class Tree:
    """The Merkle tree over some entry hashes; at least one."""

    def __init__(self, entry_hashes: Iterable[bytes]) -> None:
        row = [_leaf(each) for each in entry_hashes]
        self._rows = [row]
        while len(row) > 1:
            pairs = [_node(row[place], row[place + 1]) for place in range(0, len(row) - 1, 2)]
            row = pairs + row[2 * len(pairs) :]  # an odd last one goes up as it is
            self._rows.append(row)
        [self.root] = row

    def path(self, place: int) -> list[bytes]:
        """The inclusion path of the leaf at this place, from its sibling upwards."""
        path = []
        for row in self._rows[:-1]:
            if (sibling := place ^ 1) < len(row):
                path.append(row[sibling])
            place >>= 1
        return path


def root_of(entry_hash: bytes, place: int, count: int, path: Sequence[bytes]) -> bytes | None:
    """The root to which a path leads from the leaf at this place among `count` leaves; None: no path of such a tree."""
    last, node = count - 1, _leaf(entry_hash)
    if not 0 <= place <= last:
        return None
    for sibling in path:
        if last == 0:
            return None
        if place & 1 or place == last:
            node = _node(sibling, node)
            while not place & 1 and place:
                place, last = place >> 1, last >> 1
        else:
            node = _node(node, sibling)
        place, last = place >> 1, last >> 1
    return node if last == 0 else None


def _leaf(entry_hash: bytes) -> bytes:
    return hashlib.sha256(b"\x00" + entry_hash).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


# ---- statements and signatures


@dataclass(frozen=True, slots=True)
class Signer:
    """A signing key."""

    key_id: str
    sign: Callable[[bytes], bytes]
    """An Ed25519 signature, 64 bytes."""
    public_pem: str


class SignedTree:
    """The entries of one transaction, with their signed head once it is known."""

    def __init__(self) -> None:
        self.head = types_pb2.SignedHead()
        self._tree: Tree | None = None

    def sign(self, log_id: str, first_index: int, entry_hashes: Sequence[bytes], signer: Signer) -> None:
        """Sign these consecutive entries."""
        self.restore(log_id, first_index, entry_hashes, signer.key_id, b"")
        self.head.signature = signer.sign(pae(statement(self.head)))

    def restore(self, log_id: str, first_index: int, entry_hashes: Sequence[bytes], key_id: str, signature: bytes) -> None:
        """These consecutive entries have been signed before."""
        self._tree = Tree(entry_hashes)
        self.head = types_pb2.SignedHead(
            log_id=log_id,
            first_index=first_index,
            last_index=first_index + len(entry_hashes) - 1,
            entry_hash=entry_hashes[-1],
            root=self._tree.root,
            key_id=key_id,
            signature=signature,
        )

    def put_into(self, receipt: types_pb2.Receipt) -> None:
        """The head, and the path of the receipt's entry."""
        assert self._tree is not None, "receipts are made after the transaction"
        receipt.head.CopyFrom(self.head)
        receipt.path.extend(self._tree.path(receipt.header.index - self.head.first_index))


def statement(head: types_pb2.SignedHead) -> bytes:
    """What is signed."""
    told = {
        "entry_hash": head.entry_hash.hex(),
        "first_index": str(head.first_index),
        "last_index": str(head.last_index),
        "log_id": head.log_id,
        "root": head.root.hex(),
    }
    return json.dumps(told, sort_keys=True, separators=(",", ":")).encode()


def pae(payload: bytes) -> bytes:
    """DSSE's encoding of type and payload, which the signature is made over."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)


def envelope(head: types_pb2.SignedHead) -> dict[str, Any]:
    """The DSSE envelope, as JSON."""
    signature = {"keyid": head.key_id, "sig": base64.b64encode(head.signature).decode()}
    payload = base64.b64encode(statement(head)).decode()
    return {"payload": payload, "payloadType": PAYLOAD_TYPE, "signatures": [signature]}


def opened(given: dict[str, Any]) -> types_pb2.SignedHead:
    """The head in a DSSE envelope with one signature, which is not verified. ValueError: it is none."""
    try:
        if given["payloadType"] != PAYLOAD_TYPE:
            raise ValueError(f"payloadType: is not {PAYLOAD_TYPE}")
        payload, [signature] = base64.b64decode(given["payload"], validate=True), given["signatures"]
        told = json.loads(payload)
        head = types_pb2.SignedHead(
            log_id=told["log_id"],
            first_index=int(told["first_index"]),
            last_index=int(told["last_index"]),
            entry_hash=bytes.fromhex(told["entry_hash"]),
            root=bytes.fromhex(told["root"]),
            key_id=signature["keyid"],
            signature=base64.b64decode(signature["sig"], validate=True),
        )
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"not a DSSE envelope of a signed head: {type(error).__name__}") from None
    if statement(head) != payload:
        raise ValueError("payload: is not in the form in which a head is signed")
    return head


def head_fault(head: types_pb2.SignedHead) -> str:
    """What no signed head can be; empty: nothing."""
    if not 1 <= head.first_index <= head.last_index:
        return "first_index, last_index: are no range of entries"
    if not len(head.entry_hash) == len(head.root) == DIGEST_BYTES:
        return f"entry_hash, root: must have {DIGEST_BYTES} bytes"
    if head.first_index == head.last_index and head.root != _leaf(head.entry_hash):
        return "root: is not that of the one entry"
    return ""


def inclusion_fault(receipt: types_pb2.Receipt) -> str:
    """Why the receipt's head does not cover its entry; empty: it does. Its signature is not verified."""
    header, head = receipt.header, receipt.head
    if fault := head_fault(head):
        return f"head.{fault}"
    if header.log_id != head.log_id:
        return "head.log_id: is another log"
    if not head.first_index <= header.index <= head.last_index:
        return "head: does not cover this index"
    if header.index == head.last_index and receipt.entry_hash != head.entry_hash:
        return "head.entry_hash: is another entry of this index"
    count = head.last_index - head.first_index + 1
    if root_of(receipt.entry_hash, header.index - head.first_index, count, receipt.path) != head.root:
        return "path: does not lead to head.root"
    return ""


# ---- keys


class PublicKeys(dict[str, "Ed25519PublicKey"]):
    """Public keys by their ids."""

    def add(self, pem: bytes) -> None:
        """All keys in the text. ValueError: one is no public key that can be used, or there is none. ImportError:
        `cryptography` is not installed."""
        try:
            from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
            from cryptography.hazmat.primitives.serialization import load_pem_public_key
        except ImportError as error:
            raise ImportError(f"signatures need the package cryptography: {install_hint('verify')}") from error

        if b"PRIVATE KEY" in pem:
            raise ValueError("is a private key: give the public one")
        for block in _PEM.findall(pem) or [pem]:
            try:
                key = load_pem_public_key(block)
            except ValueError:
                raise ValueError("holds no public key in PEM form") from None
            if not isinstance(key, Ed25519PublicKey):
                raise ValueError("is not an Ed25519 key")
            self[key_id(key.public_bytes_raw())] = key

    def verify(self, head: types_pb2.SignedHead) -> bool:
        """Whether the key with the head's key id, which must be among these, has signed it."""
        from cryptography.exceptions import InvalidSignature

        try:
            self[head.key_id].verify(head.signature, pae(statement(head)))
        except InvalidSignature:
            return False
        return True


def key_id(public_key: bytes) -> str:
    """Of a raw public key, 32 bytes."""
    return hashlib.sha256(public_key).digest()[:8].hex()


def new_key() -> bytes:
    """A signing key: PEM, PKCS8, not encrypted."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    return Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def signer_of(pem: bytes) -> Signer:
    """ValueError: it is no key that can sign."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

    try:
        key = load_pem_private_key(pem, password=None)
    except TypeError:
        raise ValueError("the key is encrypted; a program has no one to ask for its password") from None
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError("holds no private key in PEM form") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError("is not an Ed25519 key")
    public = key.public_key()
    public_pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    return Signer(key_id(public.public_bytes_raw()), key.sign, public_pem)
