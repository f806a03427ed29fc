"""The task: units, questions, statements of facts, the form of answers, and the rows that teach it.

Pure Python; read by training, validation and the making of the embedded model.
"""
