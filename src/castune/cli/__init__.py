"""The command line: parse, call, print. Heavy imports stay inside the commands."""

from castune.cli.commands import app
from castune.cli.entry import main

__all__ = ["app", "main"]
