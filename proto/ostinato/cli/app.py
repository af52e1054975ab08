"""All commands, in the order of the help."""

from ostinato.cli.challenge import challenge
from ostinato.cli.chat import chat
from ostinato.cli.generate import generate
from ostinato.cli.journal import cancel, get, head, model, tail, tokenize
from ostinato.cli.replay import replay
from ostinato.cli.report import report
from ostinato.cli.serve import serve, service, sidecar
from ostinato.cli.session import app, command
from ostinato.cli.verify import verify

__all__ = ["app"]

app.command()(serve)
for each in (generate, chat, get, tail, head, replay, verify, challenge, cancel, model, tokenize, report):
    command(each)
for program in (service, sidecar):
    # All arguments are the program's, also --help.
    app.command(
        add_help_option=False,
        context_settings={"allow_extra_args": True, "allow_interspersed_args": False, "ignore_unknown_options": True},
    )(program)
