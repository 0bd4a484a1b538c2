"""The command line. Every command is a few lines over a function; whatever is heavy is imported inside it, so that help is instant."""

from __future__ import annotations

import errno
import json
import traceback
from pathlib import Path
from typing import Any, NoReturn

import click

import alignkit
from alignkit.errors import AlignkitError, Interrupted
from alignkit.interfaces import Command
from alignkit.registry import find_plugins

_OF_THE_DISK = frozenset(
    [errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG]
)
"""What a folder or a disk may refuse at any time. A file that is not there is missing here: that is either checked before, or a bug."""


class _Guarded(click.Group):
    """Commands of its own and of plugins. Turns whatever goes wrong into a message and an exit code: the error's own for what the user
    can repair (2 as a rule), 1 for a bug.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *find_plugins().specs(Command)})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        registry = find_plugins()
        if cmd_name not in registry.specs(Command):
            return None
        command = registry.command(cmd_name).build()
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit, BrokenPipeError):
            raise  # click's own business; it ends quietly when a reader such as `head` has gone
        except Interrupted as stop:
            click.echo(str(stop), err=True)
            ctx.exit(stop.exit_code)
        except AlignkitError as error:
            click.echo(f"{click.style('error:', fg='red', bold=True)} {error}", err=True)
            ctx.exit(error.exit_code)
        except OSError as error:
            if error.filename is None or error.errno not in _OF_THE_DISK:
                _bug(ctx)
            click.echo(f"{click.style('error:', fg='red', bold=True)} {error.filename}: {error.strerror}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo("\ninterrupted", err=True)
            ctx.exit(130)
        # The outermost frame of the program: nothing is repaired or hidden here, the whole traceback is shown and the exit code is 1.
        except Exception:
            _bug(ctx)


def _bug(ctx: click.Context) -> NoReturn:
    """Show the exception that is being handled in full."""
    click.echo(traceback.format_exc(), err=True, nl=False)
    click.echo(f"{click.style('bug:', fg='red', bold=True)} this is alignkit's fault; please report it with the lines above", err=True)
    ctx.exit(1)


_CONFIG = click.argument("config", type=click.Path(path_type=Path))
_OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
_FOLDER = click.Path(path_type=Path, file_okay=False)


@click.group(cls=_Guarded, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(alignkit.__version__, prog_name="alignkit", message="%(prog)s %(version)s")
def cli() -> None:
    """Align a language model with human feedback."""


@cli.command()
@_CONFIG
@_OVERRIDES
@click.option("--fresh", is_flag=True, help="Start anew; the folder of an earlier run is kept beside the new one.")
@click.option("--accept-changes", is_flag=True, help="Go on although config, data, chat template or plugins are not what they were.")
def run(config: Path, overrides: tuple[str, ...], fresh: bool, accept_changes: bool) -> None:
    """Run CONFIG, or continue it where it stopped.

    A KEY=VALUE overrides the file, such as ppo.optimizer.kl.coef=0.1 (a stage is addressed by its name).
    """
    from alignkit.runner import run_config

    run_config(config, overrides, fresh=fresh, accept_changes=accept_changes)


@cli.command()
@_CONFIG
@_OVERRIDES
def check(config: Path, overrides: tuple[str, ...]) -> None:
    """Show every mistake in CONFIG, without running it.

    If there is none: every value with its origin, and what the run will take.
    """
    from alignkit.config import estimate, explain, load_config

    loaded = load_config(config, overrides, find_plugins())
    click.echo(explain(loaded))
    click.echo(str(estimate(loaded)))


@cli.command()
def plugins() -> None:
    """Show what is installed, and what failed to load.

    Kinds are listed by what they are, with the package they came in; failures with their cause and remedy.
    """
    from alignkit.listing import describe_plugins

    click.echo(describe_plugins(find_plugins()))


@cli.command()
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="Write to this file instead of the terminal.")
def schema(output: Path | None) -> None:
    """Export the JSON schema of configs, for editors.

    The keys of every installed plugin are included.
    """
    from alignkit.config import json_schema

    text = json.dumps(json_schema(find_plugins()), indent=2) + "\n"
    if output is None:
        click.echo(text, nl=False)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
        click.echo(f"wrote {output}")


@cli.group()
def new() -> None:
    """Start something of your own."""


@new.command("plugin")
@click.argument("name")
@click.option("--dir", "parent", type=_FOLDER, default=Path("."), help="Where the package's folder is made (here).")
def new_plugin(name: str, parent: Path) -> None:
    """Write a tested package with a reward source of kind NAME, to start a plugin from."""
    from alignkit.scaffold import write_plugin

    folder = write_plugin(name, parent)
    click.echo(f"wrote {folder}; next: pip install --editable {folder} && pytest {folder}")


@cli.group()
def data() -> None:
    """Look at data before training on it."""


@data.command()
@_CONFIG
@click.argument("stage")
@click.option("--rows", type=click.IntRange(min=1), default=3, show_default=True, help="How many rows.")
def preview(config: Path, stage: str, rows: int) -> None:
    """Show the first rows of a STAGE of CONFIG as the model will see them."""
    from alignkit.config import load_config
    from alignkit.data.preview import preview as render

    registry = find_plugins()
    click.echo(render(load_config(config, (), registry), registry, stage, rows))


@cli.group()
def init() -> None:
    """Write a config that runs as it is."""


@init.command()
@click.option("--dir", "folder", type=_FOLDER, default=Path("quickstart"), show_default=True, help="Where the files are put.")
def quickstart(folder: Path) -> None:
    """Write the quickstart's config and fetch its data and model."""
    from alignkit.quickstart import init as write_quickstart

    click.echo(f"next: alignkit run {write_quickstart(folder)}")


@cli.command()
@click.argument("run_dir", type=_FOLDER)
def report(run_dir: Path) -> None:
    """Write report.html into RUN_DIR.

    Curves, samples before and after, and evaluations of the run.
    """
    from alignkit.report import write_report

    click.echo(f"wrote {write_report(run_dir)}")


def main() -> None:
    """The entry point of the ``alignkit`` command."""
    cli(prog_name="alignkit")
