"""The command mixtral-parity."""

import sys
import traceback

import click

from parity.commands.compare import compare
from parity.commands.record import record
from parity.commands.run import EXAMPLES, run
from parity.commands.selftest import selftest
from parity.compilation_cache import keep_compilations

__all__ = ["main"]

BAD_INPUT, UNCHECKED, INTERRUPTED = 3, 4, 5


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=EXAMPLES)
@click.version_option(package_name="flax-mixtral")
def cli() -> None:
    """Compare Flax's Mixtral with PyTorch's, block by block, against an exact float64 run.

    Compiled programs are kept for the next run, in the user's cache directory. JAX_COMPILATION_CACHE_DIR names another
    one, and JAX_ENABLE_COMPILATION_CACHE=false keeps none.
    """


cli.add_command(run)
cli.add_command(record)
cli.add_command(compare)
cli.add_command(selftest)


def main() -> None:
    """Run the command; every refusal is one message on stderr and its exit code."""
    keep_compilations()
    from convert import BadInput
    from flax_mixtral.config import ConfigError

    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; nothing was written", err=True)
        sys.exit(INTERRUPTED)
    except (BadInput, ConfigError) as error:
        click.echo(f"mixtral-parity: {error}", err=True)
        sys.exit(BAD_INPUT)
    except Exception:  # what nobody has foreseen: nothing is known of parity, which exit code 1 would say has failed
        traceback.print_exc()
        sys.exit(UNCHECKED)


if __name__ == "__main__":
    main()
