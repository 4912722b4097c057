"""Prompts as a model reads them: what begins and ends a sequence stands there once."""

import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor

from dyrate_kernels import chat
from dyrate_kernels.bundled import MODEL_FOLDER, scene_inputs
from dyrate_kernels.cli import common
from dyrate_kernels.evaluation.runner import encode
from dyrate_kernels.evaluation.suite import ShapesSuite
from dyrate_kernels.training.data import Collator, EncodedExamples, Example

WRITES = ("", "{{ bos_token }}", "{{ '\n' + bos_token }}")
ADDS = {"nothing": ("$A", 0), "begin": ("<s> $A", 1), "begin and end": ("<s> $A </s>", 1)}


def picture():
    return Image.new("RGB", (96, 96), "red")


@pytest.fixture
def processor():
    return AutoProcessor.from_pretrained(MODEL_FOLDER, local_files_only=True)


def adding(processor, single):
    tokenizer = processor.tokenizer
    special = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, pair="$A $B", special_tokens=special)


@pytest.mark.parametrize("writes", WRITES)
@pytest.mark.parametrize("adds", ADDS)
def test_a_sequence_begins_once_and_ends_open_whatever_template_and_tokenizer_write(processor, writes, adds):
    single, by_tokenizer = ADDS[adds]
    suite = ShapesSuite(1, tasks=("describe", "colour"))
    texts = [chat.render(processor, suite[place].messages) for place in range(2)]
    plain = [processor(images=list(suite[place].images), text=texts[place])["input_ids"][0] for place in range(2)]
    assert len(plain[0]) != len(plain[1])  # so that one of them is padded
    adding(processor, single)
    processor.chat_template = writes + processor.chat_template
    begin = [processor.tokenizer.bos_token_id] * bool(writes or by_tokenizer)
    fields = encode(processor, [suite[0], suite[1]])
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(fields["input_ids"], fields["attention_mask"], strict=True)]
    if "\n" in writes and not by_tokenizer:
        rows = [row[1:] for row in rows]  # the template's own newline stays where nothing is mended
    assert rows == [begin + ids for ids in plain]
    assert fields["attention_mask"][:, -1].all()  # padded on the left
    alone = common.prepare(processor, [picture()], "Describe the picture.", "cpu")["input_ids"][0]
    assert (alone == begin[0]).sum() == 1 if begin else (alone != processor.tokenizer.bos_token_id).all()
    assert alone[-1] != processor.tokenizer.eos_token_id
    row = EncodedExamples([Example("x", [chat.user("What?", images=1)], [picture()], "a red square.")], processor)[0]
    prompt = Collator(processor)([row])["prompt"]["input_ids"][0].tolist()
    whole = prompt + row.answer
    assert whole.count(processor.tokenizer.bos_token_id) == len(begin) and whole.count(processor.tokenizer.eos_token_id) == 1
    assert whole[-1] == processor.tokenizer.eos_token_id


def test_what_a_tokenizer_begins_with_need_not_be_called_beginning_of_sequence(processor):
    tokenizer = processor.tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["[gMASK]", "<sop>"]})
    ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("[gMASK]", "<sop>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="[gMASK] <sop> $A", pair="$A $B", special_tokens=ids)
    for template in (processor.chat_template, "[gMASK]<sop>" + processor.chat_template):
        processor.chat_template = template
        found = common.prepare(processor, [picture()], "What?", "cpu")["input_ids"][0].tolist()
        assert found[:2] == [number for _, number in ids] and found.count(ids[0][1]) == 1


@pytest.mark.parametrize("tail", ["<|end|>", "<|end|>\n", " ", ""])
def test_an_answer_ends_with_the_token_that_the_template_writes_behind_it_or_the_end_of_sequence(processor, tail):
    tokenizer = processor.tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    processor.chat_template = processor.chat_template.replace("{{ '</s>' }}", f"{{{{ {tail!r} }}}}")
    ids = chat.answer_ids(processor, [chat.user("What?", images=1)], "a red square.")
    end = tokenizer.convert_tokens_to_ids("<|end|>") if "end" in tail else tokenizer.eos_token_id
    assert ids[-1] == end and ids.count(end) == 1 and not {tokenizer.eos_token_id, tokenizer.bos_token_id} & set(ids[:-1])
    assert tokenizer.decode(ids[:-1]).strip() == "a red square."


def test_a_tokenizer_without_a_padding_token_pads_a_batch_and_stays_without(processor):
    suite = ShapesSuite(1, tasks=("describe", "colour"))
    want = encode(processor, [suite[0], suite[1]])
    processor.tokenizer.pad_token = None
    found = encode(processor, [suite[0], suite[1]])
    assert processor.tokenizer.pad_token is None
    assert torch.equal(found["attention_mask"], want["attention_mask"])
    assert torch.equal(found["input_ids"] * found["attention_mask"], want["input_ids"] * want["attention_mask"])


def test_inputs_have_the_models_type_and_hold_tensors_alone(processor):
    class Half:
        device, dtype = torch.device("cpu"), torch.float16

    fields = scene_inputs(Half(), processor, 2)
    assert fields["pixel_values"].dtype == torch.float16 and fields["input_ids"].dtype == torch.int64
    assert all(isinstance(value, torch.Tensor) for value in fields.values())
