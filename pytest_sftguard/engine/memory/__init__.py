"""Will it fit: a rehearsal of the training on fake tensors, and the largest batch that a device holds.

Runs before a cell is trained, and for `python -m pytest_sftguard fit`.
"""
