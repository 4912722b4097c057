"""Small files in the formats that the data sets are published in, about drawn scenes."""

from __future__ import annotations

import json

from dyrate_kernels import shapes
from dyrate_kernels.evaluation import suites


def scenes(count, first=-7_000_000):
    """Held-out scenes with at least one thing."""
    found = (shapes.make_scene(first - i) for i in range(10 * count))
    return [scene for scene in found if scene.things][:count]


def draw(scene, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    shapes.draw(scene, 96).save(path)


def colour_question(scene):
    sample = shapes.make_sample(scene.seed, "colour", scene)
    return sample.prompt, sample.answer.rstrip(".").lower()


def gqa(folder, drawn):
    content = {}
    for i, scene in enumerate(drawn):
        draw(scene, folder / "images" / f"n{i}.jpg")
        question, answer = colour_question(scene)
        content[f"20{i}"] = {
            "question": question, "imageId": f"n{i}", "answer": answer, "fullAnswer": f"It is {answer}.", "isBalanced": True,
            "types": {"structural": ("query", "verify")[i % 2], "semantic": "attr", "detailed": "x"},
        }  # fmt: skip
    return content


def vizwiz(folder, drawn):
    content = []
    for i, scene in enumerate(drawn):
        draw(scene, folder / "images" / f"VizWiz_val_{i:08d}.jpg")
        question, answer = colour_question(scene)
        answers = [{"answer": answer if j < 7 else "unanswerable", "answer_confidence": "yes"} for j in range(10)]
        content.append(
            {"image": f"VizWiz_val_{i:08d}.jpg", "question": question, "answers": answers, "answer_type": "other", "answerable": 1}
        )
    return content


def textvqa(folder, drawn):
    data = []
    for i, scene in enumerate(drawn):
        draw(scene, folder / "images" / f"0054c9{i}.jpg")
        question, answer = colour_question(scene)
        data.append(
            {
                "question": question,
                "image_id": f"0054c9{i}",
                "image_classes": ["x"],
                "image_width": 96,
                "image_height": 96,
                "answers": [answer] * 2 + ["other"] * 8,
                "question_tokens": question.split(),
                "question_id": 34602 + i,
                "set_name": "val",
            }  # fmt: skip
        )
    return {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": data}


def scienceqa(folder, drawn):
    content = {}
    for i, scene in enumerate(drawn):
        draw(scene, folder / "images" / "test" / str(i) / "image.png")
        question, answer = colour_question(scene)
        content[str(i)] = {
            "question": question, "choices": ["plaid", answer, "none"], "answer": 1, "hint": "It was drawn." if i % 2 else "",
            "image": "image.png", "task": "closed choice", "grade": "grade2", "subject": "natural science", "split": "test",
        }  # fmt: skip
    content["90"] = {**content["0"], "image": None}
    content["91"] = {**content["0"], "split": "train"}
    return content


def pope(folder, drawn):
    lines = []
    for i, scene in enumerate(drawn):
        draw(scene, folder / "images" / f"COCO_val2014_{i:012d}.jpg")
        label, text = ("yes", scene.things[0].shape) if i % 2 == 0 else ("no", "snowboard")
        lines.append(
            {"question_id": i + 1, "image": f"COCO_val2014_{i:012d}.jpg", "text": f"Is there a {text} in the image?", "label": label}
        )
    return lines


def captions(scene):
    text = shapes.make_sample(scene.seed, "describe", scene).answer
    return [text, text.split(".")[0] + ".", "A picture of a few things."]


def nocaps(folder, drawn):
    content = {"licenses": [], "info": {}, "images": [], "annotations": []}
    for i, scene in enumerate(drawn):
        draw(scene, folder / "images" / f"00a{i}.jpg")
        content["images"].append(
            {"license": 0, "open_images_id": f"00a{i}", "file_name": f"00a{i}.jpg", "id": i, "domain": ("in-domain", "out-domain")[i % 2]}
        )
        content["annotations"] += [{"image_id": i, "id": 9 * i + j, "caption": text} for j, text in enumerate(captions(scene))]
    return content


def karpathy(folder, drawn, name, subfolder=""):
    content = {"images": [], "dataset": name}
    for i, scene in enumerate(drawn):
        draw(scene, folder / "images" / subfolder / f"{i}.jpg")
        sentences = [{"tokens": text.split(), "raw": text, "imgid": i, "sentid": 5 * i + j} for j, text in enumerate(captions(scene))]
        entry = {"filename": f"{i}.jpg", "imgid": i, "split": "test", "sentences": sentences, "sentids": []}
        content["images"].append({**entry, **({"filepath": subfolder} if subfolder else {})})
    content["images"].append({**content["images"][0], "filename": "trained on.jpg", "split": "train"})
    return content


MAKERS = {
    "gqa": gqa, "vizwiz": vizwiz, "textvqa": textvqa, "scienceqa": scienceqa, "pope": pope, "nocaps": nocaps,
    "flickr30k": lambda folder, drawn: karpathy(folder, drawn, "flickr30k"),
    "coco": lambda folder, drawn: karpathy(folder, drawn, "coco", "val2014"),
}  # fmt: skip


def publish(name, folder, count=4):
    """(file, folder of the pictures) of a data set of ``count`` questions."""
    assert set(MAKERS) == set(suites.names())
    content = MAKERS[name](folder, scenes(count))
    return write(content, folder / f"{name}.json", lines=name == "pope"), folder / "images"


def write(content, file, lines=False):
    file.write_text("".join(json.dumps(line) + "\n" for line in content) if lines else json.dumps(content))
    return file
