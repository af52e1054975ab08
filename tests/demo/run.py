"""`python -m tests.demo`, and `python -m tests.demo --up`."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
from pathlib import Path

from rich.console import Console

from service.config import ENGINES
from tests.demo.show import counted, show
from tests.gateway import Gateway
from tests.pair import ROOT, Pair

STATE = ROOT / ".run" / "service"
"""Proofs of the self-test stay here, so that a second start is quick."""

NEXT = """
Running. Ctrl-C stops it all. In another terminal:

  {ostinato} -t {target} generate "Shanghai is" -n 3 --seed 1 --top-k 40
  {ostinato} -t {target} tail --follow
  {ostinato} -t {target} replay 1..3
  curl -s http://127.0.0.1:{metrics}/metrics | grep ^ostinato_

A stub in five lines of Python:

  import grpc
  from ostinato.v1 import generation_pb2, generation_pb2_grpc, types_pb2
  stub = generation_pb2_grpc.GenerationStub(grpc.insecure_channel("{target}"))
  request = generation_pb2.GenerateRequest(items=[types_pb2.Item(text="Shanghai is")] * 3)
  print([result.output.text for result in stub.Generate(request).results])
"""

OPENAI = """
OpenAI's API is at {url}:

  curl -s {url}/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "{model}", "seed": 1, "messages": [{{"role": "user", "content": "Where is Shanghai?"}}]}}'
"""
GATEWAY_PORT = 8000
START_SECONDS = 1800.0
"""A large model on a GPU is loaded and proved for minutes, the first time."""


def main() -> int:
    """0: everything that was shown is as promised."""
    parser = argparse.ArgumentParser(prog="python -m tests.demo")
    parser.add_argument("--up", action="store_true", help="leave both running until Ctrl-C")
    parser.add_argument("--engine", default="llama", choices=ENGINES)
    parser.add_argument("--gateway", action="store_true", help="with --up: an OpenAI gateway too")
    parser.add_argument("--model", default="", help="path of another model")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or it would leave the programs behind
    console = Console(width=None if sys.stdout.isatty() else 140)
    service = ["--model", args.model] if args.model else []
    pair = Pair(service=service, sidecar=["--vllm-face"] if args.gateway else [], engine=args.engine, state=STATE)
    pair.second_runs = []  # as it would be out there
    try:
        if args.up:
            pair.stay(ROOT / ".run", "127.0.0.1:7001", "127.0.0.1:9400")
        with pair:
            begin(pair, console)
            if args.gateway:
                open_gateway(pair, console)
            if args.up:
                stay(pair, console)
                return 0
            promises = asyncio.run(show(pair.target, console))
            console.print(counted(pair))
            pair.stop()
            return 0 if promises else 1
    except AssertionError as error:
        console.print(str(error), style="red", highlight=False, markup=False)
        return 1
    except KeyboardInterrupt:
        return 130


def begin(pair: Pair, console: Console) -> None:
    """Start both, and say how long what took."""
    started = time.monotonic()
    service = pair.start_service()
    sidecar = pair.start_sidecar()
    with console.status("starting: the first time, the engine has to earn its grade in a self-test"):
        service.wait_for("serving", START_SECONDS)
        connected = sidecar.wait_for("engine connected")
    console.print(
        f"engine [bold]{connected['model']}[/] at grade [bold]{str(connected['grade']).upper()}[/], "
        f"ready after {time.monotonic() - started:.1f} s; fingerprint {connected['fingerprint']}"
    )


def open_gateway(pair: Pair, console: Console) -> None:
    """In front of the sidecar, until the pair ends."""
    gateway = Gateway(pair.target, GATEWAY_PORT)
    pair.programs.append(gateway)
    console.print(OPENAI.format(model=gateway.model(), url=gateway.url), highlight=False, markup=False)


def stay(pair: Pair, console: Console) -> None:
    """What the grade rests on, and what to do now; until Ctrl-C, or until one of the programs ends."""
    assert pair.sidecar is not None and pair.service is not None
    earned = pair.service.wait_for("grade earned")
    why = "; ".join(dict.fromkeys([str(earned["rests_on"]), str(earned["reason"])]))
    costs = ", ".join(f"{earned[f'{part}_seconds']} s of {part.replace('_', '-')}" for part in ("load", "proof", "self_test"))
    console.print(f"that rests on this: {why}; and it cost {costs}", highlight=False, markup=False)
    ostinato = Path(sys.executable).with_name("ostinato")
    text = NEXT.format(
        target=pair.target,
        metrics=pair.sidecar.wait_for("metrics")["port"],
        ostinato=ostinato.relative_to(ROOT) if ostinato.is_relative_to(ROOT) else ostinato,
    )
    console.print(text, highlight=False, markup=False)
    try:
        while all(program.running for program in pair.programs):
            time.sleep(0.2)
        ended = next(program for program in pair.programs if not program.running)
        raise AssertionError(f"{ended.name} ended:\n" + "\n".join(ended.lines[-10:]))
    except KeyboardInterrupt:
        console.print("stopping")
        pair.stop()


if __name__ == "__main__":
    Path(ROOT / ".run").mkdir(exist_ok=True)
    sys.exit(main())
