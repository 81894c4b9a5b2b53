"""`zml slurm`: the group. Its commands are in `zml.slurm.cli`, which is loaded when one of them is asked for."""

import click

COMMANDS = ("script", "submit", "head")


class Later(click.Group):
    """Knows the names of its commands, and loads them when one is wanted."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        from ..slurm import cli

        return cli.COMMANDS[cmd_name]


@click.group(cls=Later, invoke_without_command=True)
@click.pass_context
def slurm(context: click.Context) -> None:
    """Train in an allocation of Slurm.

    \b
    zml slurm submit -N 4 -w 8 -p 2 --time 4:00:00 train.py --lr 0.1
    zml slurm script -N 4 -w 8 -p 2 train.py > train.sbatch    the same, to read and change
    zml slurm submit --join runs/slurm-1234 -w 4               more workers for a job that is going on
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
