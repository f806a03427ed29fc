"""Observing the training while it runs: a Recorder, and the hooks that call it.

Runs during the training, at each micro-batch and each optimizer step.
"""
