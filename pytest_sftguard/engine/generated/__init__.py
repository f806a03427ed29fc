"""Generated faults and generated trainings: what nobody listed, each replayed from a seed and a number.

`python -m pytest_sftguard faults --generate` and `--healthy` run them. A grammar composes a fault, and a measurement
that uses nothing of the guard says whether it has an effect, or whether a training learns.
"""
