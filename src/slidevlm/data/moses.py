"""BioGPT's tokenizer: words of Moses, then byte pair encoding as fastBPE writes it.

It stands where a tokenizer of the library `tokenizers` stands, which cannot split words so.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slidevlm.errors import ConfigError

END = "</w>"  # the last piece of a word
_ESCAPED = {
    "&apos;": "'",
    "&quot;": '"',
    "&lt;": "<",
    "&gt;": ">",
    "&#124;": "|",
    "&#91;": "[",
    "&#93;": "]",
    "&amp;": "&",  # last: it is what the others begin with
}


@dataclass(frozen=True)
class Encoding:
    """Ids of a text, and where in it each token begins and ends (that of its word)."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class MosesBackend:
    """The part of `tokenizers.Tokenizer` that `data.tokenizer` uses.

    Args:
        vocab: piece -> id; the last piece of a word ends in `END`.
        merges: pairs of pieces, the most frequent first.
        unknown: the token of what is not in the vocabulary.
    """

    encode_special_tokens = True  # text is never read as a special token

    def __init__(
        self, vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], unknown: str
    ) -> None:
        try:
            import sacremoses
        except ImportError:
            raise ConfigError(
                "the tokenizer of BioGPT needs the package sacremoses (pip install 'slidevlm[hf]')"
            ) from None
        if unknown not in vocab:
            raise ConfigError(f"the vocabulary has no token {unknown} for what is not in it")
        self._vocab, self.unknown = dict(vocab), unknown
        self._pieces = {number: piece for piece, number in self._vocab.items()}
        self._merges = list(merges)
        self._ranks = {pair: rank for rank, pair in enumerate(self._merges)}
        self._tokenizer = sacremoses.MosesTokenizer(lang="en")
        self._detokenizer = sacremoses.MosesDetokenizer(lang="en")
        self._words: dict[str, list[int]] = {}

    def encode(self, text: str, *, add_special_tokens: bool) -> Encoding:
        """Ids of a text without special tokens."""
        assert not add_special_tokens
        words = self._tokenizer.tokenize(
            text, aggressive_dash_splits=True, return_str=False, escape=True
        )
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        end = 0
        for word in words:
            plain = _plain(word)
            begin = text.find(plain, end)
            # Moses may have changed a word; its tokens then end where the last one did.
            begin, end = (begin, begin + len(plain)) if begin >= 0 else (end, end)
            numbers = self._word(word)
            ids += numbers
            offsets += [(begin, end)] * len(numbers)
        return Encoding(ids, offsets)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of ids; of a single one also the space after it."""
        assert not skip_special_tokens
        text = "".join(self._pieces.get(i, self.unknown).replace(END, " ") for i in ids)
        if len(ids) == 1:
            return _plain(text.rstrip(" ")) + " " * text.endswith(" ")
        joined: str = self._detokenizer.detokenize(text.split())
        return joined

    def token_to_id(self, token: str) -> int | None:
        """Id of a token, None where it is not in the vocabulary."""
        return self._vocab.get(token)

    def get_vocab(self, *, with_added_tokens: bool) -> dict[str, int]:
        """Token -> id."""
        return dict(self._vocab)

    def add_special_tokens(self, tokens: Sequence[Any]) -> None:
        """Give those that are not there yet the next ids."""
        for token in tokens:
            if token.content not in self._vocab:
                number = 1 + max(self._vocab.values())
                self._vocab[token.content], self._pieces[number] = number, token.content

    def to_str(self) -> str:
        """All of it as JSON, which `from_content` reads."""
        merges = [" ".join(pair) for pair in self._merges]
        content = {"vocab": self._vocab, "merges": merges, "unknown": self.unknown}
        return json.dumps({"moses": content}, ensure_ascii=False)

    def files(self) -> dict[str, str]:
        """vocab.json and merges.txt, as `from_files` reads them."""
        merges = "".join(f"{first} {second} 1\n" for first, second in self._merges)
        vocab = json.dumps(self._vocab, ensure_ascii=False)
        return {"vocab.json": vocab, "merges.txt": merges}

    @classmethod
    def from_content(cls, content: Mapping[str, Any]) -> MosesBackend:
        """The backend whose `to_str` this was."""
        own = content["moses"]
        return cls(own["vocab"], [_pair(line) for line in own["merges"]], own["unknown"])

    @classmethod
    def from_files(cls, vocab: Mapping[str, int], merges: str, unknown: str) -> MosesBackend:
        """From a vocab.json and a merges.txt (a pair and its count on a line)."""
        lines = [line for line in merges.split("\n") if line and not line.startswith("#version")]
        return cls(vocab, [_pair(line) for line in lines], unknown)

    def _word(self, word: str) -> list[int]:
        """Ids of a word of Moses."""
        if word not in self._words:
            unknown = self._vocab[self.unknown]
            self._words[word] = [self._vocab.get(piece, unknown) for piece in self._split(word)]
        return self._words[word]

    def _split(self, word: str) -> list[str]:
        """Merge neighbours, the most frequent pair first, until none is left that was learned."""
        pieces = [*word[:-1], word[-1] + END]
        while len(pieces) > 1:
            pairs = list(itertools.pairwise(pieces))
            best = min(pairs, key=lambda pair: self._ranks.get(pair, len(self._ranks)))
            if best not in self._ranks:
                break
            merged: list[str] = []
            for piece in pieces:
                if merged and (merged[-1], piece) == best:
                    merged[-1] += piece
                else:
                    merged.append(piece)
            pieces = merged
        return pieces


def _pair(line: str) -> tuple[str, str]:
    first, second = line.split()[:2]
    return first, second


def _plain(word: str) -> str:
    """A word of Moses as it stood in the text."""
    if word == "@-@":
        return "-"
    for escaped, plain in _ESCAPED.items():
        word = word.replace(escaped, plain)
    return word
