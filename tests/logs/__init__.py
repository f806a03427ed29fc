"""Tests of what is read from logs, and what they show."""
