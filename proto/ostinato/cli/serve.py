"""`ostinato serve`: what it is told. What it does is in `running`, which other commands do not wait for."""

from __future__ import annotations

import asyncio
import enum
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

STATE = Path(".run")
"""Where the programs keep journal and proofs by themselves."""
LISTEN = "127.0.0.1:7001"
"""The sidecar's own default, where clients look too."""
GATEWAY_PORT = 8000


class Engine(enum.StrEnum):
    """What makes the tokens."""

    LLAMA = "llama"
    TURBOMIND = "turbomind"
    SCRIPTED = "scripted"


def serve(
    model: Annotated[
        Path | None,
        typer.Argument(help="GGUF file (llama) or Hugging Face folder (turbomind). Default: SmolLM2, if installed."),
    ] = None,
    engine: Annotated[Engine | None, typer.Option(help="Default: turbomind for a folder, else llama.")] = None,
    listen: Annotated[str | None, typer.Option(metavar="ADDRESS", help=f"Of the sidecar. Default {LISTEN}.")] = None,
    metrics: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Of the sidecar's metrics. Default 127.0.0.1:9400.")
    ] = None,
    service_metrics: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Of the service's metrics. Default 127.0.0.1:9401.")
    ] = None,
    gateway: Annotated[bool, typer.Option("--gateway", help="Serve OpenAI's API too, through smg.")] = False,
    gateway_port: Annotated[int, typer.Option(min=1, max=65535, help="Of OpenAI's API, on 127.0.0.1.")] = GATEWAY_PORT,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="TOML with tables [service] and [sidecar]: their settings.")
    ] = None,
    state: Annotated[Path, typer.Option(metavar="DIR", file_okay=False, help="Holds journal, proofs and logs.")] = STATE,
    service_flag: Annotated[
        list[str] | None, typer.Option(metavar="FLAG", help="For the service, such as '--runs 4'. May be repeated.")
    ] = None,
    sidecar_flag: Annotated[
        list[str] | None, typer.Option(metavar="FLAG", help="For the sidecar, such as '--audit-rate 0'. May be repeated.")
    ] = None,
) -> None:
    """Starts service and sidecar, and stops both at Ctrl-C.

    Every other setting of the two programs: --config, --service-flag, --sidecar-flag, or their environment variables
    (OSTINATO_SERVICE_*, OSTINATO_SIDECAR_*), which `ostinato service --help` and `ostinato sidecar --help` list.
    """
    from ostinato.cli import running

    if model is not None and not model.exists():
        raise typer.BadParameter(f"there is no file or folder {model}", param_hint="MODEL")
    wanted = running.Wanted(
        config=config,
        model=model,
        engine=engine or (None if model is None else Engine.TURBOMIND if model.is_dir() else Engine.LLAMA),
        state=state,
        listen=listen,
        metrics=metrics,
        service_metrics=service_metrics,
        gateway_port=gateway_port if gateway else None,
        service=_words("--service-flag", service_flag),
        sidecar=_words("--sidecar-flag", sidecar_flag),
    )
    raise typer.Exit(asyncio.run(running.until_told("serve", lambda pair: running.serve(wanted, pair))))


def _words(option: str, given: Sequence[str] | None) -> list[str]:
    try:
        return [word for text in given or () for word in shlex.split(text)]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None
