"""The symbolic move: one TextGrad step on both prompt texts, several edits, gated on dev."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from nslora.algorithm import controls, gepa, monitor, textgrad_compat
from nslora.algorithm.monitor import mean_value
from nslora.algorithm.needs import Needs
from nslora.algorithm.session import Outcome, Session, State
from nslora.config import RunConfig
from nslora.tasks.build import Task
from nslora.types import Candidate, Edit, Move, Prompt, Scored

# dev items that edits are compared on; a third of the edits reach the second rung
RUNGS = (6, 12)


def symbolic(run: Session, state: State, needs: Needs) -> Outcome:
    """Rewrite the prompt: propose edits, compare them on dev, keep the best one past the gate."""
    edits = PROPOSERS[run.cfg.row.edits](run, state, needs)
    usable = [
        e for e in edits if not e.problem and e.prompt != state.candidate.prompt
    ]
    # few dev items tell a good edit from a bad one, all of them guard the gate
    winner, values = successive_halving(run, usable, state.dev)
    accepted = winner is not None and passes_gate(run, winner.prompt, state.dev)
    candidate = state.candidate
    if winner is not None and accepted:
        candidate = Candidate(winner.prompt, candidate.adapter)
    log = [
        describe(edit, values.get(id(edit)), accepted and edit is winner)
        for edit in edits
    ]
    return Outcome(candidate, {"edits": log}, run.bill(), state.memory)


def passes_gate(run: Session, prompt: Prompt, dev: Sequence[Scored]) -> bool:
    """Tell whether dev reward gains `gain_eps` or more, and more than one standard error; always, without `gate`.

    The error is that of the mean change per item. A tie is not enough, nor what chance brings:
    weights that have learned under the old prompt lose by any other.
    """
    if not run.cfg.gate:
        return True
    scored = run.score(prompt, [s.example for s in dev])
    gain = monitor.gain(mean_value(scored), mean_value(dev), len(dev))
    mean, error = monitor.mean_change(scored, dev)
    # where a single item changed, both are the same number
    beyond_chance = mean > error + monitor.ROUNDING
    return gain >= run.cfg.gain_eps and beyond_chance


def textgrad_edits(run: Session, state: State, needs: Needs) -> list[Edit]:
    """Return the edits of one TextGrad step on the failing examples that are for the prompt."""
    cfg, nth = run.cfg, state.nth(Move.SYMBOLIC)
    failures = failures_to_show(run, state, needs, nth)
    chance = cfg.rng(f"control-{nth}")
    if cfg.control == "shuffled":
        failures = controls.shuffled(failures, chance)
    if not failures:
        return []
    edits = run.timed(
        lambda: textgrad_compat.propose_edits(
            state.candidate.prompt,
            failures,
            run.editor,
            cfg,
            count=run.backbone.count,
            seed=int(cfg.rng(f"edit-{nth}").integers(2**31)),
            forbidden=frozenset(example.answer for example in run.task.train),
            labels=run.task.labels,
        )
    )
    # the control keeps the shape of an edit and takes its message
    if cfg.control == "random":
        vocabulary = {
            word for _, e in run.task.replay for word in e.question.split()
        }
        old = state.candidate.prompt
        edits = [
            controls.scrambled(edit, old, sorted(vocabulary), chance)
            for edit in edits
        ]
    return edits


def failures_to_show(
    run: Session, state: State, needs: Needs, nth: int
) -> list[Scored]:
    """Return failing examples for the editor, those that only lack form first, else in random order.

    Where the bare gold answer fails the reward, a form is asked for; a reply worth as much as that
    answer lacks nothing but the form. No prompt can hold the answers themselves.
    """
    rows = zip(state.train, needs.for_prompt(), strict=True)
    failing = [s for s, for_prompt in rows if for_prompt]
    # random first, so that equal ones differ from move to move
    order = run.cfg.rng(f"feedback-{nth}").permutation(len(failing))

    def lacks_content(s: Scored) -> tuple[bool, bool]:
        worth_gold = s.reward.value >= run.gold_reward(s.example).value
        return not run.asks_form(s.example), not worth_gold

    return sorted((failing[i] for i in order), key=lacks_content)


def successive_halving(
    run: Session, edits: Sequence[Edit], dev: Sequence[Scored]
) -> tuple[Edit | None, dict[int, float]]:
    """Return the best edit on dev, and by `id` the value of each on the last rung it reached.

    Successive halving (Jamieson and Talwalkar, 2016): all edits on few items, a third of them on
    more. The rungs take items where a form is asked for first, then the lowest rewards: there edits
    differ. What an edit does to the others the gate sees. The edits of a rung are one batch.
    """
    hardest = sorted(
        dev, key=lambda s: (not run.asks_form(s.example), s.reward.value)
    )
    examples = [s.example for s in hardest]
    alive, values = list(edits), dict[int, float]()
    for items in RUNGS:
        if len(alive) < 2:
            break
        rung = examples[:items]
        # edits x items, all in one batch
        prompts = [edit.prompt for edit in alive for _ in rung]
        scored = run.score_each(prompts, rung * len(alive))
        for i, edit in enumerate(alive):
            values[id(edit)] = mean_value(
                scored[i * len(rung) : (i + 1) * len(rung)]
            )
        alive.sort(key=lambda edit: -values[id(edit)])
        alive = alive[: max(1, round(len(alive) / 3))]
    return (alive[0] if alive else None), values


def describe(
    edit: Edit, value: float | None, accepted: bool
) -> dict[str, object]:
    """Return the log row of an edit."""
    return {
        "system": edit.prompt.system,
        "question": edit.prompt.question,
        "problem": edit.problem,
        "screen_value": value,
        "accepted": accepted,
        "diff": [list(part) for part in edit.diff],
    }


def gepa_edits(run: Session, state: State, needs: Needs) -> list[Edit]:
    """Return the prompt that GEPA finds with as many graded replies as all moves of textgrad."""
    most = run.cfg.moves * metric_calls(run.cfg, run.task)
    return gepa.edits(run, state, most)


def metric_calls(cfg: RunConfig, task: Task) -> int:
    """Return the replies that one move of textgrad has graded at most.

    It compares 3 edits per candidate (system prompt, template, both) on the first rung and a third
    of them on the second, then scores one on dev and on train.
    """
    edits = 3 * cfg.candidates
    rungs = edits * RUNGS[0] + round(edits / 3) * RUNGS[1]
    return rungs + len(task.dev) + len(task.feedback)


PROPOSERS: Mapping[str, Callable[[Session, State, Needs], list[Edit]]] = {
    "textgrad": textgrad_edits,
    "gepa": gepa_edits,
}
