"""Questions with short answers: GQA, VizWiz, TextVQA."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from dyrate_kernels.evaluation.suites.file_suite import SHORT_ANSWER, Entry, FileSuite, Question, with_suffixes

UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."


class GQA(FileSuite):
    """GQA (Hudson and Manning 2019), ``testdev_balanced_questions.json``; exact match but for case and punctuation. Groups: structure."""

    name = "gqa"
    expects = "GQA's questions (testdev_balanced_questions.json): {id: {question, imageId, answer, ..}}"
    folders = ("", "images")

    def read(self, content: Any) -> Iterator[Question]:
        for key, entry in zip(self.of_type(content, dict), self.entries(content, "question")):
            picture = self.picture(*with_suffixes(entry.need("imageId", str, int)))
            kinds = entry.values.get("types")
            group = str(kinds.get("structural", self.name)) if isinstance(kinds, dict) else self.name
            prompt = f"{entry.need('question', str, empty=True)}\n{SHORT_ANSWER}"
            yield Question(key, group, prompt, picture, (entry.need("answer", str),))

    def points(self, question: Question, text: str) -> float:
        return float(plain(text) == plain(question.answers[0]))


class VizWiz(FileSuite):
    """VizWiz-VQA (Gurari et al. 2018), ``val.json``; VQA accuracy. Groups: answer type. The prompt is LLaVA-1.5's."""

    name = "vizwiz"
    expects = "VizWiz-VQA's annotations (val.json): [{image, question, answers: [{answer, ..} x 10], answer_type, ..}]"
    folders = ("", "val", "train")

    def read(self, content: Any) -> Iterator[Question]:
        for entry in self.entries(self.of_type(content, list)):
            image = entry.need("image", str)
            answers = tuple(_answer_text(entry, answer) for answer in entry.need("answers", list))
            prompt = f"{entry.need('question', str, empty=True)}\n{UNANSWERABLE}\n{SHORT_ANSWER}"
            yield Question(image, str(entry.values.get("answer_type", self.name)), prompt, self.picture(image), answers)

    def points(self, question: Question, text: str) -> float:
        return vqa_accuracy(text, question.answers)


class TextVQA(FileSuite):
    """TextVQA (Singh et al. 2019), ``TextVQA_0.5.1_val.json``; VQA accuracy. No OCR tokens in the prompt."""

    name = "textvqa"
    expects = "TextVQA's annotations (TextVQA_0.5.1_val.json): {data: [{question_id, image_id, question, answers: [text x 10], ..}]}"
    folders = ("", "train_images", "test_images")
    most = 32

    def read(self, content: Any) -> Iterator[Question]:
        if self.of_type(content, dict).get("data") == []:
            return
        for entry in self.entries(Entry(self.file, "the file", content, self.expects).need("data", list)):
            answers = tuple(_answer_text(entry, {"answer": answer}) for answer in entry.need("answers", list))
            picture = self.picture(*with_suffixes(entry.need("image_id", str, int)))
            prompt = f"{entry.need('question', str, empty=True)}\n{SHORT_ANSWER}"
            yield Question(str(entry.need("question_id", int, str)), self.name, prompt, picture, answers)

    def points(self, question: Question, text: str) -> float:
        return vqa_accuracy(text, question.answers)


def _answer_text(entry: Entry, answer: Any) -> str:
    text = answer.get("answer") if isinstance(answer, dict) else None
    if not isinstance(text, str):
        raise entry.wrong(f"must have answers that are texts, got {str(answer)[:60]!r}")
    return text


def plain(text: str) -> str:
    """Lower case, no punctuation, single spaces."""
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


def vqa_accuracy(text: str, answers: Sequence[str]) -> float:
    """min(1, n / 3), n people of the others giving this answer, averaged over leaving each person out (VQA, Antol et al. 2015)."""
    given, counts = normalise(text), Counter(normalise(answer) for answer in answers)
    same, people = counts[given], len(answers)
    return (same * min(1.0, (same - 1) / 3) + (people - same) * min(1.0, same / 3)) / people


def normalise(text: str) -> str:
    """An answer as VQA's and TextVQA's official evaluations compare it: punctuation, articles, number words, contractions."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").replace("\n", " ").replace("\t", " ").strip()
    result = text
    for mark in _MARKS:
        result = result.replace(mark, "" if f"{mark} " in text or f" {mark}" in text else " ")
    words = [_NUMBERS.get(word, word) for word in re.sub(r"\.(?!\d)", "", result).split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = {"none": "0"} | {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}  # fmt: skip
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd how'll how's
isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've
should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
# One apostrophe left out; the last entry is turned round in the official table.
_CONTRACTIONS = {word[:i] + word[i + 1 :]: word for word in _CONTRACTED for i, letter in enumerate(word) if letter == "'"}
_CONTRACTIONS["somebody'd"] = "somebodyd"
