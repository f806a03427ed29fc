"""What was seen of the first optimizer step beyond its loss: what the forward pass depends on, and what it averages."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class FirstStepRecord:
    """The micro-batches of the first step, in which every run of a target still has the same weights."""

    random: str = ""
    """Where the forward pass draws random numbers: empty: nowhere; `adapter`: dropout before the factors alone;
    `model`: elsewhere."""
    micro_tokens: tuple[int, ...] = ()
    """Labels that count after the shift, of each micro-batch."""
    micro_token_losses: tuple[float, ...] = ()
    """Mean over those labels, of each micro-batch, computed from the logits that the model returned; 0 without any."""
    labels: int | None = None
    """Labels that count, those at the first position of a row too, which nothing predicts; None without logits."""
    token_loss: float | None = None
    """The same over all labels of the step; None where the model returned no logits, or labels are no token ids."""
    label_entropy: float | None = None
    """Entropy of the distribution of the step's labels, in nats: the loss of whoever knows no more than that."""
