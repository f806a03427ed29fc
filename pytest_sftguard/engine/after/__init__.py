"""Using the finished model: forward passes outside the training, generation, parsed answers.

Runs after the training; looks at the first step use its forward passes too.
"""
