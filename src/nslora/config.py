"""The settings of one run: validated, immutable, fingerprinted, and the source of its randomness.

Values that the paper does not state are our own choice; some are swept in the ablations.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from nslora.types import SLOT, UserError

# seeds from here on are for tuning; what they ask about, where questions are few, other seeds never do
TUNING = 100
# settings that other tasks do not have
OF_OWN_DATA = ("grader", "judge", "columns", "test", "system", "template", "dtype")
# a setting that other tasks do not have
OF_STREAM = ("rounds",)
TASKS = (
    "facts",
    "style",
    "math",
    "mixed",
    "stream",
    # of BIG-bench
    "object_counting",
    "word_sorting",
    "intent_recognition",
    "date_understanding",
    "mult_data_wrangling",
    "qa_wikidata",
)


@dataclass(frozen=True)
class Method:
    """A method of the comparison: who decides, what it can see, and what weights train on.

    Attributes:
        decision: a key of `router.DECISIONS`.
        needs: a key of `needs.ESTIMATORS`.
        targets: a key of `remake.POLICIES`.
        inputs: a key of `numerical.INPUTS`: which training examples the weights learn.
        edits: who makes a symbolic move: "textgrad", or "gepa" (extra `peers`).
    """

    decision: str
    needs: str = "none"
    targets: str = "remade"
    inputs: str = "all"
    edits: str = "textgrad"


METHODS = {
    "frozen": Method("stop"),
    # weights alone, with ever better targets
    "lora": Method("numerical", targets="gold"),
    "lora-rft": Method("numerical", targets="sampled"),
    "lora-remade": Method("numerical"),
    "lora-demonstrated": Method("numerical", targets="demonstrated"),
    # prompts alone
    "textgrad": Method("symbolic"),
    "gepa": Method("once symbolic", edits="gepa"),
    # both, without deciding
    "fixed": Method("schedule"),  # as in fixed:SNNN
    "alternate": Method("alternate"),
    "random": Method("coin"),
    # both, deciding
    "monitor": Method("signal"),
    "needs-only": Method("demand", needs="asked"),
    # what is known of the paper's rule, with our additions: weights first, on what needs content
    "numerical-first": Method("signal and demand", needs="asked", inputs="needed"),
    "neurosymbolic": Method("prompt if followed", needs="asked"),
    "oracle": Method("prompt if followed", needs="hidden"),
}

# of the decisions that do not use the whole budget
FEW_MOVES = {"stop": 0, "once symbolic": 1}

Targets = Literal[
    "method",
    "gold",
    "sampled",
    "remade",
    "demonstrated",  # what methods train on
    "duplicated",
    "verified",
    "both",
    "unverified",  # arms of the study of remade data
]
Needs = Literal[
    "method", "none", "classifier", "recall", "asked", "constant", "random", "parts", "hidden"
]


class RunConfig(BaseModel):
    """The settings of one run. Runs with equal settings and weights make the same records."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    # what is adapted to what
    task: str = "mixed"  # one of TASKS, or own:<file>
    backbone: str = "smollm2-135m"  # a key of checkpoints.BACKBONES, hub:<id>@<revision>, a folder
    method: str = "neurosymbolic"  # a key of METHODS; fixed:<schedule> for a schedule like SNNN
    seed: NonNegativeInt = 0
    study: str = "single"  # which study of experiments.toml the run belongs to; not its identity
    moves: PositiveInt = 6  # budget, equal for all methods; of each phase in a stream
    rounds: NonNegativeInt = 0  # of a stream: most moves of a phase, all phases sharing one budget
    returned: Literal["best", "tuned"] = "best"  # on dev: the best candidate, or best tuned one

    # the task
    items: PositiveInt = 24  # of each kind: facts (in 5 wordings each), questions, problems
    dev_items: NonNegativeInt = 0  # of each kind; 0: as many as items
    test_items: PositiveInt = 36  # of each kind
    mix: str = "1:1:1"  # of mixed: how many times as many items need content, style, both
    rule: str = "end_phrase"  # a key of rules.RULES: of style and mixed; a stream starts with it
    tier: Literal["easy", "hard"] = "easy"  # of math: arithmetic, or word problems with solutions
    max_new_tokens: PositiveInt = 32  # longest reply
    grader: str = "auto"  # of own data: see tasks/graders.py
    judge: str = ""  # of own data: criteria, one a line, by which the external LLM grades replies
    columns: str = ""  # of own data, where they have other names: question=ask,answer=reply
    test: str = ""  # of own data: a file of other rows to test on; "": a fifth of the rows
    system: str = "You are a helpful assistant."  # of own data: the prompt that a run starts from
    template: str = SLOT  # of own data: the question in that prompt
    dtype: Literal["auto", "nf4"] = "auto"  # of the backbone, with own data; nf4: 4-bit weights
    reward: Literal["number", "parts"] = "number"  # what methods see of the reward

    # numerical moves
    rank: PositiveInt = 16  # of LoRA
    lr: PositiveFloat = 5e-4  # of AdamW
    batch: PositiveInt = 8  # training pairs per optimizer step
    epochs: PositiveInt = 1  # passes over the pairs per move
    targets: Targets = "method"  # what weights train on: the method's own policy, or another
    inputs: Literal["method", "all", "needed"] = "method"  # which examples: all, or as needs say
    shrink: bool = True  # use four fifths of an adapter where dev is mostly right and loses nothing
    bake: bool = False  # train under the initial prompt what the refined one brought
    replay: NonNegativeFloat = 1.0  # replay pairs per training pair
    replay_pool: PositiveInt = 128  # replay questions of each kind, from which each epoch draws

    # symbolic moves
    candidates: PositiveInt = 3  # edits proposed per move
    feedback: PositiveInt = 2  # failing examples that the editor is shown per move
    prompt_tokens: PositiveInt = 160  # longest prompt (system and template), backbone tokens
    gate: bool = True  # keep an edit only if dev reward gains by gain_eps or more
    control: Literal["none", "shuffled", "random"] = "none"  # another rule's critique; random words

    # the decision
    needs: Needs = "method"  # estimator of what inputs need: the method's own, or another
    c1_eps: NonNegativeFloat = 0.1  # C1 above -c1_eps is small
    c2_eps: NonNegativeFloat = 0.5  # a gradient norm below it is small
    gain_eps: NonNegativeFloat = 0.02  # a symbolic gain below it is little
    patience: PositiveInt = 1  # consecutive small signals before the kind of move changes
    demand_floor: NonNegativeFloat = 0.1  # share of examples below which nothing is demanded
    follows_floor: NonNegativeFloat = 0.6  # of neurosymbolic: rules obeyed from which it edits
    reserve: NonNegativeInt = 2  # of numerical-first: moves left for an untried kind; 0: never

    # the editor and the machine
    editor_url: str = "local"  # our server on loopback, or an OpenAI-compatible base URL
    editor_model: str = "qwen2.5-coder-1.5b"
    editor_engine: Literal["auto", "own", "llama.cpp"] = "auto"  # of the local one; auto: what fits
    threads: PositiveInt = 2  # other counts give other bits, so they belong to a run's identity

    def __init__(self, /, **settings: Any) -> None:
        """Check every value; raises UserError with one sentence."""
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise UserError(sentence(error)) from None

    @field_validator("task")
    @classmethod
    def _check_task(cls, task: str) -> str:
        if task not in TASKS and not task.startswith("own:"):
            raise ValueError(f"unknown; choose from {', '.join(TASKS)} or own:<file>")
        return task

    @field_validator("mix")
    @classmethod
    def _check_mix(cls, mix: str) -> str:
        if not re.fullmatch("[0-9]+:[0-9]+:[0-9]+", mix) or not re.search("[1-9]", mix):
            raise ValueError("must be content:style:both, as in 2:1:0, and not all 0")
        return mix

    @field_validator("template")
    @classmethod
    def _check_template(cls, template: str) -> str:
        if template.count(SLOT) != 1:
            raise ValueError(f"must hold {SLOT} once, where the question goes")
        return template

    @model_validator(mode="after")
    def _check_method(self) -> Self:
        name, _, schedule = self.method.partition(":")
        if name not in METHODS or (name == "fixed") != bool(re.fullmatch("[NS]+", schedule)):
            raise ValueError(
                f"unknown method {self.method!r}; choose from {', '.join(METHODS)}, "
                "fixed being followed by its schedule, as in fixed:SNNN"
            )
        if len(schedule) > self.phase_moves:
            raise ValueError(
                f"method {self.method!r} has more moves than its budget, {self.phase_moves}"
            )
        for name in () if self.is_own else OF_OWN_DATA:
            if getattr(self, name) != RunConfig.model_fields[name].default:
                raise ValueError(f"{name} is a setting of own data alone")
        if self.rounds and self.task != "stream":
            raise ValueError("rounds is a setting of the stream alone")
        if self.row.needs == "parts" and self.reward != "parts":
            raise ValueError('needs = "parts" takes a reward in parts: set reward = "parts"')
        return self

    @classmethod
    def of(cls, settings: dict[str, Any]) -> RunConfig:
        """Build from a mapping; an unknown key or a wrong value raises UserError."""
        return cls(**settings)

    def but(self, **changes: Any) -> RunConfig:
        """Return the same settings but for `changes`, checked anew."""
        return RunConfig(**{**self.model_dump(), **changes})

    @property
    def row(self) -> Method:
        """The method's row of METHODS, with the settings `needs`, `targets` and `inputs` in their places."""
        named = {"needs": self.needs, "targets": self.targets, "inputs": self.inputs}
        other = {key: name for key, name in named.items() if name != "method"}
        return replace(METHODS[self.method.partition(":")[0]], **other)

    @property
    def schedule(self) -> str:
        """The moves of a `fixed:` method as N and S; empty for the others."""
        return self.method.partition(":")[2]

    @property
    def is_tuning(self) -> bool:
        """Tell whether the seed is one on which methods may still change."""
        return self.seed >= TUNING

    @property
    def phase_moves(self) -> int:
        """The most moves of a phase: `rounds` where the phases of a stream share a budget, else `moves`."""
        return self.rounds or self.moves

    @property
    def most_moves(self) -> int:
        """How many moves the method makes at most: of its schedule, or within the budget."""
        if self.row.decision in FEW_MOVES:
            return FEW_MOVES[self.row.decision]
        return len(self.schedule) or self.moves

    @property
    def shares(self) -> tuple[int, int, int]:
        """`mix` as numbers: content, style, both."""
        content, style, both = map(int, self.mix.split(":"))
        return content, style, both

    @property
    def settings(self) -> dict[str, Any]:
        """All settings as a receipt holds them: `needs`, `targets` and `inputs` by their own names."""
        others = [] if self.is_own else [*OF_OWN_DATA]
        others += [] if self.task == "stream" else OF_STREAM
        given = self.model_dump(exclude=set(others))
        return given | {name: getattr(self.row, name) for name in ("needs", "targets", "inputs")}

    @property
    def is_own(self) -> bool:
        """Tell whether the task is somebody's own data."""
        return self.task.startswith("own:")

    @cached_property
    def fingerprint(self) -> str:
        """Eight hex digits over all settings but seed and study: seeds of one experiment share it.

        Own data count by their content, wherever the file lies.
        """
        identity = {k: v for k, v in self.settings.items() if k not in ("seed", "study")}
        files = {"task": self.task.removeprefix("own:"), "test": self.test} if self.is_own else {}
        for name, file in files.items():
            # a file that is gone has been a record's data, and its path is all that is left
            if os.path.isfile(file):
                identity[name] = f"own:{hashlib.sha256(Path(file).read_bytes()).hexdigest()}"
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def run_id(self) -> str:
        """Folder name of the run's record: readable, short, and unique per configuration."""
        names = [Path(name).stem if "/" in name else name for name in (self.task, self.backbone)]
        parts = [*names, self.method, f"s{self.seed}", self.fingerprint]
        return "-".join(re.sub(r"[^\w.]", "_", part)[:40] for part in parts)

    def rng(self, purpose: str) -> np.random.Generator:
        """Return a generator of its own per purpose: at a seed, the same for every method."""
        digest = hashlib.sha256(purpose.encode()).digest()
        return np.random.default_rng([self.seed, *digest[:8]])

    def own_rng(self, purpose: str) -> np.random.Generator:
        """Return a generator per purpose that no other run shares: for coins and random guesses."""
        return self.rng(f"{self.run_id} {purpose}")


def sentence(error: ValidationError, name: str = "") -> str:
    """Return the first problem of a validation error as a sentence with the setting's name."""
    problem = error.errors()[0]
    name = name or ".".join(map(str, problem["loc"]))
    said = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        settings = ", ".join(sorted(RunConfig.model_fields))
        return f"unknown setting {name!r}; the settings are {settings}."
    if not name:
        return f"{said}."
    return f"setting {name} = {problem['input']!r}: {said[:1].lower()}{said[1:]}."
