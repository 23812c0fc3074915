"""Entry point of one rank: `deepspeed --num_gpus 8 --module tcopd_fast.train --config FILE [key=value …]`."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence

from tcopd_fast.arguments import parse
from tcopd_fast.config import Config
from tcopd_fast.config_io import config_help, dump_config, load_config
from tcopd_fast.errors import PeerError, UserError
from tcopd_fast.stop import Stop

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments shared by `tcopd train` and this module."""
    parser.add_argument("--config", metavar="FILE", help="YAML configuration")
    parser.add_argument("--resume", metavar="RUN", help="continue the run in this folder from its newest checkpoint")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="override any key, for example learner.lr=1e-5"
    )


def resolve(arguments: argparse.Namespace) -> Config:
    """The configuration that the arguments ask for. Raises UserError."""
    from tcopd_fast import rundir

    if arguments.resume:
        if arguments.config:
            raise UserError("--resume takes its configuration from the run; leave out --config")
        return rundir.open_run(arguments.resume, arguments.overrides)
    if not arguments.config:
        raise UserError("--config FILE is required (or --resume RUN); see configs/ for examples")
    return load_config(arguments.config, arguments.overrides)


def resolve_here(arguments: argparse.Namespace) -> Config:
    """`resolve` for one rank of several. The first rank of a machine alone reports what is refused: the others there
    have read the same words and files."""
    try:
        return resolve(arguments)
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            raise PeerError(str(error)) from error
        raise


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check, train; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="tcopd_fast.train",
        description=__doc__,
        epilog=config_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    # The deepspeed launcher adds --local_rank unless told not to; the rank comes from the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    arguments = parse(parser, argv)
    stop = Stop()
    stop.listen()
    try:
        config = resolve_here(arguments)
        if arguments.print_config:
            print(dump_config(config), end="")
            return 0
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from tcopd_fast.trainer import train

        train(config, resume=bool(arguments.resume), stop=stop)
    except PeerError:
        return 2
    except UserError as error:
        # A rank can meet an error of its own, so none is silent.
        rank = os.environ.get("RANK", "0")
        print(f"error: {error}" if rank == "0" else f"error (rank {rank}): {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        print(
            f"error: {error.filename or config.run_dir}: {error.strerror}; make room, then continue with "
            f"`tcopd train --resume {config.run_dir}`",
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
