"""Text that does not arrive at the model: lost characters are named, and so is what a tokenizer cannot tell apart."""

from __future__ import annotations

import re

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cedkv.core.errors import UnusableSample
from cedkv.core.values import OnEpisode, OnSample
from cedkv.tasks.demo_answers import guess_kinds, guess_shots
from cedkv.tasks.tokenize import SampleTokenizer, single_token_symbols, tokenize_off, tokenize_on
from tests.support import tiny, zoo

STRIP_ACCENTS = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
DEMO, QUERY = "Word: {}\nSymbol: red\n\nWord: {}\nSymbol: blue\n\n", "Word: {}\nSymbol:"


def without_accents(normalizer: normalizers.Normalizer = STRIP_ACCENTS) -> PreTrainedTokenizerFast:
    """The tiny tokenizer, which has a token for every byte, behind a normaliser."""
    made = tiny.tokenizer(chat=False)
    made.backend_tokenizer.normalizer = normalizer
    return made


def letters_only(unknown: str | None = None, declared: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer with tokens for ASCII alone; others vanish, or become ``unknown``, which transformers knows if declared."""
    raw = Tokenizer(models.BPE(unk_token=unknown))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("(?= )|\n"), "isolated")
    raw.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[] if unknown is None else [unknown],
        initial_alphabet=[*zoo.ASCII, " ", "\n"],
        show_progress=False,
    )
    raw.train_from_iterator(zoo.LINES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, **({"unk_token": unknown} if declared and unknown else {}))


def sample(
    tokenizer: PreTrainedTokenizerFast, *keys: str, answer: str = " blue", colours: tuple[str, str] = ("red", "blue")
) -> OnSample:
    first, second = keys or ("dax", "lug")
    demo, query = DEMO.format(first, second).replace("red", colours[0]).replace("blue", colours[1]), QUERY.format(second)
    kinds = guess_kinds(demo, query, (answer,), unlisted=True)
    episode = OnEpisode("on-7", demo, query, answer, kinds, shots=guess_shots(demo, kinds))
    return tokenize_on(SampleTokenizer.of(tokenizer, answer="whole"), episode)


@pytest.mark.parametrize(
    ("unknown", "declared"), [(None, True), ("<unk>", True), ("<unk>", False)], ids=["vanish", "unknown", "unknown, undeclared"]
)
def test_a_character_without_a_token_is_named(unknown: str | None, declared: bool) -> None:
    tokenizer = letters_only(unknown, declared)
    assert sample(tokenizer).answer_token_ids
    with pytest.raises(UnusableSample, match=r"^sample on-7: the tokenizer has no token for '語' in 'Word: 語\\nSymbol"):
        sample(tokenizer, "語", "lug")
    with pytest.raises(UnusableSample, match=r"^sample on-7: the tokenizer has no token for '語'"):
        sample(tokenizer, answer=" blue語", colours=("red", "blue語"))
    with pytest.raises(UnusableSample, match=r"^sample on-7: the tokenizer has no token for '★'"):
        sample(tokenizer, "dax★", "lug")
    with pytest.raises(UnusableSample, match=r"^sample on-7: the tokenizer has no token for 'é'"):
        sample(tokenizer, "e\u0301", "x\u0301")
    with pytest.raises(UnusableSample, match=r"^sample off-1: the tokenizer has no token for 'é'"):
        tokenize_off(SampleTokenizer.of(tokenizer), "off-1", "Why café?")
    with pytest.raises(UnusableSample, match=r"^sample off-1: the tokenizer has no token for 'é'"):
        tokenize_off(SampleTokenizer.of(tokenizer), "off-1", "A café. " * 90, document=True)


def test_a_character_behind_the_end_of_a_document_is_not_looked_at() -> None:
    made = SampleTokenizer.of(letters_only(), off_length=8)
    assert len(tokenize_off(made, "off-1", f"{'word ' * 50}é", document=True).token_ids) == 8


def test_white_space_that_vanishes_is_named() -> None:
    """Words that it kept apart are one word then; several spaces may become one."""
    for normalizer, named in ((normalizers.Replace("\t", ""), r"'\\t'"), (normalizers.Replace(Regex("[0-9]"), ""), "'1'")):
        with pytest.raises(UnusableSample, match=rf"^sample on-7: the tokenizer has no token for {named} in"):
            sample(without_accents(normalizer), "dax\t1", "lug")
    squeezed = without_accents(normalizers.Replace(Regex(r"\s+"), " "))
    assert sample(squeezed, "dax  1", "lug").answer_token_ids


@pytest.mark.parametrize(
    ("normalizer", "keys"),
    [
        (STRIP_ACCENTS, ("café", "lug")),
        (normalizers.Lowercase(), ("Dax", "LUG")),
        (normalizers.NFC(), ("cafe\u0301", "x")),
        (normalizers.NFKC(), ("①", "ﬁ")),
        (normalizers.Replace("``", '"'), ("``", "x")),
        (normalizers.Sequence([normalizers.NFKC(), STRIP_ACCENTS, normalizers.Lowercase()]), ("Ünï", "日本")),
    ],
    ids=["accents", "case", "NFC", "NFKC", "quotes", "all"],
)
def test_what_a_normaliser_changes_is_no_loss_while_keys_stay_apart(
    normalizer: normalizers.Normalizer, keys: tuple[str, str]
) -> None:
    made = sample(without_accents(normalizer), *keys)
    assert made.episode.demo_text.count(keys[0]) == 1


@pytest.mark.parametrize(
    ("normalizer", "keys"),
    [
        (STRIP_ACCENTS, ("pâte", "paté")),
        (normalizers.Lowercase(), ("Dax", "dax")),
        (normalizers.NFKC(), ("①", "1")),
        (normalizers.Replace(Regex("[★☆]"), ""), ("★", "☆")),
    ],
    ids=["accents", "case", "NFKC", "removed"],
)
def test_keys_that_become_the_same_are_named(normalizer: normalizers.Normalizer, keys: tuple[str, str]) -> None:
    said = ".*".join(re.escape(key) for key in keys)
    with pytest.raises(UnusableSample, match=rf"^sample on-7: the tokenizer reads .*{said}.* as the same text") as caught:
        sample(without_accents(normalizer), *keys)
    assert caught.value.reason == "texts that the tokenizer reads as the same"


def test_an_answer_keeps_its_letters() -> None:
    tokenizer = without_accents()
    with pytest.raises(UnusableSample, match=r"^sample on-7: answer_text ' bleu\u0301' loses letters or accents"):
        sample(tokenizer, answer=" bleu\u0301", colours=("red", "bleu\u0301"))
    with pytest.raises(UnusableSample, match=r"^sample on-7: the tokenizer reads 'red' and 'réd' as the same text"):
        sample(tokenizer, answer=" red", colours=("red", "réd"))
    assert (
        sample(without_accents(normalizers.Lowercase()), answer=" Blue").answer_token_ids == sample(tokenizer).answer_token_ids
    )


@pytest.mark.parametrize("name", zoo.USABLE)
def test_text_of_every_script_arrives_or_is_named(name: str) -> None:
    made = SampleTokenizer.of(zoo.made(name))
    for text in ("naïve café", "e\u0301", "日本語", "हिन्दी", "👩\u200d👧", "a\u00a0b", "ﬁ ①", "\u202b", "₂ ½", "''``"):
        if "unigram" in name and text not in ("a\u00a0b", "ﬁ ①", "''``"):  # the others have a token for every byte
            with pytest.raises(UnusableSample, match="no token for"):
                tokenize_off(made, "off-1", f"Why {text}?")
        else:
            assert tokenize_off(made, "off-1", f"Why {text}?").token_ids


def test_symbols_that_share_a_token_are_none() -> None:
    tokenizer = letters_only("<unk>", declared=False)
    assert single_token_symbols(tokenizer, "Symbol:", ["red", "blue"], " ") == ("red", "blue")
    assert single_token_symbols(without_accents(), "Symbol:", ["red", "réd", "blue"], " ") == ("blue",)
