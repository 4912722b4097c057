"""CIDEr-D of captions, without Java.

Vedantam, Lawrence Zitnick and Parikh, "CIDEr: Consensus-based Image Description Evaluation" (arXiv 1411.5726), section 5, with the
constants of the COCO caption evaluation (sigma = 6, n = 1..4, times 10). For a candidate ``c`` and the references ``s_1 .. s_m`` of its
picture:

    g_w(x) = h_w(x) * (log N - log max(1, df_w))        h_w: how often the n-gram w occurs in x; N: pictures of the corpus;
                                                        df_w: pictures with w in some reference
    CIDEr-D_n = 10 / m * sum_j exp(-(l(c) - l(s_j))^2 / (2 sigma^2)) * sum_w min(g_w(c), g_w(s_j)) * g_w(s_j) / (|g(c)| |g(s_j)|)
    CIDEr-D = mean over n

``l`` counts bigrams there, hence here. A value of 1.0 is what papers print as 100.

The tokens are those of Stanford's PTBTokenizer with ``-lowerCase``, without the punctuation that the COCO caption evaluation leaves out,
made by a few regular expressions. Brackets stay, as ``-lrb-``, as they do there. The two differ in abbreviations that are not listed here
(``gov.`` loses its point), in web addresses with slashes, emoticons, accents in place of apostrophes, and in currencies (``US$``).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

SIGMA = 6.0
LONGEST = 4

_ABBREVIATIONS = (
    "mr mrs ms dr st mt ft jr sr vs etc inc ltd co corp ave blvd rd prof gen lt sgt rev hon jan feb aug sept oct nov dec".split()
)
_TOKEN = re.compile(
    rf"(?:{'|'.join(_ABBREVIATIONS)})\.|no\.(?= \d)|[^\W\d_]\.(?:[^\W\d_]\.)*(?!\w)"  # mr. no. 5, u.s.
    r"|'(?:tis|twas)\b|'(?:til|em)\b|'n'|'\d0s\b|#[^\W\d]\w*|y'(?=all\b)"
    r"|\d+(?:[.,:/]\d+)+|\w+(?:[-/&.@]+\w+|'[^\W\d]\w*)*|'(?:s|re|ve|ll|d|m)\b|[!?]{2,}|[^\w\s]"
)
_CLITIC = re.compile(r"(.+)(n't|'(?:s|re|ve|ll|d|m))$")
_TWO_WORDS = {
    "cannot": "can", "gonna": "gon", "gotta": "got", "wanna": "wan", "gimme": "gim", "lemme": "lem", "'tis": "'t", "'twas": "'t"
}  # fmt: skip
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_PUNCTUATION = frozenset("'`\".?!,:;-…–—“”‘’")

Ngrams = dict[tuple[str, ...], float]


def tokenize(text: str) -> list[str]:
    """``A dog's ball, isn't it?`` -> ``a dog 's ball is n't it``."""
    tokens = []
    for token in _TOKEN.findall(text.lower().replace("’", "'")):
        if token in _PUNCTUATION:
            continue
        tail: list[str] = []
        while found := _CLITIC.match(token):
            token, clitic = found.groups()
            tail.insert(0, clitic)
        head = _TWO_WORDS.get(token)
        token = _BRACKETS.get(token, token)
        tokens += [token] if head is None else [head, token[len(head) :]]
        tokens += tail
    return tokens


class Cider:
    """Scores captions with the document frequencies of a corpus.

    Args:
        corpus: the references of every picture.

    Raises:
        ValueError: fewer than two pictures: every n-gram would weigh log 1 = 0.
    """

    def __init__(self, corpus: Iterable[Sequence[str]]) -> None:
        self.frequency: Counter[tuple[str, ...]] = Counter()
        pictures = 0
        for references in corpus:
            pictures += 1
            self.frequency.update({ngram for text in references for ngram in _ngrams(tokenize(text))})
        if pictures < 2:
            raise ValueError(f"CIDEr weighs words by how many pictures they occur with, so it needs at least 2 pictures, got {pictures}")
        self.log_pictures = math.log(pictures)

    def score(self, text: str, references: Sequence[str]) -> float:
        """CIDEr-D of a caption, 0 to 10.

        Raises:
            ValueError: no references.
        """
        if not references:
            raise ValueError("a caption is scored against at least one reference, got none")
        vectors, norms, length = self._weigh(text)
        total = 0.0
        for reference in references:
            others, other_norms, other_length = self._weigh(reference)
            near = math.exp(-((length - other_length) ** 2) / (2 * SIGMA**2))
            for vector, other, norm, other_norm in zip(vectors, others, norms, other_norms):
                product = sum(min(weight, other[ngram]) * other[ngram] for ngram, weight in vector.items() if ngram in other)
                if norm and other_norm:
                    total += near * product / (norm * other_norm)
        return 10.0 * total / (LONGEST * len(references))

    def _weigh(self, text: str) -> tuple[list[Ngrams], list[float], int]:
        """Weights of the n-grams by n, their norms, number of bigrams."""
        tokens = tokenize(text)
        vectors: list[Ngrams] = [{} for _ in range(LONGEST)]
        for ngram, count in _ngrams(tokens).items():
            vectors[len(ngram) - 1][ngram] = count * (self.log_pictures - math.log(max(1, self.frequency[ngram])))
        norms = [math.sqrt(sum(weight**2 for weight in vector.values())) for vector in vectors]
        return vectors, norms, max(len(tokens) - 1, 0)


def _ngrams(tokens: Sequence[str]) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for n in range(1, LONGEST + 1) for i in range(len(tokens) - n + 1))
