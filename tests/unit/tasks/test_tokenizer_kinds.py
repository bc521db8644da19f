"""Every kind of tokenizer: samples come out as the text they were, or are rejected by name; BOS is there exactly once."""

from __future__ import annotations

import json
import random
import unicodedata
from pathlib import Path

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from cedkv.core.errors import DataError
from cedkv.core.values import OnEpisode, OnSample
from cedkv.tasks.load import Samples, load_samples
from cedkv.tasks.tokenize import SampleTokenizer, single_token_symbols, tokenize_off, tokenize_on
from tests.support import tiny, zoo

USABLE = pytest.mark.parametrize("name", zoo.USABLE)
DEMO, QUERY = "Word: dax\nSymbol: blue\n\n", "Word: dax\nSymbol:"


def fresh(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer of the test's own."""
    return PreTrainedTokenizerFast(tokenizer_object=zoo.USABLE[name](), bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def in_place(tokenizer: PreTrainedTokenizerFast, before: tuple[int, ...], ids: tuple[int, ...]) -> str:
    """The text of tokens that follow others."""
    first, both = (tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in (before, before + ids))
    assert both.startswith(first)
    return both[len(first) :]


def load(tokenizer: PreTrainedTokenizerFast, *overrides: str) -> Samples:
    return load_samples(tiny.config("nowhere", *overrides), tokenizer, 1024, len(tokenizer))


def check(tokenizer: PreTrainedTokenizerFast, samples: Samples) -> None:
    """The text is all there, tokenised as one, with BOS in front of what a model reads first and nowhere else."""
    bos = SampleTokenizer.of(tokenizer).bos
    for s in samples.on:
        text = s.episode.demo_text + s.episode.query_text
        assert s.teacher_ids == bos + tuple(tokenizer(text, add_special_tokens=False).input_ids)
        assert in_place(tokenizer, s.demo_token_ids, s.query_token_ids) == s.episode.query_text
        assert in_place(tokenizer, s.teacher_ids, (s.answer_token_id,)) == s.episode.answer_text
        assert s.token_kinds.count("bos") == len(bos)
        answered = [t for t, kind in zip(s.demo_token_ids, s.token_kinds, strict=True) if kind == "answer"]
        assert s.answer_token_id in answered
    for ids in [s.teacher_ids for s in samples.on] + [s.base_ids for s in samples.on] + [u.token_ids for u in samples.off]:
        assert ids[: len(bos)] == bos
        assert not set(bos) & set(ids[len(bos) :])
    for u in samples.off:
        assert u.token_ids == bos + u.student_ids
        assert u.prompt_text in tokenizer.decode(u.token_ids, clean_up_tokenization_spaces=False)


@USABLE
def test_generated_samples(name: str) -> None:
    samples = load(zoo.made(name))
    assert (len(samples.on), len(samples.off)) == (6, 8)
    check(zoo.made(name), samples)


@USABLE
def test_samples_of_ones_own(name: str, tmp_path: Path) -> None:
    on = {
        "demo_text": "Q: What is gold? A: gold\nQ: Is it red? A: red\n",
        "query_text": "Q: Is it red? A:",
        "answer_text": " red",
    }
    for kind, line in (("on", on), ("off", {"prompt_text": "Why? (1 of 2)\nBe  brief."})):
        (tmp_path / kind).write_text(json.dumps(line) + "\n")
    paths = [f"data.{kind}_path='{tmp_path / kind}'" for kind in ("on", "off")]
    check(zoo.made(name), load(zoo.made(name), *paths, "eval.on_samples=1", "eval.off_samples=1"))


@USABLE
def test_any_text_is_split_where_it_was_cut_or_rejected(name: str) -> None:
    """Characters that normalisers lengthen, take apart or join; spaces and line breaks at the cut; trimmed offsets."""
    tokenizer, rng = zoo.made(name), random.Random(1)
    form = "NFKC" if "NFKC" in name else "NFC"
    pieces = [*"red \n:oWSb", "  ", " \n", "\t", "\n\n", " red", "Word:", "Symbol:", "blue"]
    if form == "NFC":  # the Unigram one has no token for most others
        pieces += ["語", "𝄞", "é", "e\u0301", "Å", "\u00a0", "\u3000", "\u200b", "½"]
    else:
        pieces += ["ﬁ", "\u00a0", "\u3000", "①"]
    split = 0
    for _ in range(400):
        demo, query = ("".join(rng.choices(pieces, k=rng.randint(1, 6))) for _ in range(2))
        if unicodedata.normalize(form, demo + query) != unicodedata.normalize(form, demo) + unicodedata.normalize(form, query):
            continue  # the normaliser joins characters over the cut
        ids = tuple(tokenizer(demo + query, add_special_tokens=False).input_ids)
        sample = sample_or_reason(tokenizer, demo, query)
        if isinstance(sample, str):
            assert sample.startswith("sample on-7: ")
            if "boundary" in sample:
                assert not any(in_place_or_none(tokenizer, ids, k) == query for k in range(1, len(ids))), (demo, query)
            continue
        split += 1
        own = sample.demo_token_ids[int(sample.has_bos) :]
        assert own + sample.query_token_ids == ids
        expected = query if "sentencepiece" in name else unicodedata.normalize(form, query)
        assert in_place(tokenizer, own, sample.query_token_ids) == expected, (demo, query)
    assert split > 100


def sample_or_reason(tokenizer: PreTrainedTokenizerFast, demo: str, query: str) -> OnSample | str:
    try:
        return tokenize_on(SampleTokenizer.of(tokenizer), OnEpisode("on-7", demo, query, " red", ()))
    except DataError as error:
        return str(error)


def in_place_or_none(tokenizer: PreTrainedTokenizerFast, ids: tuple[int, ...], k: int) -> str | None:
    try:
        return in_place(tokenizer, ids[:k], ids[k:])
    except AssertionError:
        return None


def test_boundary_at_a_special_token() -> None:
    """A demo in the model's own markup: SentencePiece puts a space after it, which is in no one's text."""
    tokenizer = zoo.made("sentencepiece, prepend")
    on = OnEpisode("on-7", "Word: dax red </s>", "Word: dax", " red", (), markup=((14, 18),))
    assert tokenize_on(SampleTokenizer.of(tokenizer), on).demo_token_ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(("demo", "query"), [("Word: dax\nSymbol: ", "red\n"), ("Word: dax r", "ed\n")])
@USABLE
def test_merge_over_the_boundary_names_the_sample(name: str, demo: str, query: str) -> None:
    """In all of them " red" is one token."""
    with pytest.raises(DataError, match=r"^sample on-7: the boundary between demo_text and query_text falls inside the token"):
        tokenize_on(SampleTokenizer.of(zoo.made(name)), OnEpisode("on-7", demo, query, " red", ()))


def test_characters_that_the_tokenizer_cannot_read() -> None:
    """They would all become one and the same token: an answer could be right by being unreadable."""
    tokenizer = zoo.made("unigram, NFKC")
    for demo, query, answer in ((DEMO + "語", QUERY, " red"), (DEMO, QUERY + "語", " red"), (DEMO, QUERY, "語")):
        with pytest.raises(DataError, match=r"^sample on-7: the tokenizer has no token for '語'"):
            tokenize_on(SampleTokenizer.of(tokenizer), OnEpisode("on-7", demo, query, answer, ()))
    with pytest.raises(DataError, match=r"^sample off-1: the tokenizer has no token for '語'"):
        tokenize_off(SampleTokenizer.of(tokenizer), "off-1", "語?")
    assert single_token_symbols(tokenizer, QUERY, ["red", "語"]) == ("red",)


class TestChatTemplate:
    """OFF prompts are a user's turn, with BOS exactly once, the same on every day."""

    @staticmethod
    def under(name: str, template: str) -> PreTrainedTokenizerFast:
        tokenizer = fresh(name)
        tokenizer.chat_template = template
        return tokenizer

    @USABLE
    def test_bos_that_the_template_writes(self, name: str) -> None:
        """Whether the tokenizer adds one or not: the model has learned its prompts with BOS, so every arm has it."""
        tokenizer = self.under(name, "{{ bos_token }}" + tiny.CHAT_TEMPLATE)
        assert SampleTokenizer.of(tokenizer).bos == (tokenizer.bos_token_id,)
        off, on = (
            tokenize_off(SampleTokenizer.of(tokenizer), "off-1", "Why?"),
            tokenize_on(SampleTokenizer.of(tokenizer), OnEpisode("on-7", DEMO, QUERY, " blue", ())),
        )
        for ids in (off.token_ids, on.teacher_ids, on.base_ids):
            assert ids[0] == tokenizer.bos_token_id
            assert ids.count(tokenizer.bos_token_id) == 1
        assert off.student_ids == off.token_ids[1:]

    def test_bos_token_that_marks_turns_is_no_bos(self) -> None:
        """SmolLM2's template begins each turn with its ``bos_token``."""
        tokenizer = self.under("byte-level", "{% for m in messages %}<s>{{ m['content'] }}</s>\n{% endfor %}<s>bot\n")
        off = tokenize_off(SampleTokenizer.of(tokenizer), "off-1", "Why?")
        assert (SampleTokenizer.of(tokenizer).bos, off.has_bos, off.token_ids.count(tokenizer.bos_token_id)) == ((), False, 2)

    def test_bos_twice_is_rejected(self) -> None:
        tokenizer = self.under("sentencepiece, gemma", "<s>{% for m in messages %}<s>{{ m['content'] }}{% endfor %}")
        with pytest.raises(
            DataError, match=r"^sample off-1: the chat template writes '<s>' in the middle .*model\.chat_template=false"
        ):
            tokenize_off(SampleTokenizer.of(tokenizer), "off-1", "Why?")

    @pytest.mark.parametrize(
        ("template", "reason"),
        [
            (
                "{% if messages[0]['role'] != 'system' %}{{ raise_exception('a system turn first') }}{% endif %}",
                "a system turn",
            ),
            ("{% for m in messages %}{{ m['content'] ", "TemplateSyntaxError"),
            ("{{ messages[0]['content']['text'] }}", "leaves the prompt out"),
            ("{{ messages[1]['content'] }}", "UndefinedError"),
            ("<user>hello<end>", "leaves the prompt out and gives '<user>hello<end>'"),
        ],
    )
    def test_template_that_does_not_render_a_user_turn(self, template: str, reason: str) -> None:
        with pytest.raises(DataError, match=rf"not render a single user turn .*{reason}.*model\.chat_template=false") as caught:
            tokenize_off(SampleTokenizer.of(self.under("byte-level", template)), "off-1", "Why?")
        assert "\n" not in str(caught.value)

    def test_template_of_alternating_turns_and_generation_prompt(self) -> None:
        alternating = (
            "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
            "{{ raise_exception('roles must alternate') }}{% endif %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
            "{% if add_generation_prompt %} bot:{% endif %}"
        )
        off = tokenize_off(SampleTokenizer.of(self.under("sentencepiece, prepend", alternating)), "off-1", "Why?")
        assert off.prompt_text == "<s>[INST] Why? [/INST] bot:"

    def test_prompt_is_the_same_tomorrow(self) -> None:
        """``strftime_now`` is how templates ask for the date; ``date_string`` is how they are told one."""
        template = "\n  {% if true %}{{ strftime_now('%d %b %Y') }} {{ date_string }}{% endif %} {{ messages[0]['content'] }}"
        off = tokenize_off(SampleTokenizer.of(self.under("byte-level", template)), "off-1", "Why?")
        assert off.prompt_text == "\n01 Jan 2025 01 Jan 2025 Why?"


def test_token_beyond_the_models_vocabulary_names_the_sample() -> None:
    """Gemma 3's small model has one: a sign for images, which only its larger siblings know."""
    tokenizer = fresh("byte-level")
    known = len(tokenizer)
    tokenizer.add_tokens([AddedToken("<image>", special=True)])
    config = tiny.config("nowhere")
    load_samples(config, tokenizer, 1024, known)
    tokenizer.chat_template = "<image>{{ messages[0]['content'] }}"
    with pytest.raises(
        DataError,
        match=rf"^8 of 8 OFF prompts .* sample off-\d+ has the token '<image>' \({known}\), the model's vocabulary",
    ):
        load_samples(config, tokenizer, 1024, known)
