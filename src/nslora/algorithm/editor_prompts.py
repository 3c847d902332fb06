"""What the editor is told: roles, orders and worked examples, worded so that a small one obeys.

Each wording was tried on the default editor; LOG.md says which others failed, and how.
"""

from __future__ import annotations

from nslora.types import SLOT

TAGS = ("<IMPROVED_VARIABLE>", "</IMPROVED_VARIABLE>")
ROLES = {
    "system": "system prompt",
    "question": f"question template with its slot {SLOT}",
}
EDITOR = (
    "You write prompts for a small language model. You are precise and brief."
)
GRADIENT = (
    "The critic of the reply says: {words} "
    "Turn these words into one order that holds for every reply, whatever the question. Keep exact phrases, numbers, "
    "symbols and formats word for word, and leave out the topic of this question. "
    "Your answer starts with 'The prompt must tell the model that every reply must'."
)
OPTIMIZER = (
    EDITOR
    + " Send the text between {new_variable_start_tag} and {new_variable_end_tag}."
)
CONSTRAINTS = {
    "system": "The system prompt is instructions to the model, not a reply. It says what every reply must look like, "
    "and repeats exact phrases, symbols and formats word for word.",
    "question": f"The question template is {SLOT} followed by an instruction to the model. Write {SLOT} itself, no "
    "real question. Repeat exact phrases, symbols and formats word for word.",
}
MODELS = (  # worked examples, of rules that no task has: what every reply must do, and a reply that does
    ("name a color twice in round brackets", "your answer (blue, blue)"),
    ("be a question", "is it your answer?"),
)
LEADS = {"system": "", "question": f"{SLOT} "}
PLANS = (
    "Replace the old text by an order of the form 'Every reply must ..., like this: ...'. Do not copy the "
    "examples above.",
    "Replace the old text by an order of the form 'Always reply with ..., like this: ...'. Do not copy the "
    "examples above.",
)
REMINDER = (
    f"\n\n{{plan}} Your message starts with {TAGS[0]} and ends with {TAGS[1]}."
)
ANSWER_TOKENS = 96  # longest rewritten answer
ANSWER = (
    "Change the answer as little as possible so that it does what the critic asks. The answer itself stays in it, "
    "word for word. Send the changed answer and nothing else."
)


def worked_examples(name: str) -> list[str]:
    """Feedback and the edit that follows from it, for the text `name` (a key of ROLES); for textgrad's optimizer."""
    return [
        f"<FEEDBACK>The prompt must tell the model that every reply must {what}.</FEEDBACK> "
        f"{TAGS[0]}{LEADS[name]}Every reply must {what}, like this: {reply}{TAGS[1]}"
        for what, reply in MODELS
    ]
