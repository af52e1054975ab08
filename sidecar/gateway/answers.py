"""Our events as a gateway's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from smg_grpc_proto.generated import vllm_engine_pb2 as vllm

from ostinato import errors
from ostinato.v1 import generation_pb2, types_pb2
from serving.auth import Context

from sidecar.held import Account

STAMP_METADATA, RECEIPT_METADATA = "ostinato-stamp-bin", "ostinato-receipt-bin"
RECEIPTS_MAX = 8
"""In a call's trailers, of which a peer need not take more than 8 KiB; Sequencer.Get has them all."""


class Answer:
    """Stands for gRPC's context before a handler of Generation; what that writes goes out as the gateway's messages.

    `left`: seconds until the call's deadline. `account`: of the bytes that are held until the call ends.
    """

    def __init__(self, context: Context, prompt_tokens: int, left: Callable[[], float], account: Account) -> None:
        self._context = context
        self._account = account
        self._prompt_tokens = prompt_tokens
        self._stamp = types_pb2.Stamp()
        self._sent: dict[int, int] = {}
        """Tokens by sequence."""
        self._results: list[bytes] = []
        """Serialised, as they are smaller."""
        self._restarted = 0
        self.time_remaining = left

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def write(self, data: bytes) -> None:
        """As GenerateStream's context. Results wait for `end`: the call is one, and has one status."""
        event = generation_pb2.GenerateEvent.FromString(data)
        match event.WhichOneof("event"):
            case "admitted":
                self._admitted(event.admitted.stamp)
            case "tokens" if not self._restarted:
                for run in event.tokens.runs:
                    await self._chunk(run)
            case "restarted":
                self._restarted = self._restarted or event.restarted.sequence
            case "finished":
                self._result(event.finished)
            case "failed":
                self._result(event.failed)

    async def end(self) -> None:
        """When all was written. Raises what an item failed with; and Abandoned where other tokens were sent than are recorded,
        which this protocol has no word for."""
        for data in self._completes():
            await self._context.write(data)

    async def whole(self, data: bytes) -> None:
        """As `write` and `end`, with Generate's answer."""
        self._whole(generation_pb2.GenerateResponse.FromString(data))
        await self.end()

    def _whole(self, response: generation_pb2.GenerateResponse) -> None:
        self._admitted(response.stamp)
        for result in response.results:
            self._result(result)

    def _result(self, result: types_pb2.Result) -> None:
        data = result.SerializeToString()
        self._results.append(data)
        self._account.add(len(data))

    def _completes(self) -> list[bytes]:
        """The last messages, one for each item, serialised; the trailers are set."""
        results = [types_pb2.Result.FromString(data) for data in self._results]
        for result in results:
            if result.HasField("status"):
                raise errors.from_status(result.status)
        if self._restarted:
            why = "was answered anew after a crash, with other tokens than were sent; the journal has the whole"
            raise errors.Abandoned(f"sequence {self._restarted} {why}")
        self._receipts(results)
        ordered = sorted(results, key=lambda result: result.sequence)
        completes = [_complete(result.output, self._index(result.sequence)) for result in ordered]
        return [vllm.GenerateResponse(complete=complete).SerializeToString() for complete in completes]

    def _admitted(self, stamp: types_pb2.Stamp) -> None:
        self._stamp = stamp
        self._receipts(())

    def _receipts(self, results: Sequence[types_pb2.Result]) -> None:
        receipts = [result.receipt.SerializeToString() for result in results if result.HasField("receipt")]
        told = receipts if len(receipts) <= RECEIPTS_MAX else ()
        stamp = (STAMP_METADATA, self._stamp.SerializeToString())
        self._context.set_trailing_metadata((stamp, *((RECEIPT_METADATA, receipt) for receipt in told)))

    def _index(self, sequence: int) -> int:
        return sequence - self._stamp.first_sequence

    async def _chunk(self, run: generation_pb2.TokenRun) -> None:
        sent = self._sent[run.sequence] = run.first_token + len(run.token_ids)
        chunk = vllm.GenerateStreamChunk(
            token_ids=run.token_ids,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=sent,
            output_logprobs=_logprobs(run.token_ids, run.logprobs),
            index=self._index(run.sequence),
        )
        await self._context.write(vllm.GenerateResponse(chunk=chunk))


def _complete(output: types_pb2.Output, index: int) -> vllm.GenerateComplete:
    made = vllm.GenerateComplete(
        output_ids=output.token_ids,
        finish_reason="length" if output.finish_reason == types_pb2.FINISH_REASON_LENGTH else "stop",
        prompt_tokens=output.prompt_tokens,
        completion_tokens=len(output.token_ids),
        cached_tokens=output.cached_tokens,
        output_logprobs=_logprobs(output.token_ids, output.logprobs),
        index=index,
    )
    if output.finish_reason == types_pb2.FINISH_REASON_STOP_STRING:
        made.matched_stop_str = output.matched_stop
    elif output.finish_reason == types_pb2.FINISH_REASON_STOP_TOKEN:
        made.matched_token_id = output.token_ids[-1]
    return made


def _logprobs(token_ids: Sequence[int], logprobs: Sequence[types_pb2.TokenLogprobs]) -> vllm.OutputLogProbs | None:
    """None: not asked for."""
    if not logprobs:
        return None
    tops = [vllm.TopLogProbs(values=[t.logprob for t in p.top], token_ids=[t.token_id for t in p.top]) for p in logprobs]
    return vllm.OutputLogProbs(token_logprobs=[p.logprob for p in logprobs], token_ids=token_ids, top_logprobs=tops)
