"""Command lines with key=value overrides anywhere."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse `argv`, collecting key=value words wherever they stand into `overrides`.

    argparse alone accepts them only in one unbroken run; other unknown words are its usual error.
    """
    arguments, rest = parser.parse_known_args(argv)
    loose = [word for word in rest if "=" in word and not word.startswith("-")]
    others = [word for word in rest if word not in loose]
    if others or (loose and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(others or loose)}")
    if loose:
        arguments.overrides = [*arguments.overrides, *loose]
    return arguments
