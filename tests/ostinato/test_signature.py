"""Signed heads: Merkle trees, DSSE envelopes and keys."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from hypothesis import given, settings
from hypothesis import strategies as st

from ostinato.signature import PublicKeys, SignedTree, Tree, envelope, new_key, opened, root_of, signer_of
from ostinato.v1 import types_pb2

LOG_ID = "0123456789abcdef0123456789abcdef"
SIGNER = signer_of(new_key())
SIZES = st.integers(1, 70)


def _hashes(count: int) -> list[bytes]:
    return [hashlib.sha256(bytes([place])).digest() for place in range(count)]


def _mth(leaves: Sequence[bytes]) -> bytes:
    """RFC 9162, section 2.1.1, word for word."""
    if len(leaves) == 1:
        return hashlib.sha256(b"\0" + leaves[0]).digest()
    k = _k(len(leaves))
    return hashlib.sha256(b"\1" + _mth(leaves[:k]) + _mth(leaves[k:])).digest()


def _path(place: int, leaves: Sequence[bytes]) -> list[bytes]:
    """RFC 9162, section 2.1.3.1, word for word."""
    if len(leaves) == 1:
        return []
    k = _k(len(leaves))
    if place < k:
        return [*_path(place, leaves[:k]), _mth(leaves[k:])]
    return [*_path(place - k, leaves[k:]), _mth(leaves[:k])]


def _k(count: int) -> int:
    """The largest power of two below count."""
    return 1 << (count - 1).bit_length() - 1


@settings(deadline=None)
@given(SIZES, st.data())
def test_trees_are_those_of_rfc_9162(count: int, data: st.DataObject) -> None:
    """Root and every path equal the RFC's recursive definitions, and every path leads to the root, from its own place alone."""
    leaves, place = _hashes(count), data.draw(st.integers(0, count - 1))
    tree = Tree(leaves)

    path = tree.path(place)
    assert (tree.root, path) == (_mth(leaves), _path(place, leaves))
    assert [at for at in range(-1, count + 1) if root_of(leaves[place], at, count, path) == tree.root] == [place]


@settings(deadline=None)
@given(SIZES, st.data())
def test_a_changed_path_leads_elsewhere(count: int, data: st.DataObject) -> None:
    """A path that is longer, shorter, swapped, or differs in one bit does not lead to the root; nor does another leaf."""
    leaves, place = _hashes(count), data.draw(st.integers(0, count - 1))
    tree = Tree(leaves)
    path = tree.path(place)
    wrong = [[*path, bytes(32)]]
    if path:
        at = data.draw(st.integers(0, len(path) - 1))
        wrong += [path[:at] + path[at + 1 :], [*path[:at], bytes([path[at][0] ^ 1]) + path[at][1:], *path[at + 1 :]]]
    if len(path) > 1:
        wrong.append([path[1], path[0], *path[2:]])

    assert tree.root not in [root_of(leaves[place], place, count, each) for each in wrong]
    assert root_of(bytes(32), place, count, path) != tree.root


def _head(count: int = 3) -> types_pb2.SignedHead:
    tree = SignedTree()
    tree.sign(LOG_ID, 5, _hashes(count), SIGNER)
    return tree.head


def test_other_tools_read_the_envelope() -> None:
    """A reader written from the DSSE specification alone verifies an envelope, and refuses it with another type or payload."""
    given_ = json.loads(json.dumps(envelope(_head())))

    def verify(payload_type: str, payload: bytes) -> None:
        signed = b" ".join(
            [b"DSSEv1", str(len(payload_type)).encode(), payload_type.encode(), str(len(payload)).encode(), payload]
        )
        key = load_pem_public_key(SIGNER.public_pem.encode())
        assert isinstance(key, Ed25519PublicKey)
        key.verify(base64.b64decode(given_["signatures"][0]["sig"]), signed)

    payload = base64.b64decode(given_["payload"])
    verify(given_["payloadType"], payload)
    assert json.loads(payload) == {
        "log_id": LOG_ID,
        "first_index": "5",
        "last_index": "7",
        "entry_hash": _hashes(3)[-1].hex(),
        "root": _mth(_hashes(3)).hex(),
    }
    for wrong in (("text/plain", payload), (given_["payloadType"], payload.replace(b'"7"', b'"8"'))):
        with pytest.raises(InvalidSignature):
            verify(*wrong)


def test_an_envelope_opens_as_the_head() -> None:
    """What an envelope holds is the head, signature included; a payload in any other form than the signed one is refused."""
    head = _head()
    made = envelope(head)

    assert opened(made) == head
    spaced = json.dumps(json.loads(base64.b64decode(made["payload"]))).encode()
    bad = [
        {**made, "payload": base64.b64encode(spaced).decode()},
        {**made, "payloadType": "text/plain"},
        {**made, "signatures": []},
        {**made, "payload": base64.b64encode(b"[]").decode()},
        {},
    ]
    for each in bad:
        with pytest.raises(ValueError, match=r"payload|envelope|unpack"):
            opened(each)


@pytest.mark.parametrize("field", ["log_id", "first_index", "last_index", "entry_hash", "root", "signature"])
def test_every_field_of_a_head_is_signed(field: str) -> None:
    """A head in which any field was changed does not verify."""
    keys, head = PublicKeys(), _head()
    keys.add(SIGNER.public_pem.encode())
    assert [*keys] == [head.key_id]
    assert keys.verify(head)
    value = getattr(head, field)
    last = bytes([value[-1] ^ 1]) if isinstance(value, bytes) else "0"
    changed = value + 1 if isinstance(value, int) else value[:-1] + last
    setattr(head, field, changed)

    assert not keys.verify(head)


def test_a_file_may_have_several_keys() -> None:
    """All keys of a text are read, in any order."""
    signers = [SIGNER, signer_of(new_key())]
    for each in (signers, signers[::-1]):
        keys = PublicKeys()
        keys.add("".join(signer.public_pem for signer in each).encode())
        assert [*keys] == [signer.key_id for signer in each]


def test_only_public_ed25519_keys_verify() -> None:
    """A private key, a key of another kind, and what is no key are refused by name."""
    for pem, why in ((new_key(), "private key"), (b"x", "no public key"), (_ECDSA, "not an Ed25519 key")):
        with pytest.raises(ValueError, match=why):
            PublicKeys().add(pem)


_ECDSA = b"""-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEaxfR8uEsQkf4vOblY6RA8ncDfYEt
6zOg9KE5RdiYwpZP40Li/hp/m47n60p8D54WK84zV2sxXs7LtkBoN79R9Q==
-----END PUBLIC KEY-----
"""
