"""Peak memory: a rehearsal of the training on fake tensors, and the largest batch that fits a device.

Runs before a cell is trained, and for `python -m pytest_sftguard fit`.
"""
