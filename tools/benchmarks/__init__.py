"""Measurements: what watching costs, how fast the app trains, how well memory is predicted."""
