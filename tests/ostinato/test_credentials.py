"""What a client is told of bad credentials before it connects."""

from __future__ import annotations

from pathlib import Path

import pytest

import ostinato
from ostinato.client import bearer


def test_files_that_hold_nothing_are_named(tmp_path: Path) -> None:
    """gRPC would only say that it cannot connect, so a missing file and one that is no PEM are named with their argument."""
    (tmp_path / "noise").write_bytes(b"\x30\x82")
    with pytest.raises(ValueError, match=r"^ca: \S*nowhere: No such file"):
        ostinato.tls(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"^key: \S*noise: is not a PEM file"):
        ostinato.tls(certificate=tmp_path / "noise", key=tmp_path / "noise")


def test_a_certificate_has_a_key() -> None:
    """One without the other is an error of whoever calls."""
    with pytest.raises(ValueError, match="certificate, key: one needs the other"):
        ostinato.tls(certificate="client.pem")


@pytest.mark.parametrize("token", ["", "two words", "line\n", "tokén"])
def test_a_token_is_one_word(token: str) -> None:
    """What could not be sent, or would be sent as something else, is refused by the argument's name and not shown."""
    with pytest.raises(ValueError, match="^token: must be printable ASCII without spaces$"):
        ostinato.Client(token=token)
    assert bearer("x") == "Bearer x"
