"""What a target trains on: rows of token ids with their labels, and the questions that they hold.

Looks read it before and after a training.
"""
