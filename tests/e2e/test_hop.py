"""The hop between a real sidecar and a real service, and processes of the same machine that come between."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import grpc
import pytest

from ostinato import errors
from ostinato.client import Client
from ostinato.v1 import engine_pb2, engine_pb2_grpc, types_pb2

from service.fence import SEQUENCE_JUMP_MAX
from tests.certificates import Authority
from tests.e2e.kit import scripted
from tests.hop import proved
from tests.pair import Pair, held_port, python
from tests.waiting import eventually


async def driven(stub: Any, head: Any, *, epoch: int, sequence: int) -> errors.OstinatoError | None:
    """Says Hello with this epoch, and submits this sequence, as a stranger would. The error; None: it was accepted."""
    hello = engine_pb2.Hello(log_id=head.log_id, writer=head.writer, epoch=epoch, last_sequence=head.last_sequence)
    parameters = types_pb2.ResolvedParameters(temperature=1, top_p=1, repetition_penalty=1, max_new_tokens=1)
    submit = engine_pb2.Submit(
        run_id=1, purpose=engine_pb2.PURPOSE_PRIMARY, sequence=sequence, attempt=1, token_ids=[65], parameters=parameters
    )
    try:
        async for _ in stub.Execute(iter([engine_pb2.ExecuteRequest(hello=hello, submits=[submit])])):
            pass
    except grpc.aio.AioRpcError as error:
        return errors.from_rpc_error(error)
    return None


async def test_certificates_on_both_sides(tmp_path: Path) -> None:
    """With TLS on both sides the two need no secret, and a caller without a certificate of that CA reaches nothing."""
    authority, other = Authority(tmp_path), Authority(tmp_path, "other")
    served, called = authority.sign("service"), authority.sign("sidecar", uris=("spiffe://example/sidecar",))
    listening = ["--tls-certificate", str(served[0]), "--tls-key", str(served[1]), "--tls-client-ca", str(authority.file)]
    calling = ["--engine-certificate", str(called[0]), "--engine-key", str(called[1]), "--engine-ca", str(authority.file)]
    stranger = [path.read_bytes() for path in other.sign("sidecar", file="stranger")]
    with held_port() as held, Pair(service=[*scripted(), *listening], sidecar=calling) as pair:
        pair.engine_address = f"127.0.0.1:{held.getsockname()[1]}"
        pair.start()
        async with Client(pair.target) as client:
            await client.generate("a", max_new_tokens=1)
            await client.generate(["a long prompt " * 20] * 20, max_new_tokens=1)  # beside the stream
        for credentials in (
            grpc.ssl_channel_credentials(authority.file.read_bytes()),
            grpc.ssl_channel_credentials(authority.file.read_bytes(), stranger[1], stranger[0]),
        ):
            async with grpc.aio.secure_channel(pair.engine_address, credentials) as channel:
                with pytest.raises(grpc.aio.AioRpcError):
                    await engine_pb2_grpc.EngineStub(channel).Describe(engine_pb2.DescribeRequest(), timeout=5)
        assert pair.sidecar.running


async def test_a_wrong_sequence_does_not_stop_a_sidecar_for_good() -> None:
    """A sequence as far ahead as it may be, from a process of the same user, stops the sidecar, which names the remedy. After
    the remedy it goes on, behind the sequence."""
    with Pair(service=scripted(), sidecar=["--reconnect-seconds", "0.05"]) as pair:
        pair.start()
        async with Client(pair.target) as client:
            await client.generate("a", max_new_tokens=1)
            head = await client.head()
        pair.sidecar.stop()
        async with grpc.aio.insecure_channel(pair.engine_address) as channel:
            stub = await proved(channel, pair.engine_address)
            assert isinstance(await driven(stub, head, epoch=head.epoch, sequence=2**62), errors.OutOfOrder)
            assert isinstance(await driven(stub, head, epoch=2**64 - 1, sequence=2), errors.ProtocolViolation)
            assert await driven(stub, head, epoch=head.epoch, sequence=head.last_sequence + SEQUENCE_JUMP_MAX) is None
        sidecar = pair.start_sidecar()
        await eventually(lambda: not sidecar.running, "the sidecar ends")
        remedy = re.search(r"accept-loss --through (\d+)", "\n".join(sidecar.lines))
        assert remedy is not None
        done = await asyncio.to_thread(
            python, "-m", "sidecar", "accept-loss", "--journal", f"{pair.folder}/journal.sqlite", "--through", remedy[1]
        )
        assert done.returncode == 0, done.stderr
        pair.start_sidecar().wait_for("engine connected")
        async with Client(pair.target) as client:
            answer = await client.generate("b", max_new_tokens=1)
        assert answer.stamp.first_sequence == int(remedy[1]) + 1 == head.last_sequence + SEQUENCE_JUMP_MAX + 1
