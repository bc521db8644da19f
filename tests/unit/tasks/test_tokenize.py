"""From text to tokens: nothing is lost at a boundary, an answer is one token, kinds stay with their text."""

from functools import cache
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from cedkv.core.errors import DataError
from cedkv.core.values import OnEpisode, OnSample, TokenKind
from cedkv.tasks.tokenize import SampleTokenizer, single_token_symbols, tokenize_off, tokenize_on
from tests.support import tiny

DEMO, QUERY = "Word: blick\nSymbol: red\n\nWord: dax\nSymbol: blue\n\n", "Word: dax\nSymbol:"
TOKENIZERS = pytest.mark.parametrize("bos", [False, True], ids=["plain", "bos"])


@cache
def tokenizer(bos: bool = False, chat: bool = True) -> PreTrainedTokenizerFast:
    return tiny.tokenizer(bos, chat)


def episode(
    demo: str = DEMO, query: str = QUERY, answer: str = " blue", kinds: tuple[tuple[int, int, TokenKind], ...] = ()
) -> OnEpisode:
    return OnEpisode("on-7", demo, query, answer, kinds)


def bytes_and(*merges: tuple[str, str], trim: bool = False) -> PreTrainedTokenizerFast:
    """Single bytes and a few merges; with ``trim`` the offsets leave out the spaces at a token's ends, as Llama 3's do."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in merges)]
    raw = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=list(merges)))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    if trim:
        raw.post_processor = processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(tokenizer_object=raw, clean_up_tokenization_spaces=False)


@TOKENIZERS
def test_demo_and_query_are_split_at_the_boundary(bos: bool) -> None:
    made = tokenizer(bos)
    sample = tokenize_on(SampleTokenizer.of(made), episode())
    assert made.decode(sample.demo_token_ids[int(bos) :]) == DEMO
    assert made.decode(sample.query_token_ids) == QUERY
    assert list(sample.teacher_ids[int(bos) :]) == made(DEMO + QUERY, add_special_tokens=False).input_ids
    assert made.decode([sample.answer_token_id]) == " blue"


@pytest.mark.parametrize(
    ("demo", "query", "token"),
    [("Symbol: re", "d\nWord: dax\nSymbol:", "Ġred"), ("Symbol: ", "red\nSymbol:", "Ġred"), ("Sym", "bol:", "Symbol")],
)
def test_token_across_the_boundary_names_the_sample(demo: str, query: str, token: str) -> None:
    with pytest.raises(DataError, match=rf"^sample on-7: the boundary .* falls inside the token '{token}'"):
        tokenize_on(SampleTokenizer.of(tokenizer()), episode(demo, query))


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize(("demo", "query"), [("a ", "xb"), ("a  ", "xb"), ("a ", "  b"), ("a\n", "  b")])
def test_space_across_the_boundary(demo: str, query: str, trim: bool) -> None:
    """Trimmed offsets hide the space that a token takes from the other side."""
    made = bytes_and(("Ġ", "x"), ("Ġ", "Ġ"), ("Ċ", "Ġ"), trim=trim)
    with pytest.raises(DataError, match=r"^sample on-7: the boundary"):
        tokenize_on(SampleTokenizer.of(made), episode(demo, query, "z"))


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize(("demo", "query"), [("a ", " b"), ("a", " xb"), ("a\n", "xb"), ("a  ", "\nb"), (" ", " b")])
def test_space_on_its_own_side(demo: str, query: str, trim: bool) -> None:
    made = bytes_and(("Ġ", "x"), ("Ġ", "Ġ"), trim=trim)
    sample = tokenize_on(SampleTokenizer.of(made), episode(demo, query, "z"))
    assert (made.decode(sample.demo_token_ids), made.decode(sample.query_token_ids)) == (demo, query)


@pytest.mark.parametrize(
    ("query", "answer", "message"),
    [
        (QUERY, " blue red", r"answer_text ' blue red' is 2 tokens \['Ġblue', 'Ġred'\]"),
        (QUERY, " blick", r"answer_text ' blick' is \d tokens"),
        (QUERY, "", r"answer_text '' is 0 tokens"),
        ("Word: dax\nSym", "bol", r"answer_text 'bol' merges with the end of query_text"),
    ],
)
def test_answer_that_is_not_one_token(query: str, answer: str, message: str) -> None:
    with pytest.raises(DataError, match=rf"^sample on-7: {message}"):
        tokenize_on(SampleTokenizer.of(tokenizer()), episode(query=query, answer=answer))


@pytest.mark.parametrize(("demo", "query"), [("", QUERY), (DEMO, "")])
def test_empty_side_is_rejected(demo: str, query: str) -> None:
    with pytest.raises(DataError, match="sample on-7: demo_text and query_text must have at least one token each"):
        tokenize_on(SampleTokenizer.of(tokenizer()), episode(demo, query))


@TOKENIZERS
def test_kinds_stay_with_their_text(bos: bool) -> None:
    made = tokenizer(bos)
    ranges: tuple[tuple[int, int, TokenKind], ...] = ((0, 5, "delimiter"), (5, 9, "input"), (17, 21, "answer"))
    sample = tokenize_on(SampleTokenizer.of(made), episode("Word: dax\nSymbol: red\n", kinds=ranges))
    found: dict[str, str] = {}
    for token, kind in zip(sample.demo_token_ids, sample.token_kinds, strict=True):
        found[kind] = found.get(kind, "") + made.decode([token])
    assert found == {"delimiter": "Word:\nSymbol:\n", "input": " dax", "answer": " red"} | ({"bos": "<s>"} if bos else {})


@pytest.mark.parametrize(
    ("ranges", "kind"),
    [
        (((0, 2, "delimiter"), (2, 4, "input")), "input"),
        (((0, 1, "answer"), (1, 4, "input")), "answer"),
        (((0, 1, "delimiter"), (3, 4, "answer")), "answer"),
        (((4, 5, "answer"),), "delimiter"),
    ],
)
def test_token_of_several_kinds(ranges: tuple[tuple[int, int, TokenKind], ...], kind: str) -> None:
    """A token that shows any part of an answer is an answer, or a span could start at it."""
    assert tokenize_on(SampleTokenizer.of(tokenizer()), episode(" red\n\n", kinds=ranges)).token_kinds[0] == kind


def test_chat_template_is_used_for_off_prompts_alone() -> None:
    made = tokenizer()
    prompt = tokenize_off(SampleTokenizer.of(made), "off-1", "What is chess?")
    assert prompt.prompt_text == made.decode(prompt.token_ids) == "<user>\nWhat is chess?<end>\n<bot>\n"
    assert tokenize_off(SampleTokenizer.of(tokenizer(chat=False)), "off-1", "What is chess?").prompt_text == "What is chess?"
    assert "<user>" not in made.decode(tokenize_on(SampleTokenizer.of(made), episode()).teacher_ids)


def test_prompt_without_tokens_is_rejected() -> None:
    with pytest.raises(DataError, match="sample off-1: prompt_text has no token"):
        tokenize_off(SampleTokenizer.of(tokenizer(bos=True, chat=False)), "off-1", "")


def test_single_token_symbols() -> None:
    assert single_token_symbols(tokenizer(), "Symbol:", ["red", "blick", "gold", "red blue"]) == ("red", "gold")


def outcome(made: Any, demo: str, query: str) -> OnSample | str:
    """The sample, or why there is none."""
    try:
        return tokenize_on(SampleTokenizer.of(made), episode(demo, query, " red"))
    except DataError as error:
        return str(error)


def splits_at(made: Any, ids: list[int], demo: str, query: str) -> bool:
    return any((made.decode(ids[:k]), made.decode(ids[k:])) == (demo, query) for k in range(1, len(ids)))


@TOKENIZERS
@settings(max_examples=150, deadline=None, derandomize=True)
@given(demo=st.text(alphabet=st.sampled_from("red \n:é語𝄞WordSymbol"), min_size=1), query=st.text(min_size=1))
@example(demo="語", query="語")
@example(demo="Symbol: re", query="d")
def test_any_text_is_split_exactly_or_rejected(bos: bool, demo: str, query: str) -> None:
    """Rejectd exactly where no token ends at the boundary; otherwise both sides decode to what they were."""
    made = tokenizer(bos)
    ids = made(demo + query, add_special_tokens=False).input_ids
    sample = outcome(made, demo, query)
    if isinstance(sample, str):
        assert sample.startswith("sample on-7: ")
        assert "answer_text" in sample or "query_text is blank" in sample or not splits_at(made, ids, demo, query)
        return
    assert list(sample.teacher_ids[int(bos) :]) == ids
    assert made.decode(sample.demo_token_ids[int(bos) :]) == demo
    assert made.decode(sample.query_token_ids) == query
    assert len(sample.token_kinds) == len(sample.demo_token_ids)
