"""All commands, in the order of the help."""

from ostinato.cli.control import cancel, model, tokenize
from ostinato.cli.generate import generate
from ostinato.cli.journal import get, head, tail
from ostinato.cli.replay import replay
from ostinato.cli.report import report
from ostinato.cli.session import app, command
from ostinato.cli.verify import verify

__all__ = ["app"]

for each in (generate, get, tail, head, replay, verify, cancel, model, tokenize, report):
    command(each)
