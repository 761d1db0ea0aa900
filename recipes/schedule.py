"""Phases: which steps are dense and which are sparse, as a function of the step alone.

A run usually starts with a short dense phase, in which the neurons specialise. It is sparse for most of its steps, and
ends with a dense phase, which recovers loss. The phase depends only on the step, so checkpoints need not store it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from configs.errors import ConfigError
from configs.schema import Phase

Kind: TypeAlias = tuple[Literal["dense", "sparse"], float | None]
"""What a step of a phase computes: its mode, and the share of the groups that is the phase's own."""


@dataclass(frozen=True)
class Span:
    """A phase: the steps start + 1 to stop, counted from 1; keep is None where it is that of the recipe."""

    mode: Literal["dense", "sparse"]
    start: int
    stop: int
    keep: float | None = None

    @property
    def kind(self) -> Kind:
        """Phases of one kind differ in their steps alone."""
        return self.mode, self.keep

    @property
    def name(self) -> str:
        """The kind, for a person to read."""
        return self.mode if self.keep is None else f"{self.mode} ({self.keep:g})"


def resolve_phases(phases: Sequence[Phase], steps: int) -> list[Span]:
    """The phases in steps; ends that are shares of the run are rounded to steps.

    Args:
        phases: schedule.phases.
        steps: training.steps.

    Raises:
        ConfigError: an end is out of range, the phases are not in order, or the last one does not end the run.
    """
    spans: list[Span] = []
    end = 0.0
    if not phases:
        raise ConfigError('schedule.phases is empty: give at least one, such as [{mode = "dense", end = 1.0}]')
    for index, phase in enumerate(phases):
        key = f"schedule.phases[{index}].end = {phase.end}"
        if isinstance(phase.end, float) and not 0 < phase.end <= 1:
            raise ConfigError(f"{key} is not a share of the run: give a fraction up to 1.0 or a whole number of steps")
        previous, end = end, phase.end * steps if isinstance(phase.end, float) else float(phase.end)
        if end > steps:
            raise ConfigError(f"{key} is past the end of the run, training.steps = {steps}: end the phase at 1.0")
        if end <= 0:
            raise ConfigError(f"{key} is before the first step: give a fraction up to 1.0, or a step from 1")
        if end <= previous:
            raise ConfigError(
                f"{key} is step {end:g}, but the phase before it ends at step {previous:g}: put them in order"
            )
        start, stop = spans[-1].stop if spans else 0, round(end)
        # In a short run a small share can round to no step; such a phase is left out.
        if stop > start:
            spans.append(Span(phase.mode, start, stop, phase.keep))
    if end != steps:
        raise ConfigError(
            f"schedule.phases end at step {end:g} of training.steps = {steps}: let the last one end at 1.0"
        )
    return spans


def span_at(spans: Sequence[Span], step: int) -> Span:
    """The phase of a step, counted from 1; the last phase for later steps."""
    return next((span for span in spans if step <= span.stop), spans[-1])
