"""BOS exactly once: at the start of what a model reads first, and never inside a query or a student's prompt."""

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from cedkv.core.errors import DataError
from cedkv.core.values import OnEpisode
from cedkv.tasks.tokenize import SampleTokenizer, bos_put_by, tokenize_off, tokenize_on
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


@pytest.mark.parametrize("written", ["<s>", "{{ bos_token }}"])
@pytest.mark.parametrize("bos", [False, True])
def test_bos_of_the_template_is_told_by_its_id(written: str, bos: bool) -> None:
    """Written out or by name; an OFF prompt alone with BOS would have it in the middle, behind a prefix."""
    made = tiny.tokenizer(bos=bos)
    made.chat_template = written + tiny.CHAT_TEMPLATE
    tokenizing = SampleTokenizer.of(made)
    on, off = tokenize_on(tokenizing, EPISODE), tokenize_off(tokenizing, "off-1", "Why?")
    for ids in (on.teacher_ids, on.base_ids, off.token_ids):
        assert ids[0] == made.bos_token_id
        assert ids.count(made.bos_token_id) == 1
    assert made.bos_token_id not in off.student_ids
    assert bos_put_by(made, {}) == ("tokenizer" if bos else "chat template")


def test_who_puts_bos_where_no_one_does() -> None:
    made = tiny.tokenizer()
    assert bos_put_by(made, {}) == "no one"
    made.chat_template = "{{ messages[1]['content'] }}"
    assert bos_put_by(made, {}) == "unknown"


def test_a_tokenizer_without_its_configuration_has_bos_all_the_same() -> None:
    """tokenizer.json puts it, and tokenizer_config.json, which would name it, is missing."""
    made = tiny.tokenizer(bos=True)
    start, made.bos_token = made.bos_token_id, None
    assert SampleTokenizer.of(made).bos == (start,)
    made.chat_template = "<s>hello <s>" + tiny.CHAT_TEMPLATE
    with pytest.raises(DataError, match="the chat template writes '<s>' in the middle"):
        tokenize_off(SampleTokenizer.of(made), "off-1", "Why?")


def test_a_tokenizer_that_cuts_at_random_is_rejected() -> None:
    """Else the answer would seem to merge with the query, in one run and not in the next."""
    made = tiny.tokenizer()
    made.backend_tokenizer.model.dropout = 0.1
    with pytest.raises(DataError, match=r'BPE dropout of 0\.1: .* write "dropout": null'):
        SampleTokenizer.of(made)
    made.backend_tokenizer.model.dropout = 0.0
    assert tokenize_on(SampleTokenizer.of(made), EPISODE).answer_token_ids
