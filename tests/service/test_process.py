"""`python -m service` as a process: how it starts, and how it ends."""

from __future__ import annotations

import json
import queue
import signal
import time
from pathlib import Path
from typing import Self

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ostinato.errors import EngineUnavailable, from_rpc_error
from ostinato.v1 import engine_pb2

from tests.hop import Engine, proof
from tests.pair import START_SECONDS, Program, python
from tests.service.support import hello_of


class Running:
    """A service process of one test."""

    def __init__(self, folder: Path, *args: str) -> None:
        self.address = f"unix:{folder}/deep/engine.sock"
        given = ["--listen", self.address, "--metrics", "127.0.0.1:0", "--state-dir", str(folder / "state")]
        self.program = Program("service", ["--engine", "scripted", *given, "--log-format", "json", *args])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.program.running:
            self.program.kill()


def test_start_and_stop(tmp_path: Path) -> None:
    """It starts, answers, serves metrics, and exits with 0 on SIGTERM; its socket's mode is 660."""
    with Running(tmp_path) as service:
        service.program.wait_for("serving")
        with grpc.insecure_channel(service.address) as channel:
            described = Engine(channel, proof(service.address)).Describe(engine_pb2.DescribeRequest())
        metrics = service.program.page()
        mode = (tmp_path / "deep" / "engine.sock").stat().st_mode & 0o777

        assert service.program.stop() == 0
    assert described.model.engine == "scripted"
    assert len(bytes.fromhex(described.incarnation)) == 16
    assert "ostinato_service_grade 3.0" in metrics
    assert 'ostinato_service_fingerprint_info{digest="' in metrics
    assert mode == 0o660


def test_only_turbomind_can_be_calibrated() -> None:
    """`calibrate` takes the service's settings, and is refused for an engine that has nothing to prove."""
    done = python("-m", "service", "calibrate", "--engine", "scripted", "--log-level", "ERROR")

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "service: calibrate: --engine scripted has no products to prove; only turbomind has\n"


def test_the_log_says_what_the_grade_rests_on_and_what_it_cost(tmp_path: Path) -> None:
    """One log line has the grade, the reason and the seconds of each part of the start."""
    with Running(tmp_path, "--log-format", "human", "--script", '{"load_seconds": 0.2}') as service:
        deadline = time.monotonic() + START_SECONDS
        while not (said := [line for line in service.program.lines if "grade earned" in line]) and time.monotonic() < deadline:
            time.sleep(0.01)

    assert "INFO service grade earned grade=EXACT reason=" in said[0]
    assert 'rests_on="the script says so" load_seconds=0.' in said[0]
    assert "proof_seconds=0" in said[0]
    assert float(said[0].rpartition("self_test_seconds=")[2]) > 0


def test_an_idle_sidecar_does_not_hold_up_the_stop(tmp_path: Path) -> None:
    """On SIGTERM an idle stream is ended long before drain_seconds."""
    says: queue.SimpleQueue[engine_pb2.ExecuteRequest | None] = queue.SimpleQueue()
    says.put(engine_pb2.ExecuteRequest(hello=hello_of()))
    with Running(tmp_path, "--drain-seconds", "3600") as service, grpc.insecure_channel(service.address) as channel:
        service.program.wait_for("serving")
        frames = Engine(channel, proof(service.address)).Execute(iter(says.get, None))
        assert next(frames).HasField("welcome")

        assert service.program.stop() == 0
        assert list(frames) == [], "it ended well"
    says.put(None)


def test_listens_before_it_is_ready(tmp_path: Path) -> None:
    """Until the model is loaded and tested, health is NOT_SERVING and RPCs are UNAVAILABLE; SIGTERM then exits with 0."""
    script = {"load_seconds": 0.3, "rules": [{"do": "hang", "purposes": ["SELF_TEST"]}]}
    with Running(tmp_path, "--script", json.dumps(script)) as service:
        service.program.wait_for("listening")
        with grpc.insecure_channel(service.address) as channel:
            health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="ostinato.v1.Engine"))
            with pytest.raises(grpc.RpcError) as caught:
                Engine(channel, proof(service.address)).Describe(engine_pb2.DescribeRequest())

        assert service.program.stop() == 0
    assert health.status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert isinstance(from_rpc_error(caught.value), EngineUnavailable)  # type: ignore[arg-type]


def test_interrupted_load(tmp_path: Path) -> None:
    """SIGTERM while the model loads ends the process at once."""
    with Running(tmp_path, "--script", json.dumps({"load_seconds": 600})) as service:
        service.program.wait_for("listening")

        assert service.program.stop() == 0


def test_interrupted_self_test(tmp_path: Path) -> None:
    """SIGINT during the self-test ends the process."""
    script = {"rules": [{"do": "hang", "purposes": ["SELF_TEST"]}]}
    with Running(tmp_path, "--script", json.dumps(script)) as service:
        service.program.wait_for("engine loaded")

        assert service.program.stop(signal.SIGINT) == 0


def test_crash_shows_in_the_exit_code(tmp_path: Path) -> None:
    """A scripted crash ends the process with its exit code."""
    script = {"rules": [{"do": "crash", "at": 3, "purposes": ["SELF_TEST"]}]}
    with Running(tmp_path, "--script", json.dumps(script)) as service:
        assert service.program._process.wait(40) == 70
