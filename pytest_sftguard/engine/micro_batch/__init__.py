"""One micro-batch of a rebuilt Trainer: its loss computed again at other weights and tokens, and what that shows.

`Repeated` computes the loss; each other module holds one property. They run for the look `first_batch`.
"""
