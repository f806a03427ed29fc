"""The adapter and its base: which tensors are which, how they start, and whether a file brings them back.

Runs before the first step and after the last one.
"""
