"""Health, asked by a command: `python -m sidecar probe`, for supervisors that run commands and speak no gRPC.

    python -m sidecar probe                          the process runs: liveness
    python -m sidecar probe ostinato.v1.Generation   it can admit: readiness

Exit code 0 for SERVING and 1 for all else, with one line that says which.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ostinato.serving.settings import lookup

SERVING = health_pb2.HealthCheckResponse.SERVING


def probe(settings: type, program: str, argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """The exit code. Asks at the port for probes, or where `program` listens, as its environment and its settings file say; the
    flags that it runs with cannot be known here, hence --address. In plain text. Raises SystemExit(2) for bad flags."""
    parser = argparse.ArgumentParser(prog=f"python -m {program} probe", allow_abbrev=False)
    parser.add_argument("service", nargs="?", default="", help="full name of a gRPC service; none: the process")
    parser.add_argument(
        "--address", help="host:port or unix:/path [default: where the program listens, as far as can be known]"
    )
    parser.add_argument("--config", help="the program's settings file, where the environment does not name it")
    parser.add_argument("--timeout-seconds", type=float, default=2.0, help="for the answer [default 2]")
    given = parser.parse_args(argv)
    try:
        address = given.address or _address(settings, program, environ, given.config)
    except ValueError as error:
        parser.error(str(error))
    if not 0 < given.timeout_seconds <= 3600:
        parser.error("--timeout-seconds: is not above 0 and at most 3600")
    healthy, answer = ask(address, given.service, given.timeout_seconds)
    print(f"{answer}: {given.service or program} at {address}")  # noqa: T201  # this is its answer
    return 0 if healthy else 1


def _address(settings: type, program: str, environ: Mapping[str, str], config: str | None) -> str:
    """Raises ValueError for settings that do not say it."""
    names = [name for name in ("health_listen", "listen") if name in {field.name for field in dataclasses.fields(settings)}]
    for name in names:
        found = lookup(settings, program, name, environ, config)
        if found:
            return str(found if isinstance(found, str) else found[0])
    raise ValueError(f"{program} listens nowhere")


def ask(address: str, service: str, timeout_seconds: float) -> tuple[bool, str]:
    """Whether it serves, and the health status; or the status code and why there is none."""
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=service), timeout=timeout_seconds
            )
        except grpc.RpcError as error:
            return False, f"{error.code().name} ({' '.join(str(error.details()).split())})"
    return answer.status == SERVING, health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
