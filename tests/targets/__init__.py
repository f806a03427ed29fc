"""Trainings for the tests: each function is a target, healthy or with one thing wrong."""
