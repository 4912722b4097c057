"""POPE: is a thing in the picture, yes or no."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from dyrate_kernels.evaluation.suites.file_suite import SHORT_ANSWER, FileSuite, Question


class POPE(FileSuite):
    """POPE (Li et al. 2023), ``coco_pope_random.json`` and its sisters (JSON lines); accuracy, and F1 of "yes" as its summary."""

    name = "pope"
    expects = "POPE's questions (coco_pope_random.json, JSON lines): {question_id, image, text, label: yes or no}"
    folders = ("", "val2014")

    def read(self, content: Any) -> Iterator[Question]:
        for entry in self.entries([content] if isinstance(content, dict) else content):
            label, image = entry.need("label", str).strip().lower(), entry.need("image", str)
            if label not in ("yes", "no"):
                raise entry.wrong(f"must have the label yes or no, got {label!r}")
            id_ = str(entry.need("question_id", int, str))
            group = str(entry.values.get("category", self.name))
            if group != self.name:  # LLaVA's file holds all three parts, each counted from 1
                id_ = f"{group} {id_}"
            yield Question(id_, group, f"{entry.need('text', str)}\n{SHORT_ANSWER}", self.picture(image), (label,))

    def points(self, question: Question, text: str) -> float:
        return float(yes_or_no(text) == question.answers[0])

    def summary(self, texts: Sequence[str]) -> dict[str, float]:
        """Precision, recall and F1 of "yes", and the share of "yes"."""
        said = [yes_or_no(text) == "yes" for text in texts]
        true = [question.answers[0] == "yes" for question in self.questions]
        both = sum(a and b for a, b in zip(said, true, strict=True))
        precision, recall = both / max(sum(said), 1), both / max(sum(true), 1)
        f1 = 2 * both / max(sum(said) + sum(true), 1)
        return {"precision": precision, "recall": recall, "f1": f1, "yes_share": sum(said) / len(said)}


def yes_or_no(text: str) -> str:
    """As POPE's evaluation reads an answer: "no" where its first sentence has no, No or not; else "yes"."""
    words = re.sub(",", "", text.split(".")[0]).split()
    return "no" if any(word in ("No", "not", "no") for word in words) else "yes"
