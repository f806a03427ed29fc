"""The subcommands of `python -m pytest_sftguard`, one file each: `add` declares it, `run` runs it."""

SUBCOMMANDS = ("fit", "faults", "judge", "bundle", "explain")
"""Their names, in the order of `--help`."""
