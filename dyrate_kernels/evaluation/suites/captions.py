"""Captions: COCO, Flickr30k, NoCaps, scored with CIDEr-D."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from dyrate_kernels.evaluation.cider import Cider
from dyrate_kernels.evaluation.suites.file_suite import Entry, FileSuite, Question

PROMPT = "Provide a one-sentence caption for the provided image."


class _Captions(FileSuite):
    """One question a picture. Document frequencies are those of all the file's references, so ``limit`` changes no score."""

    most = 64
    captions = True
    coco_format: ClassVar[bool] = False
    karpathy_format: ClassVar[bool] = False

    def __init__(self, data: Any, images: Any = None, limit: int | None = None) -> None:
        super().__init__(data, images, limit)
        try:
            self.cider = Cider(question.answers for question in self.every)
        except ValueError as error:
            raise ValueError(f"{self.file}: {error}") from None

    def points(self, question: Question, text: str) -> float:
        return self.cider.score(text, question.answers)

    def read(self, content: Any) -> Iterator[Question]:
        whole = Entry(self.file, "the file", self.of_type(content, dict), self.expects)
        if content.get("dataset", self.name) != self.name:
            raise whole.wrong(f"must be of the dataset {self.name!r}, got {content['dataset']!r}")
        if content.get("images") == []:
            return
        pictures = whole.need("images", list)
        if self.coco_format and (not self.karpathy_format or "annotations" in content):
            yield from self._coco(pictures, whole.need("annotations", list))
        else:
            yield from self._karpathy(pictures)

    def _coco(self, pictures: list[Any], annotations: list[Any]) -> Iterator[Question]:
        references: dict[Any, list[str]] = {}
        for entry in self.entries(annotations, "annotation"):
            references.setdefault(entry.need("image_id", int, str), []).append(entry.need("caption", str, empty=True))
        for entry in self.entries(pictures, "image"):
            key, file = entry.need("id", int, str), entry.need("file_name", str)
            if key not in references:
                raise entry.wrong(f"(id {key}) must have captions among the annotations, got none")
            group = str(entry.values.get("domain", self.name))
            yield Question(str(key), group, PROMPT, self.picture(file), tuple(references[key]))

    def _karpathy(self, pictures: list[Any]) -> Iterator[Question]:
        for entry in self.entries(pictures, "image"):
            if entry.need("split", str) != "test":
                continue
            file = entry.need("filename", str)
            sentences = entry.need("sentences", list)
            if not all(isinstance(each, dict) and isinstance(each.get("raw"), str) for each in sentences):
                raise entry.wrong(f"must have sentences with a 'raw' text, got {str(sentences)[:60]!r}")
            folder = entry.values.get("filepath")
            names = (f"{folder}/{file}", file) if folder else (file,)
            yield Question(file, self.name, PROMPT, self.picture(*names), tuple(each["raw"] for each in sentences))


_KARPATHY = "{images: [{filename, split, sentences: [{raw, ..}], ..}]}, of which the split test is asked"
_COCO = "{images: [{id, file_name, ..}], annotations: [{image_id, caption, ..}]}"


class COCO(_Captions):
    """COCO captions (Chen et al. 2015): test part of Karpathy's split, or COCO's own ``captions_val2014.json`` / ``.._val2017.json``."""

    name = "coco"
    expects = f"Karpathy's split (dataset_coco.json): {_KARPATHY}, or COCO's captions (captions_val2014.json): {_COCO}"
    folders = ("", "val2014", "val2017")
    coco_format = karpathy_format = True


class Flickr30k(_Captions):
    """Flickr30k (Young et al. 2014): the test part of Karpathy's split."""

    name = "flickr30k"
    expects = f"Karpathy's split (dataset_flickr30k.json): {_KARPATHY}"
    folders = ("", "flickr30k-images")
    karpathy_format = True


class NoCaps(_Captions):
    """NoCaps (Agrawal et al. 2019), ``nocaps_val_4500_captions.json``. Groups: domain."""

    name = "nocaps"
    expects = f"NoCaps's captions (nocaps_val_4500_captions.json): {_COCO}"
    folders = ("", "val")
    coco_format = True
