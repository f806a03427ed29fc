"""What is observed while the training runs: a Recorder, and the hooks that tell it what happens.

Runs during the training, at each micro-batch and each optimizer step.
"""
