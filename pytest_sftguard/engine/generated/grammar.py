"""The grammar of generated faults: where, what, how much, when and to whom.

A station says what passes through it, and an operation what it can be applied to. What follows from the two decides
which combinations mean something; there is no list of them. A draw is replayed from its seed and its number.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

NUMBERS, IDS, MASK = "numbers", "ids", "mask"


@dataclass(frozen=True, kw_only=True)
class Station:
    """A place in the training through which a value passes."""

    name: str
    """Its name."""
    passes: str
    """What passes through it: `numbers` (floating point), `ids` (tokens or labels) or a `mask`."""
    value: str
    """The value in words; `{}` stands for the tensors or modules that were chosen."""
    whom: tuple[str, ...]
    """What a fault can be limited to: one `tensor`, one `layer`, one `row`, or nothing (`all`)."""
    array: bool = True
    """Whether the value has many entries; a loss or a learning rate has one."""
    stepwise: bool = True
    """Whether a value passes in each optimizer step, so that there is a step before."""
    graph: bool = False
    """Whether gradients flow back through the value, so that an older one cannot take its place."""
    needs: str = ""
    """Property that a training must have: `scaler`, `clipping`, `questions`, `answers`; empty if any will do."""


STATIONS: dict[str, Station] = {
    s.name: s
    for s in (
        Station(
            name="data",
            passes=IDS,
            value="the token sequence of {} of the data set",
            whom=("row", "all"),
            stepwise=False,
            # without them another text is another data set, and no fault
            needs="questions",
        ),
        Station(name="collator", passes=IDS, value="the input of {} of each batch", whom=("row", "all")),
        Station(name="labels", passes=IDS, value="the label sequence of {} of each batch", whom=("row", "all")),
        Station(name="mask", passes=MASK, value="the attention mask of {} of each batch", whom=("row", "all")),
        Station(
            name="forward", passes=NUMBERS, value="the output of {}", whom=("tensor", "layer", "row", "all"), graph=True
        ),
        Station(name="loss", passes=NUMBERS, value="the loss", whom=("all",), array=False, graph=True),
        Station(
            name="backward",
            passes=NUMBERS,
            value="the gradient of {} in the backward pass",
            whom=("tensor", "layer", "row", "all"),
        ),
        Station(
            name="unscale",
            passes=NUMBERS,
            value="the gradient of {} after unscaling",
            whom=("tensor", "layer", "row", "all"),
            needs="scaler",
        ),
        Station(
            name="clip",
            passes=NUMBERS,
            value="the gradient of {} after clipping",
            whom=("tensor", "layer", "row", "all"),
            needs="clipping",
        ),
        Station(
            name="optimizer",
            passes=NUMBERS,
            value="the update of {} by the optimizer",
            whom=("tensor", "layer", "row", "all"),
        ),
        Station(name="schedule", passes=NUMBERS, value="the learning rate", whom=("all",), array=False),
        Station(
            name="checkpoint",
            passes=NUMBERS,
            value="the optimizer's state for {}, resumed from a checkpoint,",
            whom=("tensor", "layer", "row", "all"),
            stepwise=False,
        ),
        Station(
            name="save",
            passes=NUMBERS,
            value="the saved copy of {}",
            whom=("tensor", "layer", "row", "all"),
            stepwise=False,
        ),
        Station(
            name="load",
            passes=NUMBERS,
            value="the loaded copy of {}",
            whom=("tensor", "layer", "row", "all"),
            stepwise=False,
        ),
        Station(
            name="generate",
            passes=NUMBERS,
            value="the logit vector of {} in generation",
            whom=("row", "all"),
            stepwise=False,
            needs="answers",
        ),
    )
}
"""Every station by its name, in the order in which a training comes past them."""


@dataclass(frozen=True, kw_only=True)
class Operation:
    """What is done to a value."""

    name: str
    """Its name."""
    on: tuple[str, ...]
    """What it can be applied to."""
    does: str
    """What happens, in words; `{}` stands for the magnitude."""
    share: bool
    """Whether the magnitude is the share of the entries that are changed; else the size of a change of every entry."""
    needs_array: bool = False
    """Whether it moves entries, of which there must be several."""
    needs_past: bool = False
    """Whether it puts the value of an earlier step in the place of this one."""


OPERATIONS: dict[str, Operation] = {
    o.name: o
    for o in (
        Operation(name="scale", on=(NUMBERS,), does="is scaled by {}", share=False),
        Operation(name="shift", on=(NUMBERS, IDS, MASK), does="is shifted by {}", share=False),
        Operation(
            name="swap",
            on=(NUMBERS, IDS, MASK),
            does="has {} exchanged with others",
            share=True,
            needs_array=True,
        ),
        Operation(name="drop", on=(NUMBERS, IDS, MASK), does="loses {}", share=True),
        Operation(
            name="repeat",
            on=(NUMBERS, IDS, MASK),
            does="has {} overwritten by their neighbours",
            share=True,
            needs_array=True,
        ),
        Operation(
            name="freeze",
            on=(NUMBERS, IDS, MASK),
            does="stays that of its first step in {}",
            share=True,
            needs_past=True,
        ),
        Operation(name="noise", on=(NUMBERS,), does="gets noise of {} of its root mean square", share=False),
        Operation(name="random", on=(IDS, MASK), does="has {} drawn at random", share=True, needs_array=True),
        Operation(name="cast", on=(NUMBERS,), does="is rounded to a relative precision of {}", share=False),
        Operation(name="non-finite", on=(NUMBERS,), does="becomes NaN in {}", share=True),
        Operation(
            name="stale", on=(NUMBERS, IDS, MASK), does="is that of the step before in {}", share=True, needs_past=True
        ),
        Operation(name="sign", on=(NUMBERS, MASK), does="changes its sign in {}", share=True),
    )
}
"""Every operation by its name. On ids and masks, noise is a random draw, and a shift moves along the tokens."""

SMALLEST, LARGEST = 1e-3, 10.0
"""Sizes of a change, relative to the value's root mean square."""
SMALLEST_SHARE = 1 / 64
"""Smallest share of the ids or places of a mask; at least one is changed."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A training that faults are put into, by what the guard is asked to run."""

    name: str
    """Its name."""
    target: str
    """Dotted path of the function that builds its Trainer."""
    precision: str = "fp32"
    """Precision mode."""
    batch: tuple[int, int] = (4, 1)
    """Micro-batch and gradient accumulation."""
    steps: int = 6
    """Optimizer steps."""
    asks: bool = False
    """Whether it is trained until its answers can be asked for."""
    clips: bool = False
    """Whether its gradients are clipped."""
    arguments: tuple[tuple[str, Any], ...] = ()
    """TrainingArguments beyond the target's own."""

    def has(self, need: str) -> bool:
        """Whether the training has the property `need` of a station."""
        found = {
            "": True,
            "scaler": self.precision == "fp16-mixed",
            "clipping": self.clips,
            "questions": self.target.startswith(_SUMS),
            "answers": self.asks,
        }
        return found[need]


