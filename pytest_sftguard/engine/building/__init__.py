"""From a dotted path to a ready Trainer: targets, their arguments, and checkpoints that are read once.

Runs at the start of every cell, and again wherever a look or the round trip needs a second build.
"""
