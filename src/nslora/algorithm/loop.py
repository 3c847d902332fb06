"""Algorithm 1: interleave numerical and symbolic moves, deciding round by round from what each input needs.

Read this module first, then router, monitor, needs, numerical, symbolic, remake, session. The
numbers in the margin are the lines of Algorithm 1 in paper/main.tex.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace

from nslora.algorithm import monitor
from nslora.algorithm.needs import ESTIMATORS, Needs
from nslora.algorithm.numerical import numerical
from nslora.algorithm.router import DECISIONS, Choice
from nslora.algorithm.session import Outcome, Session, State
from nslora.algorithm.symbolic import symbolic
from nslora.config import RunConfig
from nslora.tasks.build import build, phases
from nslora.types import Candidate, Move, Scored, Signal, StepRecord

MOVES: Mapping[Move, Callable[[Session, State, Needs], Outcome]] = {
    Move.NUMERICAL: numerical,
    Move.SYMBOLIC: symbolic,
}
# is told every state as soon as it is there, and what was estimated before its move
Watch = Callable[[State, Needs | None], None]


def adapt(run: Session, state: State, watch: Watch) -> State:
    """Adapt a candidate, whose weights are in place, within the budget of moves.

    Returns the last state; `best` finds the step to return in its history. A state that comes from
    an interrupted run is scored, and goes on with its next move.
    """
    cfg = run.cfg
    decide = DECISIONS[cfg.row.decision]
    estimate = ESTIMATORS[cfg.row.needs]
    if not state.dev:
        state = begin(run, state)  # ----------------------- 1: score the start
        watch(state, None)
    while left(state, cfg):  # ------------------------ 2: while budget is left
        needs = estimate(run, state)  # --------- 3: what does each input need?
        choice = decide(state.moves, needs, cfg)  # ----- 4: weights or prompt?
        if choice.move is Move.STOP or not run.affords(choice.move):  # ----- 5
            break
        move = MOVES[choice.move]
        outcome = move(run, state, needs)  # ----------------- 6: make the move
        state = after(run, state, needs, choice, outcome)  # - 7: score, signal
        watch(state, needs)
    return state  # ------------------------------ 8: the best candidate on dev


def left(state: State, cfg: RunConfig) -> int:
    """Return how many moves the phase may still make.

    With `rounds` the phases of a stream share one budget: what a phase leaves others can use, and
    no phase knows how many come.
    """
    if not cfg.rounds:
        return cfg.moves - len(state.moves)
    made = sum(step.move in list(Move) for step in state.whole)
    return min(cfg.rounds - len(state.moves), cfg.moves * phases(cfg) - made)


def begin(run: Session, state: State) -> State:
    """Score the candidate as it is; the record opens a phase."""
    run.bill()  # what was spent before belongs to no move
    dev, train = run.score_dev_and_train(state.candidate.prompt)
    # the number of the step goes on from the phase before
    record = _record(state, "start", "", dev, train)
    record = replace(record, bill=asdict(run.bill()))
    # losses of an earlier phase are of other weights: C1 starts anew
    memory = replace(state.memory, losses={})
    return replace(
        state, dev=dev, train=train, history=(record,), memory=memory
    )


def after(
    run: Session, state: State, needs: Needs, choice: Choice, outcome: Outcome
) -> State:
    """Score the new candidate, compute the monitoring signal, and record the move."""
    # replies that the move itself has made are not made again
    dev, train = run.score_dev_and_train(outcome.candidate.prompt)
    signal = monitor.after(state, choice.move, outcome, dev)
    # the state before the move is what the signal compares with
    moved = replace(
        state,
        candidate=outcome.candidate,
        memory=outcome.memory,
        dev=dev,
        train=train,
    )
    record = replace(
        _record(moved, choice.move, choice.reason, dev, train),
        signal=signal,
        demand=needs.demand,
        evidence=outcome.evidence,
        bill=asdict(outcome.bill + run.bill()),
    )
    return replace(moved, history=(*state.history, record))


def _record(
    state: State,
    move: str,
    reason: str,
    dev: Sequence[Scored],
    train: Sequence[Scored],
) -> StepRecord:
    """Return a step's record with what is known of every step; the number goes on in a stream."""
    step = state.history[-1].step + 1 if state.history else 0
    return StepRecord(
        step=step,
        move=str(move),
        reason=reason,
        prompt=state.candidate.prompt,
        adapter=state.candidate.adapter,
        dev=monitor.summary(dev),
        train=monitor.summary(train),
        signal=Signal(),
        demand={},
        evidence={},
        bill={},
    )


def best(history: Sequence[StepRecord], cfg: RunConfig) -> StepRecord:
    """Return the step with the highest dev success, then dev value; the earliest of equals.

    With `returned = "tuned"`, of those with tuned weights, if there are any.
    """
    # ties go to the earliest step: it is the cheapest
    tuned = [step for step in history if step.adapter is not None]
    steps = tuned if tuned and cfg.returned == "tuned" else history
    return max(
        steps,
        key=lambda step: (step.dev["success"], step.dev["value"], -step.step),
    )


def adapt_phases(
    run: Session, watch: Watch, state: State | None = None
) -> tuple[State, StepRecord]:
    """Adapt to the phases of a task one after the other, each from the best candidate before it.

    Goes on from `state`, if there is one, whose weights and task are in place. Returns the last
    state, which has the histories of all phases and the test rows of earlier ones (`test-1`, ...),
    and the best step of the last phase.
    """
    state = state or State(Candidate(run.task.initial_prompt))
    state = adapt(run, state, watch)
    while state.phase + 1 < phases(run.cfg):
        state = enter_next(run, state)
        state = adapt(run, state, watch)
    return state, best(state.history, run.cfg)


def enter_next(run: Session, state: State) -> State:
    """Test the best candidate of a phase, and go on from it to the next phase, not yet scored."""
    chosen = best(state.history, run.cfg)
    candidate = Candidate(chosen.prompt, chosen.adapter)
    # the weights in place are those of the last move, not of the best
    run.use(candidate)
    tested = run.score(candidate.prompt, run.task.test)
    phase = state.phase + 1
    run.enter(build(run.cfg, phase))
    return replace(
        state,
        candidate=candidate,
        dev=(),
        train=(),
        phase=phase,
        past=state.whole,
        tested={**state.tested, f"test-{phase}": tested},
    )
