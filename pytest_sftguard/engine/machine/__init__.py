"""The device: what the real one says of itself, and a simulated one that torch answers for.

Runs before a cell is trained, and in tests of code that chooses by hardware.
"""
