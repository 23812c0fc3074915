"""The one exception type a user is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """Bad input found before heavy work: the message names the field or file, the value and the remedy.

    The command line prints the message alone, without a traceback, and exits with status 2.
    """


class PeerError(UserError):
    """Another rank met the error and has reported it; this one only ends."""
