"""Process state that a run must leave as it found it: switches, generators, threads, garbage, a lost device.

Wrapped around every cell and every look; nothing here depends on what is trained.
"""
