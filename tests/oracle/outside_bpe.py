"""BPE in plain Python, byte-level and SentencePiece's, and texts to try a tokenizer with; nothing of ``cedkv``.

Byte-level: text is cut at special tokens, then around every single digit (or not), then by a pattern; each piece's bytes are
merged pair by pair, the pair that comes first in the list of merges going first.
"""

from __future__ import annotations

import random
from itertools import pairwise

import regex

GPT2 = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

TEXTS = (
    "", " ", "   ", "\n", "\n\n\n", "\t\tx\t", " \n \n", "a  b   c    d", "trailing   ", "\r\nx\r\n\r\n",
    "a\u00a0b\u2003c\u3000d", "0", "42", "3.14159", "1,000,000", "x2y3", " 7", "2024-05-17T08:30:00Z", "1st 2nd 3rd",
    "½ ² Ⅷ ٣ 四",
    "It's we're they've I'm you'll he'd don't", "IT'S WE'RE", "'s't", "rock 'n' roll", "l'été", "’s",
    "Word: blick\nSymbol: red\n\nWord: dax\nSymbol:", "What is photosynthesis?", "Hello, world!", "...!?;:--––—“”«»",
    "naïve café Straße Ångström", "Ελληνικά русский עברית العربية हिन्दी ไทย 日本語 中文 한국어", "e\u0301 \u0301x", "ﬁ ﬂ ß ẞ",
    "🙂 🙂🙂 👩‍👩‍👧‍👦 🇪🇺 1️⃣", "\u200b\u200d\ufeff", "x\u0000y\u007fz", "ab\u0085cd\u2028ef",
    "def f(x):\n    return {k: v for k, v in x.items()}  # ok\n\tpass\n", "<div class=\"a\">&amp;</div>", "a_b__c___d",
    "https://example.org/a?b=c&d=%20#e", "$x^2 + y_1 \\leq \\frac{1}{2}$", "| a | b |\n|---|---|\n| 1 | 2 |",
    "<|im_start|>user\nhi 12<|im_end|>\n<|im_start|>assistant\n", "<|im_end|><|im_end|>", "<|im_start", "a<|endoftext|>b",
    "<repo_name>x<filename>y<gh_stars>100", "supercalifragilisticexpialidocious", "A" * 50, "ab" * 40, "." * 30,
)  # fmt: skip


def texts(n: int) -> list[str]:
    """``TEXTS``, and mixtures of their pieces up to ``n``, always the same."""
    draw = random.Random(0)
    pieces = [text[at : at + 9] for text in TEXTS for at in range(0, len(text), 9)]
    return [*TEXTS, *("".join(draw.choices(pieces, k=draw.randint(2, 12))) for _ in range(n - len(TEXTS)))]


def byte_table() -> dict[int, str]:
    """Byte -> printable character, as GPT-2's vocabulary writes bytes."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}


class PlainBpe:
    """The reference: vocabulary, merges in their order, special tokens.

    pattern: what a word is.
    digits: whether every digit is a word of its own.
    whole_words: whether a word that is a token is that token, whatever the merges say.
    """

    def __init__(
        self,
        tokens: list[str],
        merges: list[str],
        special: list[str],
        pattern: regex.Pattern[str] = GPT2,
        digits: bool = True,
        whole_words: bool = False,
    ) -> None:
        self.pattern, self.digits, self.whole_words = pattern, digits, whole_words
        self.ids = {token: index for index, token in enumerate(tokens)}
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
        self.special = frozenset(special)
        self.cut = regex.compile("(" + "|".join(regex.escape(token) for token in sorted(special, key=len, reverse=True)) + ")")
        self.table = byte_table()

    def __call__(self, text: str) -> list[int]:
        """The ids of a text."""
        found: list[int] = []
        for part in self.cut.split(text):
            if part in self.special:
                found.append(self.ids[part])
            else:
                pieces = regex.split(r"(\p{N})", part) if self.digits else [part]
                words = (word for piece in pieces for word in self.pattern.findall(piece))
                found += [self.ids[token] for word in words for token in self.merged(word)]
        return found

    def merged(self, word: str) -> list[str]:
        """The tokens of one word."""
        parts = [self.table[byte] for byte in word.encode()]
        if self.whole_words and "".join(parts) in self.ids:
            return ["".join(parts)]
        while len(parts) > 1:
            pairs = list(pairwise(parts))
            best = min(pairs, key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if best not in self.ranks:
                break
            at = pairs.index(best)
            parts[at : at + 2] = ["".join(best)]
        return parts


class PlainSentencePiece:
    """SentencePiece's BPE: of all neighbours that together are a token the two of the best score are merged, from the left.

    scores: by id, higher is better.
    whole: tokens that text is cut at before anything else.
    prefix: what is put in front of every part between such tokens.
    """

    def __init__(self, tokens: list[str], scores: list[float], whole: list[str], prefix: str) -> None:
        self.ids = {token: index for index, token in enumerate(tokens)}
        self.scores, self.whole, self.prefix = scores, frozenset(whole), prefix
        self.cut = regex.compile("(" + "|".join(regex.escape(token) for token in sorted(whole, key=len, reverse=True)) + ")")

    def __call__(self, text: str) -> list[int]:
        """The ids of a text."""
        found: list[int] = []
        for part in filter(None, self.cut.split(text)):
            if part in self.whole:
                found.append(self.ids[part])
                continue
            pieces = list((self.prefix + part).replace(" ", "▁"))
            while True:
                joined = [left + right for left, right in pairwise(pieces)]
                known = [at for at, token in enumerate(joined) if token in self.ids]
                if not known:
                    break
                best = max(known, key=lambda at: (self.scores[self.ids[joined[at]]], -at))
                pieces[best : best + 2] = [joined[best]]
            for piece in pieces:
                found += [self.ids[piece]] if piece in self.ids else [self.ids[f"<0x{byte:02X}>"] for byte in piece.encode()]
        return found
