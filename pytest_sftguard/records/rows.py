"""Records of rows: the labels of the training's rows, their prompts, and the losses of the evaluation set."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_sftguard.records.tensors import NONE, Names


@dataclass(frozen=True, kw_only=True)
class DefectRecord:
    """One defect of rows."""

    name: str
    """Name of the defect, such as `unsupervised`."""
    rows: int
    """Number of rows with it; of micro-batches, if the defect is one of those."""
    step: int | None = None
    """Optimizer step of the first micro-batch with such a row; None in the data set."""
    example: str = ""
    """One such row, shortened."""
    offset: int | None = None
    """Number of places by which the labels of every such row are shifted from its tokens, positive for later tokens;
    None if no shift explains them all."""


@dataclass(frozen=True, kw_only=True)
class SupervisionRecord:
    """The labels compared with the token ids of their rows, in the micro-batches and in the data set."""

    trained_rows: int
    """Number of rows in the micro-batches."""
    dataset_rows: int
    """Number of rows of the data set that were read; 0 if it has no labels, or is a stream."""
    micro_batches: int
    """Number of micro-batches that were read."""
    asks: bool
    """Whether the target has questions, so that prompts are known."""
    answered_rows: int = 0
    """Number of rows with one of the target's questions and its answer."""
    trained_defects: tuple[DefectRecord, ...] = ()
    """Defects in the micro-batches."""
    dataset_defects: tuple[DefectRecord, ...] = ()
    """Defects in the data set."""
    strange_inputs: int | None = None
    """Number of rows in the micro-batches whose tokens are those of no row of the data set; None if not all of its rows
    were read, or if they have no labels."""
    strange_labels: int | None = None
    """Number of rows in the micro-batches whose tokens are a row's of the data set, and whose labels are not; None as
    above."""


@dataclass(frozen=True, kw_only=True)
class BatchesRecord:
    """The micro-batches of the training: how many rows each had, and rows that came more often than they should."""

    rows: tuple[int, ...] = ()
    """Number of rows of each micro-batch, of the first 4,096; empty where the inputs of one do not tell it."""
    packed: bool = False
    """Whether a row may have held several sequences."""
    loader_rows: int | None = None
    """Number of rows that the data loader puts into a micro-batch; None if it does not tell."""
    dataset_rows: int | None = None
    """Number of rows of the data set; None for a stream."""
    compared_rows: int = 0
    """Number of rows that were told apart, and counted within each epoch."""
    repeated_rows: int = 0
    """Number of distinct rows among them that came more often than the data set has them."""
    times: int = 0
    """How often the first of these came within an epoch."""
    allowed: int = 0
    """How often the data set has that row."""
    step: int | None = None
    """Optimizer step at which it came once too often."""
    uncounted: str = ""
    """Why rows could not be counted; empty if they were."""


@dataclass(frozen=True, kw_only=True)
class DeviationRecord:
    """One thing in which rows differ between the data set and the micro-batches that were made of them."""

    name: str
    """What differs: `ids` in some places, `replaced` in most of them, `mask` on the row, `padding` that the mask lets
    in, or `labels`."""
    rows: int
    """Number of rows with it."""
    step: int
    """Optimizer step of the first of them."""
    row: int
    """Its row in the micro-batch, from 0."""
    place: int
    """The first of its places that differs, from 0."""
    places: int
    """Number of its places that differ."""
    compared: int
    """Number of its places that were compared."""
    found: int
    """What the model was given at the first one."""
    expected: int
    """What it should have been given."""


@dataclass(frozen=True, kw_only=True)
class ArrivalRecord:
    """The rows that the collator was given, found again in the micro-batches that the model was given.

    Those of the first eight steps, and of each eighth.
    """

    micro_batches: int
    """Number of micro-batches that were looked at."""
    arrived_rows: int = 0
    """Number of rows whose tokens all came, or were truncated at an end."""
    unknown_rows: int = 0
    """Number of rows that were not found in their micro-batch."""
    deviations: tuple[DeviationRecord, ...] = ()
    """What differed, one of each name."""


@dataclass(frozen=True, kw_only=True)
class PromptsRecord:
    """The prompts of generation, compared with the rows of the training."""

    questions: int
    """Number of the target's prompts that were compared."""
    rows: int
    """Number of the training's rows that were compared."""
    matched: int = 0
    """Number of rows with one of the questions, which were compared token by token."""
    deviating: int = 0
    """Number of matched rows that do not begin with the tokens of generation's prompt."""
    short: int = 0
    """Number of matched rows whose prompt in generation ends before their first label."""
    forms: int = 0
    """Number of prompt ends, first and last tokens, that were compared because no row matched."""
    strange_forms: int = 0
    """Number of those ends that differ."""
    example: str = ""
    """One deviation, with its tokens."""
    pairs: int = 0
    """Number of pairs of neighbouring tokens of the questions that were looked for, because no row matched."""
    shared_pairs: float | None = None
    """Share of them that the rows hold; None if they were not looked for."""
    offset: int | None = None
    """Number that, added to the ids of the questions, makes the rows hold most of their pairs; not 0."""
    offset_pairs: float | None = None
    """Share of the pairs that the rows hold with that number added."""
    rows_reread: float | None = None
    """Share of the rows' ids that the tokenizer makes of their text again; None unless no pair is shared."""
    questions_reread: float | None = None
    """The same share of the questions' ids."""


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """The raw losses of evaluation batches: in the training's own evaluations, and in a pass after the training."""

    batches: int
    """Number of batches whose loss was seen after the training."""
    batches_in_training: int = 0
    """Number of batches whose loss was seen in the training's evaluations."""
    nonfinite: int = 0
    """Number of both with a loss that is not finite."""
    first_nonfinite: str = ""
    """The first of them."""
    without_loss: int = 0
    """Number of batches after the training for which the Trainer returned no loss."""
    rows: int = 0
    """Number of rows of those batches that have labels, supervised or not."""
    unlabelled: int = 0
    """Number of rows without a supervised token."""
    nonfinite_losses: Names = NONE
    """Evaluation losses in the Trainer's own state that are not finite."""
    never_finite: Names = NONE
    """Metrics that were not finite in any of the training's evaluations."""
    best_metric_finite: bool = True
    """Whether the best metric in the Trainer's state is finite, or absent."""
    dropouts: Names = NONE
    """Modules that dropped activations in an evaluation."""
    repeat_change: float | None = None
    """Relative difference of the losses of one batch that was evaluated twice; None if none with a finite loss was."""


@dataclass(frozen=True, kw_only=True)
class KeptRecord:
    """The checkpoint that the Trainer keeps as the best one."""

    metric: str
    """Metric by which it is chosen, such as `eval_loss`."""
    greater_is_better: bool
    """Whether more of it is better, by the Trainer's arguments."""
    loads: bool
    """Whether the best checkpoint is to be loaded at the end."""
    steps: tuple[int, ...]
    """Optimizer steps at which there were evaluations with a finite value of the metric."""
    values: tuple[float, ...]
    """Values of the metric there."""
    losses: tuple[float, ...] = ()
    """Evaluation losses there; empty unless each evaluation has a finite one."""
    best_metric: float | None = None
    """The best value by the Trainer's state; None if it has none, or one that is not finite."""
    kept_step: int | None = None
    """Step of the checkpoint that the Trainer calls the best; None if there is none."""
    gone: bool = False
    """Whether that checkpoint does not exist at the end."""
    compared: int = 0
    """Number of trained tensors that were compared with those of that checkpoint."""
    differing: Names = NONE
    """Those of them that are not the checkpoint's, bit for bit."""
