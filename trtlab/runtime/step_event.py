"""Makes the record of a step from what the scheduler chose and what the blocks became. Changes nothing else."""

from __future__ import annotations

from trtlab.runtime.events import Finish, StepEvent, Work
from trtlab.runtime.scheduler import NextStep, Scheduler


def step_event(
    number: int,
    times: tuple[float, float],
    step: NextStep,
    work: tuple[Work, ...],
    finished: tuple[Finish, ...],
    scheduler: Scheduler,
) -> StepEvent:
    """The event of a step that has just ended; the blocks' changes are taken from the scheduler's pool.

    Args:
        number: The step's number.
        times: Its start and end on the session's clock, in seconds.
        step: What the scheduler chose.
        work: Each request's share.
        finished: The requests that ended since the last event.
        scheduler: The queues and blocks after the step.
    """
    blocks = scheduler.blocks
    return StepEvent(
        step=number,
        start_s=times[0],
        end_s=times[1],
        work=work,
        admitted=tuple(step.admitted),
        preempted=tuple(request.number for request in step.preempted),
        finished=finished,
        waiting=tuple(request.number for request in scheduler.waiting),
        blocks=blocks.changes(),
        used=blocks.used,
        cached=blocks.cached,
        free=blocks.available - blocks.cached,
    )
