"""The command line ``als-ext``: run, compare, correct, info."""

from als_ext.cli.app import main

__all__ = ["main"]