_SUMS = "pytest_sftguard.engine.models.sums:build_trainer"
_TINY = "pytest_sftguard.engine.models.tiny:build_trainer"
# A norm below that of the gradients in every step
_CLIPPED = ("max_grad_norm", 0.05)

SETTINGS: tuple[Setting, ...] = (
    Setting(name="sums", target=_SUMS, batch=(2, 2), arguments=(("max_grad_norm", 0.0),)),
    Setting(name="sums clipped", target=_SUMS, clips=True, arguments=(_CLIPPED, ("lr_scheduler_type", "cosine"))),
    Setting(name="sums in bf16-mixed", target=_SUMS, precision="bf16-mixed", clips=True, arguments=(_CLIPPED,)),
    Setting(name="sums in fp16-mixed", target=_SUMS, precision="fp16-mixed", clips=True, arguments=(_CLIPPED,)),
    Setting(name="sums with answers", target=_SUMS, steps=100, asks=True, arguments=(("max_grad_norm", 0.0),)),
    Setting(name="tiny", target=_TINY, batch=(4, 2), clips=True, arguments=(_CLIPPED, ("weight_decay", 0.1))),
    Setting(name="tiny with momentum", target=_TINY, arguments=(("optim", "sgd"), ("optim_args", "momentum=0.9"))),
    Setting(name="tiny in fp16-mixed", target=_TINY, precision="fp16-mixed", batch=(2, 2)),
)
"""The trainings that faults are put into."""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One composed fault."""

    seed: int
    """Seed of the study."""
    number: int
    """Its number in the study, from 0."""
    setting: Setting
    """The training that it is put into."""
    where: str
    """Name of the station."""
    what: str
    """Name of the operation."""
    magnitude: float
    """How much: a share of the entries, or a size relative to the value's root mean square."""
    first: int = 1
    """First optimizer step that it affects, from 1."""
    every: int = 1
    """It affects every such step from there on."""
    whom: str = "all"
    """What it is limited to: `tensor`, `layer`, `row` or `all`."""
    choice: float = 0.0
    """Which tensor, layer or row, as a place between 0 and 1 in their order."""

    @property
    def id(self) -> str:
        """The seed and the number, with which it is replayed."""
        return f"{self.seed}-{self.number}"

    @property
    def name(self) -> str:
        """Where and what."""
        return f"{self.where} {self.what}"

    def affects(self, step: int) -> bool:
        """Whether the optimizer step `step`, from 1, is affected."""
        return step >= self.first and (step - self.first) % self.every == 0

    def describe(self, subject: str = "") -> str:
        """The fault in one sentence; `subject` is what was chosen, such as `layer 1's q_proj.lora_B`."""
        station, operation = STATIONS[self.where], OPERATIONS[self.what]
        value = station.value.format(subject or {"all": "all"}.get(self.whom, f"one {self.whom}"))
        return f"{self._when()}{value} {operation.does.format(self._amount(station, operation))}"

    def _when(self) -> str:
        if self.every > 1:
            return f"in every {'2nd' if self.every == 2 else f'{self.every}rd'} step from step {self.first} on, "
        return f"from step {self.first} on, " if self.first > 1 else ""

    def _amount(self, station: Station, operation: Operation) -> str:
        if station.passes != NUMBERS and operation.name == "shift":
            return f"{places(self.magnitude)} places"
        if operation.share:
            return f"{100 * self.magnitude:.2g} % of {'its entries' if station.array else 'its size'}"
        if operation.name == "scale":
            return f"{factor(self.magnitude, self.choice):.4g}"
        if operation.name == "shift":
            return f"{self.magnitude:.2g} of its root mean square"
        return f"{self.magnitude:.2g}"


