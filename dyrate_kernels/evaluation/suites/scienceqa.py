"""ScienceQA: multiple choice about pictures."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from dyrate_kernels.evaluation.suites.file_suite import FileSuite, Question

_LETTERS = "ABCDEFGHIJ"


class ScienceQA(FileSuite):
    """ScienceQA (Lu et al. 2022), ``problems.json``: the test questions that have a picture; accuracy of the letter. Groups: subject.

    Pictures lie at ``{id}/{image}`` or ``test/{id}/{image}``.
    """

    name = "scienceqa"
    expects = (
        "ScienceQA's problems (problems.json): {id: {question, choices, answer: index, hint, image, split, subject, ..}}; "
        "those of split test with an image are asked"
    )
    folders = ("", "test", "images/test", "images")

    def read(self, content: Any) -> Iterator[Question]:
        for key, entry in zip(self.of_type(content, dict), self.entries(content, "problem")):
            choices, answer = entry.need("choices", list), entry.need("answer", int)
            if not 0 <= answer < len(choices) <= len(_LETTERS):
                raise entry.wrong(f"must have an answer in [0, {len(choices) - 1}], the index of a choice, got {answer}")
            asked = entry.need("question", str, empty=True)
            if entry.values.get("split", "test") != "test" or not entry.values.get("image"):
                continue
            hint = entry.values.get("hint")
            lines = [f"Context: {hint}"] if hint else []
            lines += [asked, *(f"{letter}. {choice}" for letter, choice in zip(_LETTERS, choices))]
            prompt = "\n".join([*lines, "Answer with the option's letter from the given choices directly."])
            picture = self.picture(f"{key}/{entry.need('image', str)}")
            yield Question(key, str(entry.values.get("subject", self.name)), prompt, picture, (_LETTERS[answer], _LETTERS[: len(choices)]))

    def points(self, question: Question, text: str) -> float:
        right, letters = question.answers
        return float(letter_of(text, letters) == right)


def letter_of(text: str, letters: str) -> str | None:
    """The option that an answer names: ``B``, ``b.``, ``(B)``, ``B. green``, ``The answer is B.``; None: none of the letters."""
    text = text.strip()
    found = (
        re.fullmatch(r"\(?([A-Za-z])\)?[.:,]?", text)
        or re.match(r"\(([A-Za-z])\)|([A-Z])[.:)]\s", text)
        or re.search(r"(?i:answer is|option)\s*\(?([A-Z])\b", text)
    )
    letter = next((group for group in found.groups() if group), "").upper() if found else ""
    return letter if letter and letter in letters else None
