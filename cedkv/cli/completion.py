"""``cedkv completion``: the script that completes commands, options and registered names in a shell."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from cedkv.cli.click_ext import GroupedCommand


@click.command("completion", cls=GroupedCommand)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion_command(ctx: click.Context, shell: str) -> None:
    """Print the script that completes cedkv's commands, options, selectors and tasks.

    \b
    bash, in ~/.bashrc:                    eval "$(cedkv completion bash)"
    zsh, in ~/.zshrc, after compinit:      eval "$(cedkv completion zsh)"
    fish, once:                            cedkv completion fish > ~/.config/fish/completions/cedkv.fish

    It completes the installed command `cedkv`, not `python -m cedkv`.
    """
    completer = get_completion_class(shell)
    assert completer is not None
    click.echo(completer(ctx.find_root().command, {}, "cedkv", "_CEDKV_COMPLETE").source())
