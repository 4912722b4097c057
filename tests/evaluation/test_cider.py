"""CIDEr-D against a calculation by hand and against the numbers of the published scorer."""

from __future__ import annotations

import math
import shutil

import pytest

from dyrate_kernels.evaluation.cider import Cider, tokenize


def test_by_hand():
    """Two pictures, one reference each. Words: a (df 2, weight 0), dog, runs, cat, sits (df 1, weight log 2)."""
    cider = Cider([["a dog runs"], ["a cat sits"]])
    assert cider.score("a dog runs", ["a dog runs"]) == pytest.approx(10 * 3 / 4)  # there are no 4-grams
    # "a dog sits", l equal. n = 1: (dog, sits) with (dog, runs): cos = 1/2; n = 2: "dog sits" is in no reference (df 0 -> weight log 2),
    # "a dog" is shared: cos = 1/2; n = 3: nothing shared.
    assert cider.score("a dog sits", ["a dog runs"]) == pytest.approx(10 * (0.5 + 0.5) / 4)
    # "a dog": 1 bigram against 2; n = 1: (dog) with (dog, runs): 1 / sqrt 2; n = 2: ("a dog") likewise.
    assert cider.score("a dog", ["a dog runs"]) == pytest.approx(10 * 2 / math.sqrt(2) / 4 * math.exp(-1 / 72))
    # "dog dog": the second dog is clipped: min(2 w, w) * w / (2 w * sqrt 2 w)
    assert cider.score("dog dog", ["a dog runs"]) == pytest.approx(10 * (1 / (2 * math.sqrt(2))) / 4 * math.exp(-1 / 72))
    assert cider.score("", ["a dog runs"]) == 0.0 and cider.score("a a", ["a dog runs"]) == 0.0
    assert cider.score("a dog runs", ["a dog runs", "a cat sits"]) == pytest.approx(10 * 3 / 4 / 2)  # mean over references


REFERENCES = [
    ["a dog runs on the grass", "the brown dog is running", "a dog"],
    ["a cat sits on a mat", "the cat sleeps on the red mat"],
    ["two people ride horses on the beach", "people riding horses", "a man and a woman on horses near the sea"],
    ["a red ball on the grass"],
]
CANDIDATES = ["a brown dog runs on the grass", "a cat on the red mat", "two dogs", "a red ball on the grass"]
# What pycocoevalcap 1.2 prints: from pycocoevalcap.cider.cider_scorer import CiderScorer; s = CiderScorer(n=4, sigma=6.0);
# for text, references in zip(CANDIDATES, REFERENCES): s += (text, references);  print(s.compute_score()[1].tolist())
PUBLISHED = [3.1085016938167738, 3.7259562647151645, 0.1862181718888262, 10.0]


def test_published_scorer():
    cider = Cider(REFERENCES)
    assert [cider.score(text, references) for text, references in zip(CANDIDATES, REFERENCES, strict=True)] == pytest.approx(PUBLISHED)


def test_published_scorer_itself():
    scorer = pytest.importorskip("pycocoevalcap.cider.cider_scorer").CiderScorer(n=4, sigma=6.0)
    for text, references in zip(CANDIDATES, REFERENCES, strict=True):
        scorer += (text, references)
    assert scorer.compute_score()[1].tolist() == pytest.approx(PUBLISHED)


# What Stanford's PTBTokenizer gives: pycocoevalcap.tokenizer.ptbtokenizer.PTBTokenizer().tokenize({0: [{"caption": text}]})
TOKENS = {
    "A dog's ball, isn't it?": "a dog 's ball is n't it",
    'The "U.S." flag (red/white) at 5:30 -- $1,000.50!': "the u.s. flag -lrb- red/white -rrb- at 5:30 $ 1,000.50",
    "I cannot; they'll can't t-shirt. End": "i can not they 'll ca n't t-shirt end",
    "Mr. Smith's dog, 3.5 m. tall": "mr. smith 's dog 3.5 m. tall",
    "No. 5 train, no. And the '90s rock 'n' roll!!": "no. 5 train no and the '90s rock 'n' roll !!",
    "a sign that reads \"STOP\" and/or 'GO'...": "a sign that reads stop and/or go",
    "the boys' toys it\u2019s 10% off": "the boys toys it 's 10 % off",
    "y'all couldn't've gonna o'clock #1 #tag": "y' all could n't 've gon na o'clock # 1 #tag",
    "...": "",
}


@pytest.mark.parametrize("text", TOKENS)
def test_tokens(text):
    assert tokenize(text) == TOKENS[text].split()


@pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")
def test_tokens_of_the_original():
    original = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer").PTBTokenizer()
    assert original.tokenize({text: [{"caption": text}] for text in TOKENS}) == {text: [tokens] for text, tokens in TOKENS.items()}


def test_mistakes():
    with pytest.raises(ValueError, match="at least 2 pictures, got 1"):
        Cider([["a dog"]])
    with pytest.raises(ValueError, match="at least one reference"):
        Cider([["a"], ["b"]]).score("a", [])
