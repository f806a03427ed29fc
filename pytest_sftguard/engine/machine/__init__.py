"""Devices: profiles of the real ones, and simulated ones for which torch answers.

Runs before a cell is trained, and in tests of code that depends on the hardware.
"""
