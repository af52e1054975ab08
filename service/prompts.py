"""An item's prompt as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ostinato.errors import InvalidRequest, Violation, invalid
from ostinato.v1 import types_pb2

from service.engines.base import ROLES, Vocabulary
from service.limits import Limits


@dataclass(frozen=True, slots=True)
class Prompts:
    """Pure, and safe in any thread."""

    vocabulary: Vocabulary
    limits: Limits
    chat: bool
    """Whether chats can be rendered."""

    def token_ids(self, item: types_pb2.Item, path: str) -> Sequence[int]:
        """1 to context_tokens - 1 ids. Raises InvalidRequest that names what is wrong under `path`, such as `items[3]`."""
        given = [name for name in ("text", "token_ids", "chat") if item.HasField(name)]
        if len(given) != 1:
            text = f"has {len(given)} prompts ({', '.join(given)})" if given else "has no prompt"
            raise invalid(path, f"{text}: exactly one of text, token_ids and chat is wanted")
        where = f"{path}.{given[0]}"
        match given[0]:
            case "text":
                ids: Sequence[int] = self._text(item.text, where)
            case "token_ids":
                ids = self._ids(item.token_ids.ids, where)
            case _:
                ids = self._chat(item.chat.messages, where)
        most, size = self.limits.context_tokens - 1, self.vocabulary.size
        if not 1 <= len(ids) <= most:
            raise invalid(where, f"must be 1 to {most} tokens, is {len(ids)}")
        if (highest := max(ids)) >= size:  # a tokenizer may have more tokens than its model has rows for
            raise invalid(where, f"has a token, {highest}, that is not below the vocabulary's {size}")
        return ids

    def _text(self, text: str, where: str) -> Sequence[int]:
        if not text:
            raise invalid(where, "is empty")
        self._bounded(len(text.encode()), where)
        return self.vocabulary.encode(text, special=False)

    def _ids(self, ids: Sequence[int], where: str) -> Sequence[int]:
        size = self.vocabulary.size
        if ids and max(ids) >= size:
            index = next(index for index, token_id in enumerate(ids) if token_id >= size)
            raise invalid(f"{where}.ids[{index}]", f"{ids[index]} is not below the vocabulary's {size}")
        return ids

    def _chat(self, messages: Sequence[types_pb2.Message], where: str) -> Sequence[int]:
        if not self.chat:
            raise invalid(where, "this model has no chat template")
        if not messages:
            raise invalid(where, "has no messages")
        unknown = [
            Violation(f"{where}.messages[{index}].role", f"must be one of {', '.join(ROLES)}")
            for index, message in enumerate(messages)
            if message.role not in ROLES
        ]
        if unknown:
            raise InvalidRequest(violations=unknown)
        self._bounded(sum(len(message.content.encode()) for message in messages), where)
        try:
            text = self.vocabulary.render(messages)
        except ValueError as error:
            raise invalid(where, f"the model's template refuses it: {error}") from error
        self._bounded(len(text.encode()), where)
        return self.vocabulary.encode(text, special=True)

    def _bounded(self, size: int, where: str) -> None:
        if size > self.limits.prompt_bytes_max:
            raise invalid(where, f"must be at most {self.limits.prompt_bytes_max} bytes of text, is {size}")
