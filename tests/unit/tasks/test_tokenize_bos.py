"""BOS exactly once: at the start of what a model reads first, and never inside a query or a student's prompt."""

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from cedkv.core.errors import DataError
from cedkv.core.values import OnEpisode
from cedkv.tasks.tokenize import SampleTokenizer, tokenize_off, tokenize_on
from tests.support import tiny

EPISODE = OnEpisode("on-7", "Word: dax\nSymbol: blue\n\n", "Word: dax\nSymbol:", " blue", ())


def framed(single: str) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with other special tokens around a text."""
    made = tiny.tokenizer()
    pairs = [(token, made.convert_tokens_to_ids(token)) for token in ("<s>", "</s>", "<user>")]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=pairs)
    return made


def test_bos_exactly_once() -> None:
    """Twice at the start of a demo it would shift every position; in the middle of a query it would cut the text."""
    made = tiny.tokenizer(bos=True)
    start = made.bos_token_id
    on = tokenize_on(SampleTokenizer.of(made), EPISODE)
    off = tokenize_off(SampleTokenizer.of(made), "off-1", "What is chess?")
    for ids in (on.demo_token_ids, on.teacher_ids, on.base_ids, off.token_ids):
        assert ids[0] == start
        assert ids.count(start) == 1
    assert start not in on.query_token_ids + off.student_ids
    assert on.token_kinds[0] == "bos"
    assert on.token_kinds.count("bos") == 1
    assert on.base_ids == (start, *on.query_token_ids)


def test_no_bos_where_there_is_none() -> None:
    made = tiny.tokenizer()
    on, off = tokenize_on(SampleTokenizer.of(made), EPISODE), tokenize_off(SampleTokenizer.of(made), "off-1", "What is chess?")
    assert "bos" not in on.token_kinds
    assert on.base_ids == on.query_token_ids
    assert off.student_ids == off.token_ids
    assert not off.has_bos


def test_bos_that_the_chat_template_writes_is_not_doubled() -> None:
    made = tiny.tokenizer(bos=True)
    made.chat_template = "{{ bos_token }}" + tiny.CHAT_TEMPLATE
    assert tokenize_off(SampleTokenizer.of(made), "off-1", "Why?").token_ids.count(made.bos_token_id) == 1


def test_special_tokens_at_the_end_are_left_out() -> None:
    made = framed("<s> $A </s>")
    assert SampleTokenizer.of(made).bos == (made.bos_token_id,)
    assert made.eos_token_id not in tokenize_on(SampleTokenizer.of(made), EPISODE).teacher_ids


@pytest.mark.parametrize("single", ["<user> $A", "<s> <user> $A"])
def test_other_leading_special_tokens_are_rejected(single: str) -> None:
    with pytest.raises(DataError, match="only a single BOS"):
        SampleTokenizer.of(framed(single))
