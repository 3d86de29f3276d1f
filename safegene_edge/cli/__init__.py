"""The command line: thin click commands, and the only place that prints.

Nothing heavy is imported at the top of these modules, so that `--help` answers at once.
Data goes to stdout, everything else to stderr. Exit codes: 0 done, 1 a missed threshold,
2 the user's input, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import suppress

import click

from .._version import __version__
from ..errors import SafeGeneError
from .adapters import convert, inspect_file, to_peft
from .chat import chat
from .doctor import doctor
from .evaluation import evaluate_model
from .extract import extract
from .learn import learn
from .merge import export, merge
from .options import HelpGroup
from .portfolio import portfolio
from .recalibrate import recalibrate
from .report import report_group
from .restore import restore
from .scan import scan
from .serve import serve
from .sharing import pull, push


@click.group(cls=HelpGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="safegene-edge")
def cli() -> None:
    """Give a fine-tuned local LLM its refusals back, on the laptop, through llama.cpp."""


for _command in (
    restore,
    convert,
    to_peft,
    inspect_file,
    evaluate_model,
    scan,
    learn,
    extract,
    recalibrate,
    portfolio,
    merge,
    export,
    report_group,
    chat,
    serve,
    push,
    pull,
    doctor,
):
    cli.add_command(_command)


def main() -> None:
    """Run the command line; errors of the user become one line on stderr and exit code 2."""
    _open_streams()
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        code = cli.main(prog_name="safegene-edge", standalone_mode=False)
    except SafeGeneError as error:
        _fail(str(error), 2)
    except click.UsageError as error:
        where = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        _fail(error.format_message() + _after_an_option(error) + where, 2)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted", 130)
    except BrokenPipeError:  # the reader of a pipe went away, as `head` does
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:  # of the disk, where no one knew which file was at fault
        _fail(str(error), 2)
    except MemoryError:
        _fail("there is not enough memory", 2)
    else:
        if code:  # click returns the code of its Exit, and None where a command ends
            sys.exit(code)


def _after_an_option(error: click.UsageError) -> str:
    """Where an adapter belongs that was given without its option."""
    taken = {param.name for param in error.ctx.command.params} if error.ctx else set()
    if "unexpected extra argument" in error.message and taken >= {"gene", "adapter"}:
        return ". Give a gene after --gene, another adapter after --adapter"
    return ""


def _open_streams() -> None:
    """Open what a caller has closed, or the next file would take its place."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - for the process


def _fail(message: str, code: int) -> None:
    with suppress(OSError):  # nobody can be told
        click.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(code)
