"""How the repository's own data files, tokenizer and embedded model were made.

Run by hand, each as `python -m homework.making.NAME`; training and testing need none of it.
"""
