"""The task: units, questions, statements of facts, the form of answers, and the rows that teach it.

Read whenever something is trained, validated or made; needs no torch but to collate a batch.
"""
