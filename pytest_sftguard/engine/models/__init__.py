"""Model sources of the built-in target, one file each."""
