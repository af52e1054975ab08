"""The traces of a service, where there are any: of a preparation, and of a run with what the engine does in it."""

from __future__ import annotations

from ostinato import enums, errors, tracing
from ostinato.tracing import OFF, Kind
from ostinato.v1 import engine_pb2, types_pb2

from service.engines.base import Engine

OPERATION, PREPARE = "text_completion", "ostinato.v1.Engine/Prepare"


def prepare_span(traceparent: str) -> tracing.Span:
    """Of a preparation over the stream, as if it were a call."""
    if not tracing.on():
        return OFF
    attributes = {"rpc.system.name": "grpc", "rpc.method": PREPARE}
    return tracing.span(PREPARE, attributes, Kind.SERVER, _parent(traceparent))


def _parent(traceparent: str) -> tracing.Metadata:
    return [("traceparent", traceparent)] if traceparent else []


class RunSpans:
    """Begins with the submission. A run of no purpose, the self-test's, has none."""

    def __init__(self, submit: engine_pb2.Submit, engine: Engine) -> None:
        self._run = self._engine_span = OFF
        self._submit, self._engine = submit, engine
        if not (tracing.on() and submit.purpose):
            return
        attributes: dict[str, tracing.Value] = {
            "ostinato.purpose": enums.word(engine_pb2.Purpose, submit.purpose),
            "ostinato.sequence": submit.sequence,
            "ostinato.attempt": submit.attempt,
            "ostinato.seed": str(submit.seed),
        }
        self._run = tracing.span("run", attributes, Kind.SERVER, _parent(submit.traceparent))

    def started(self) -> None:
        """The engine has begun to work on it."""
        if not self._run:
            return
        given, model = self._submit.parameters, self._engine.model_name
        self._engine_span = self._run.child(
            f"{OPERATION} {model}",
            {
                "gen_ai.operation.name": OPERATION,
                "gen_ai.provider.name": self._engine.name,
                "gen_ai.request.model": model,
                "gen_ai.request.max_tokens": given.max_new_tokens,
                "gen_ai.request.temperature": given.temperature,
                "gen_ai.request.top_k": float(given.top_k),
                "gen_ai.request.top_p": given.top_p,
                "gen_ai.request.seed": self._submit.seed,
                "gen_ai.request.stream": self._submit.stream,
                "gen_ai.usage.input_tokens": len(self._submit.token_ids),
            },
        )

    def first_token(self) -> None:
        """Where somebody streams."""
        self._engine_span.event("first token")

    def finished(self, output: types_pb2.Output) -> None:
        """It made this, and is about to end."""
        if self._run:
            reason = enums.word(types_pb2.FinishReason, output.finish_reason).lower()
            self._engine_span.note(
                {"gen_ai.response.finish_reasons": [reason], "gen_ai.usage.output_tokens": len(output.token_ids)}
            )
            self._run.note({"ostinato.grade": enums.word(types_pb2.Grade, output.grade)})

    def ended(self, error: errors.OstinatoError | None) -> None:
        """It ends, for this reason if there is no output."""
        self._engine_span.end(error)
        self._run.end(error)
