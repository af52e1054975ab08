"""All commands, in the order of the help."""

from ostinato.cli import programs
from ostinato.cli.control import cancel, model, tokenize
from ostinato.cli.generate import generate
from ostinato.cli.journal import get, head, tail
from ostinato.cli.replay import replay
from ostinato.cli.report import report
from ostinato.cli.serve import serve
from ostinato.cli.session import app, command
from ostinato.cli.verify import verify

__all__ = ["app"]

app.command()(serve)
for each in (generate, get, tail, head, replay, verify, cancel, model, tokenize, report):
    command(each)
for program in (programs.service, programs.sidecar):
    # Every argument is the program's, --help too.
    app.command(
        add_help_option=False,
        context_settings={"allow_extra_args": True, "allow_interspersed_args": False, "ignore_unknown_options": True},
    )(program)
