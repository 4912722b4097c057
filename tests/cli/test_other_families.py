"""The commands on a saved model of another family, with its own processor: tiles, markers between them, pictures of several sizes."""

from __future__ import annotations

import json

import pytest
import transformers
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizers

from dyrate_kernels import shapes
from dyrate_kernels.cli.main import main
from tests import models

TEMPLATE = (
    "{% for m in messages %}user {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %} {{ c['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}assistant"
)


@pytest.fixture(scope="module")
def idefics(tmp_path_factory):
    """A folder with a tiny Idefics3, and three pictures that make 1 to 5 tiles."""
    if not hasattr(transformers, "Idefics3ImageProcessorPil"):
        pytest.skip("this transformers needs torchvision for Idefics3's pictures")
    folder = tmp_path_factory.mktemp("idefics")
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]
    special = ["<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *tiles]
    words = ["<pad>", "</s>", "<s>", "user", "assistant", "Describe", "picture", "\n", "\n\n", *special]
    words += [f"w{number}" for number in range(models.IMAGE_TOKEN - len(words))]
    words += ["<image>", "w"]
    assert words.index("<image>") == models.IMAGE_TOKEN and len(words) == models.VOCAB
    made = Tokenizer(tokenizers.WordLevel({word: number for number, word in enumerate(words)}, unk_token="w"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", additional_special_tokens=[*special, "<image>"]
    )
    pictures = transformers.Idefics3ImageProcessorPil(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}, do_image_splitting=True
    )
    processor = transformers.Idefics3Processor(image_processor=pictures, tokenizer=tokenizer, image_seq_len=16, chat_template=TEMPLATE)
    model = models.build("idefics3", "llama")
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    (folder / "pictures").mkdir()
    for number, size in enumerate([(96, 96), (96, 40), (40, 96)]):
        shapes.draw(shapes.make_scene(number)).resize(size, Image.Resampling.BICUBIC).save(folder / "pictures" / f"{number}.png")
    return folder


@pytest.mark.parametrize("retention", ["recoverable", "evict"])
def test_generate_compare_and_caption(capsys, idefics, tmp_path, retention):
    shared = ["--model", str(idefics / "model"), "--prompt", "Describe picture", "--max-new-tokens", "6", "--retention", retention]
    texts = {}
    for number in range(3):
        picture = str(idefics / "pictures" / f"{number}.png")
        assert main(["generate", "--image", picture, "--policy", "fixed", "--k", "2", "--rate", "0.5", *shared, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        texts[f"{number}.png"] = found["text"]
        assert found["visual_tokens"][0] % 16 == 0 and found["steps"][1]["kept"][0] == found["visual_tokens"][0] // 2
    assert main(["compare", "--image", picture, "--policies", "none,fastv:k=2:rate=0.5", *shared, "--json"]) == 0
    capsys.readouterr()
    given = ["caption", "--images", str(idefics / "pictures"), "--out", str(tmp_path / retention), "--engine", "local", "--batch-size", "3"]
    assert main([*given, "--policy", "fixed", "--k", "2", "--rate", "0.5", *shared, "--json"]) == 0
    lines = [json.loads(line) for line in (tmp_path / retention / "captions.jsonl").read_text().splitlines()[1:]]
    assert {line["name"]: line["caption"] for line in lines} == texts  # batched and padded as alone
    assert len({line["visual_tokens"] for line in lines}) > 1
    assert main(["generate", "--image", picture, "--plot", str(tmp_path / "kept.png"), *shared]) == 0 and (tmp_path / "kept.png").exists()
    capsys.readouterr()
    plot = str(tmp_path / "reduced.png")
    assert main(["generate", "--image", picture, "--vision", "aim:keep=0.5", "--plot", plot, *shared, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["visual_tokens"][0] == found["visual_tokens_in"][0] // 2 and (tmp_path / "reduced.png").exists()
    assert main(["generate", "--image", picture, "--vision", "hired", *shared]) == 1
    assert "reducer 'hired' reads the vision tower" in capsys.readouterr().err
