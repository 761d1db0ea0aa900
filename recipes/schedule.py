"""Phases: which steps are dense and which are sparse, as a function of the step alone.

A run is dense for a short warm-up, while the neurons find what they respond to, then sparse for most of its steps,
then dense for a final stretch that repairs what the cut took. Since the phase is derived from the step and from
nothing else, a resumed run is in the right phase without having saved one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from configs.errors import ConfigError
from configs.schema import Phase


@dataclass(frozen=True)
class Span:
    """A phase in steps: those after `start`, up to and including `stop`; steps count from 1."""

    mode: Literal["dense", "sparse"]
    start: int
    stop: int


def resolve_phases(phases: Sequence[Phase], steps: int) -> list[Span]:
    """Turn ends that are shares of the run into steps, and check that the phases fill it in order.

    Raises:
        ConfigError: an end out of range, phases out of order or past the end, or a run that they leave unfinished.
    """
    spans: list[Span] = []
    end = 0.0
    if not phases:
        raise ConfigError('schedule.phases is empty: give at least one, such as [{mode = "dense", end = 1.0}]')
    for index, phase in enumerate(phases):
        key = f"schedule.phases[{index}].end = {phase.end}"
        if isinstance(phase.end, float) and not 0 < phase.end <= 1:
            raise ConfigError(f"{key} is no share of the run: give a fraction up to 1.0, or a step as a whole number")
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
        # A short run rounds a small share to no step at all; such a phase is left out.
        if stop > start:
            spans.append(Span(phase.mode, start, stop))
    if end != steps:
        raise ConfigError(
            f"schedule.phases end at step {end:g} of training.steps = {steps}: let the last one end at 1.0"
        )
    return spans


def span_at(spans: Sequence[Span], step: int) -> Span:
    """The phase that a step, counted from 1, belongs to; the last one for steps past the end."""
    return next((span for span in spans if step <= span.stop), spans[-1])
