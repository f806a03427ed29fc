"""The programs that made the data files, the tokenizer and the embedded model of the repository.

Run by hand, each as `python -m homework.making.NAME`; training and testing need none of it.
"""
