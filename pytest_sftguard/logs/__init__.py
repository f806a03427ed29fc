"""Logs that a training left: `reading` makes a series of plain numbers of a file, `judging` says what it shows."""
