"""A chat as text, by the template that comes with the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ostinato.v1 import types_pb2

from service.engines.base import ROLES


class ChatTemplate:
    """Pure, in any thread. What day it is, a template is not told: what it writes may not depend on that."""

    def __init__(self, source: str, *, begin: str, end: str) -> None:
        """`begin` and `end` are the model's control tokens as text. Raises ValueError for what is no template."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, autoescape=False, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals |= {"raise_exception": _refuse, "bos_token": begin, "eos_token": end}
        environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template cannot be used: {error}") from error

    def render(self, messages: Sequence[types_pb2.Message]) -> str:
        """Ready for the assistant's turn. Raises ValueError for an unknown role, and with what the template says."""
        for message in messages:
            if message.role not in ROLES:
                raise ValueError(f"{message.role!r} is no role; roles are {', '.join(ROLES)}")
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._template.render(messages=turns, add_generation_prompt=True)
        except Exception as error:  # a template is a program: it can fail in any way
            raise ValueError(str(error) or type(error).__name__) from error


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
