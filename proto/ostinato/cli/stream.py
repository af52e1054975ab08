"""`ostinato generate --stream`: one answer on stdout as it comes, what is to be known about it on stderr."""

from __future__ import annotations

import sys
from contextlib import aclosing

from ostinato.cli import show
from ostinato.cli.session import Session
from ostinato.v1 import generation_pb2, types_pb2


async def stream_one(session: Session, request: generation_pb2.GenerateRequest, max_response_bytes: int) -> bool:
    """Whether the item ended with an output."""
    well, screen = False, _Screen()
    async with (
        session.client(max_response_bytes) as client,
        aclosing(client.stream(request, timeout=session.timeout)) as events,
    ):
        try:
            async for event in events:
                well = well or event.HasField("finished")
                if session.json:
                    show.as_json(event)
                else:
                    screen.take(event)
        finally:
            screen.end()
    return well


class _Screen:
    """What has been shown of the answer."""

    def __init__(self) -> None:
        self._shown = ""

    def take(self, event: generation_pb2.GenerateEvent) -> None:
        match event.WhichOneof("event"):
            case "tokens":
                for run in event.tokens.runs:
                    self._write(run.text)
            case "restarted":
                self.end()
                show.note(f"restarted: attempt {event.restarted.attempt} makes other tokens; discard what came before")
            case "finished":
                # What might have begun a stop string was held back until now.
                self._write(event.finished.output.text.removeprefix(self._shown))
                self.end()
                show.note(_summary(event.finished))
            case "failed":
                self.end()
                show.note(_summary(event.failed))

    def end(self) -> None:
        """Ends the line, if one was begun."""
        if self._shown and not self._shown.endswith("\n"):
            show.line("")
        self._shown = ""

    def _write(self, text: str) -> None:
        self._shown += text
        if sys.stdout.isatty():
            text = "\n".join("\t".join(map(show.visible, line.split("\t"))) for line in text.split("\n"))
        print(text, end="", flush=True)


def _summary(result: types_pb2.Result) -> str:
    cells = zip(show.RESULT_COLUMNS, show.result(result), strict=True)
    return ", ".join(f"{name} {cell}" for name, cell in cells if cell and (name != "text" or result.HasField("status")))
