"""The command line: ``sdekit train``, ``sample``, ``nll``, ``check``, ``compare``, ``calibrate``."""

import argparse
import sys
from collections.abc import Callable

from sdekit.cli.judge import calibrate_flags, check_flags, compare_flags, run_calibrate, run_check, run_compare
from sdekit.cli.train import run_train, train_flags
from sdekit.cli.use import nll_flags, run_nll, run_sample, sample_flags
from sdekit.training.distributed import join, leave


def main(arguments: list[str] | None = None) -> None:
    """Run a command. The status is 0, 1 where a check fails, 2 for bad input, of which one line names the argument."""
    parser = argparse.ArgumentParser(
        prog="sdekit", description="Scores for diffusion models: train, sample, likelihood, and whether all is right."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (run, flags, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=run.__doc__)
        flags(command)
        command.add_argument("--device", help="cuda, cpu, ... (default: cuda where there is one)")
    options = parser.parse_args(arguments)
    try:
        options.device = join(options.device)
        fine = COMMANDS[options.command][0](options)
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        print(f"sdekit {options.command}: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        leave()
    if fine is False:
        sys.exit(1)


# name -> what runs it, and returns False where something fails; its flags; what it is for.
COMMANDS: dict[
    str, tuple[Callable[[argparse.Namespace], bool | None], Callable[[argparse.ArgumentParser], None], str]
] = {
    "train": (run_train, train_flags, "train a score"),
    "sample": (run_sample, sample_flags, "draw samples of a checkpoint"),
    "nll": (run_nll, nll_flags, "likelihood of data under a checkpoint"),
    "check": (run_check, check_flags, "is it a score of these data? if not, what is it?"),
    "compare": (run_compare, compare_flags, "which sampler, in how many evaluations?"),
    "calibrate": (run_calibrate, calibrate_flags, "fit a sampler to it"),
}
