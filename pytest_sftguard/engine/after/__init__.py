"""What is asked of the finished model: forward passes beside the training, generation, answers.

Runs after the training; the first step uses its forward passes too.
"""
