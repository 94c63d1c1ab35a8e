"""A byte-level BPE tokenizer, trained on the reports of a run and kept with its weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from slidevlm.data.reports import normalise
from slidevlm.errors import CheckpointError, ConfigError

_PAD, _BOS, _EOS = "<pad>", "<bos>", "<eos>"
_SMALLEST_VOCABULARY = 3 + 256  # the special tokens and every byte


class TextTokenizer(Protocol):
    """What data, generation and evaluation ask of a tokenizer; ids are never assumed."""

    pad_id: int
    bos_id: int
    eos_id: int
    vocab_size: int

    def encode(self, text: str, max_tokens: int) -> list[int]: ...

    def is_truncated(self, text: str, max_tokens: int) -> bool: ...

    def tokens(self, text: str) -> list[int]: ...

    def piece(self, token: int) -> str: ...

    def decode(self, ids: Iterable[int]) -> str: ...


class Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016; Radford et al. 2019): every text can be encoded.

    Texts are brought to their normal form (`reports.normalise`) before encoding, so decoding
    gives exactly the normal form back. The first word is read as if a space stood before it, so
    that a prompt's word is the token it is within a report. Words that look like special tokens
    are plain text.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        # Without this, "<eos>" within a report would end it.
        backend.encode_special_tokens = True
        self._backend = backend
        self.vocab_size: int = backend.get_vocab_size()
        self.pad_id, self.bos_id, self.eos_id = (
            self._special(token) for token in (_PAD, _BOS, _EOS)
        )

    def _special(self, token: str) -> int:
        number: int | None = self._backend.token_to_id(token)
        if number is None:
            raise CheckpointError(
                f"the tokenizer has no token {token}; it was not written by slidevlm"
            )
        return number

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn at most `vocab_size` tokens from `texts`; small corpora give fewer.

        ConfigError when `vocab_size` leaves no room for all 256 bytes and 3 special tokens.
        """
        if vocab_size < _SMALLEST_VOCABULARY:
            raise ConfigError(
                f"vocabulary of {vocab_size} tokens; at least {_SMALLEST_VOCABULARY} are needed "
                "(256 bytes and 3 special tokens)"
            )
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[_PAD, _BOS, _EOS],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator((normalise(text) for text in texts), trainer)
        return cls(backend)

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """The tokenizer written by `to_json`; CheckpointError when it is none."""
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(
                f"the tokenizer cannot be read ({error}); the checkpoint or file is damaged"
            ) from error
        return cls(backend)

    def to_json(self) -> str:
        """All of the tokenizer as text."""
        text: str = self._backend.to_str()
        return text

    def __getstate__(self) -> dict[str, Any]:
        return {"json": self.to_json()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(tokenizers.Tokenizer.from_str(state["json"]))  # type: ignore[misc]

    def tokens(self, text: str) -> list[int]:
        """All of the text's ids, without BOS and EOS."""
        ids: list[int] = self._backend.encode(normalise(text), add_special_tokens=False).ids
        return ids

    def encode(self, text: str, max_tokens: int) -> list[int]:
        """BOS, the text's tokens, EOS: at most `max_tokens` ids, the text's last ones cut off."""
        assert max_tokens >= 2, f"max_tokens {max_tokens} leaves no room for BOS and EOS"
        return [self.bos_id, *self.tokens(text)[: max_tokens - 2], self.eos_id]

    def is_truncated(self, text: str, max_tokens: int) -> bool:
        """Whether `encode` would cut `text`."""
        return len(self.tokens(text)) > max_tokens - 2

    def piece(self, token: int) -> str:
        """What one token reads as, its spaces kept; half a character reads as a replacement."""
        text: str = self._backend.decode([token], skip_special_tokens=False)
        return text

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` up to the first EOS, special tokens left out, without outer spaces."""
        special = (self.pad_id, self.bos_id)
        kept = []
        for number in ids:
            if int(number) == self.eos_id:
                break
            if int(number) not in special:
                kept.append(int(number))
        text: str = self._backend.decode(kept, skip_special_tokens=False)
        return text.strip(" ")