def factor(magnitude: float, choice: float) -> float:
    """The factor of a scaling: above 1 for one half of all choices, below for the other."""
    return 1 + magnitude if math.floor(choice * 1000) % 2 else 1 / (1 + magnitude)


def places(magnitude: float) -> int:
    """How many tokens far ids are shifted."""
    return max(1, round(4 * magnitude))


def meaningful(station: Station, operation: Operation) -> bool:
    """Whether the operation can be applied to what passes through the station."""
    return (
        station.passes in operation.on
        and (station.array or not operation.needs_array)
        and not (operation.needs_past and (station.graph or not station.stepwise))
    )


def compose(seed: int, number: int) -> Draw:
    """The fault with this number of the study with this seed."""
    # a text seeds it alike in every process
    draw = random.Random(f"fault {seed} {number}")
    station = draw.choice(list(STATIONS.values()))
    operation = draw.choice([o for o in OPERATIONS.values() if meaningful(station, o)])
    setting = draw.choice([s for s in SETTINGS if s.has(station.needs)])
    low = SMALLEST if station.passes == NUMBERS else SMALLEST_SHARE
    # no number is precise to more than itself
    high = 1.0 if operation.share or operation.name == "cast" else LARGEST
    whom = draw.choice(station.whom)
    first, every = _when(draw, station, operation, setting.steps)
    return Draw(
        seed=seed,
        number=number,
        setting=setting,
        where=station.name,
        what=operation.name,
        magnitude=math.exp(draw.uniform(math.log(low), math.log(high))),
        first=first,
        every=every,
        whom=whom,
        choice=draw.random(),
    )


def _when(draw: random.Random, station: Station, operation: Operation, steps: int) -> tuple[int, int]:
    """The first step that is affected, and the distance to the next: always, from a step on, or every few steps."""
    if not station.stepwise:
        return 1, 1
    when = draw.choice(("always", "always", "from", "every"))
    # the first step has none before it
    earliest = 2 if operation.needs_past else 1
    if when == "from":
        return draw.randint(2, max(2, steps // 2)), 1
    return earliest, draw.randint(2, 3) if when == "every" else 1
