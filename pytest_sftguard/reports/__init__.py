"""The reports, one file each: pure functions from judged runs to text, properties or files."""
