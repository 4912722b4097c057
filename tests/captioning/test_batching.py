"""Which pictures are generated together: like numbers of visual tokens, like expected lengths; the same for the same order."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dyrate_kernels import shapes
from dyrate_kernels.captioning import captioner
from dyrate_kernels.captioning.batching import Lengths, batches, detail, key
from dyrate_kernels.captioning.captioner import Captioner, Task
from dyrate_kernels.captioning.inputs import Source


def test_batches_hold_pictures_of_like_keys():
    sizes = {0: 9, 1: 3, 2: 9, 3: 3, 4: 5}
    assert list(batches(sizes, sizes.__getitem__, 2)) == [[1, 3], [4, 0], [2]]
    assert list(batches({}, sizes.__getitem__, 2)) == []


def test_expected_length():
    lengths = Lengths()
    assert lengths.expected(3) == 0.0
    for tokens in (10, 20):
        lengths.see(3, tokens)
    lengths.see(5, 60)
    assert lengths.expected(3) == pytest.approx((30 + 4 * 30) / 6)
    assert lengths.expected(5) == pytest.approx((60 + 4 * 30) / 5)
    assert lengths.expected(9) == pytest.approx(30)  # nothing like it was seen


def test_detail_counts_what_there_is_to_see():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    flat, busy = Image.new("RGB", (50, 70), "red"), Image.fromarray(noise)
    assert detail(flat) == 0 < detail(shapes.draw(shapes.make_scene(1))) < detail(busy) <= 16


def test_visual_tokens_come_first_then_lengths():
    lengths = Lengths()
    assert key(100, 7, lengths) < key(200, 2, lengths)
    assert key(100, 2, lengths) < key(100, 7, lengths)  # no length is known: by detail
    for kind, tokens in ((2, 90), (7, 10)):
        lengths.see(kind, tokens)
    assert key(100, 7, lengths) < key(101, 2, lengths) < key(200, 7, lengths)  # 100 and 101 are of one kind


@pytest.fixture
def sources(tmp_path):
    found = []
    for seed in range(12):
        shapes.draw(shapes.make_scene(seed)).save(tmp_path / f"{seed}.png")
        found.append(Source(str(seed), str(tmp_path / f"{seed}.png")))
    (tmp_path / "words.png").write_bytes(b"words")
    return [*found[:7], Source("words", str(tmp_path / "words.png")), *found[7:]]


def test_a_worker_learns_lengths_and_answers_in_order(sources, monkeypatch):
    asked = []
    ask = Captioner._ask
    monkeypatch.setattr(Captioner, "_ask", lambda self, names, pictures: asked[-1].append(list(names)) or ask(self, names, pictures))
    runs = []
    for _ in range(2):
        asked.append([])
        worker = Captioner(Task(max_new_tokens=50, batch_size=4))
        runs.append([caption for start in (0, 8) for caption in worker(sources[start : start + 8])])
        assert [caption.name for caption in runs[-1]] == [source.name for source in sources]
        seen = [caption for caption in runs[-1] if caption.error is None]
        assert sum(worker.lengths._counts.values()) == len(seen) == 12
        assert sum(worker.lengths._sums.values()) == sum(caption.tokens for caption in seen)
    assert asked[0] == asked[1] and [each.caption for each in runs[0]] == [each.caption for each in runs[1]]
    alone = Captioner(Task(max_new_tokens=50, batch_size=1))
    assert [caption.caption for caption in alone(sources[:6])] == [caption.caption for caption in runs[0][:6]]


def test_pictures_of_like_expected_length_are_asked_together(sources, monkeypatch):
    monkeypatch.setattr(captioner, "detail", lambda picture: picture.getpixel((0, 0))[0] % 3)
    worker = Captioner(Task(max_new_tokens=2, batch_size=3))
    for kind, tokens in ((0, 51), (1, 10), (2, 90)):
        for _ in range(40):
            worker.lengths.see(kind, tokens)
    asked = []
    ask = worker._ask

    def note(names, pictures):
        asked.append([picture.getpixel((0, 0))[0] % 3 for picture in pictures])
        return ask(names, pictures)

    monkeypatch.setattr(worker, "_ask", note)
    worker([source for source in sources if source.name != "words"])
    kinds = [kind for part in asked for kind in part]
    assert kinds == sorted(kinds, key=[1, 0, 2].index) and len(set(kinds)) > 1
