"""Tokenizers: trained on the reports of a run or from a folder, and kept with the weights."""

from __future__ import annotations

import bisect
import json
import logging
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from slidevlm import hub
from slidevlm.data.moses import END, MosesBackend
from slidevlm.data.reports import normalise
from slidevlm.documents import json_of
from slidevlm.errors import CheckpointError, ConfigError

log = logging.getLogger("slidevlm.data")

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


@dataclass(frozen=True)
class SpecialTokens:
    """What frames and pads a text: three different tokens of the vocabulary."""

    pad: str = "<pad>"
    bos: str = "<bos>"
    eos: str = "<eos>"


_OURS = SpecialTokens()

Backend = tokenizers.Tokenizer | MosesBackend


class Tokenizer:
    """Text <-> token ids.

    `train` makes a byte-level BPE (Sennrich et al. 2016; Radford et al. 2019), which can encode
    every text. Texts are brought to their normal form (`reports.normalise`) before encoding, so its
    decoding gives exactly the normal form back. The first word is read as if a space stood before
    it, so that a prompt's word is the token it is within a report. Words that look like special
    tokens are plain text.

    `from_folder` takes any other from a folder of Hugging Face's form.
    """

    def __init__(self, backend: Backend, special: SpecialTokens = _OURS) -> None:
        # Without this, "<eos>" within a report would end it.
        backend.encode_special_tokens = True
        if isinstance(backend, tokenizers.Tokenizer):
            _keep_no_words(backend)
        self._backend = backend
        self.special = special
        # Not their number: ids may have gaps.
        self.vocab_size: int = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        self.pad_id, self.bos_id, self.eos_id = (
            self._id(token) for token in (special.pad, special.bos, special.eos)
        )

    def _id(self, token: str) -> int:
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
            special_tokens=[_OURS.pad, _OURS.bos, _OURS.eos],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator((normalise(text) for text in texts), trainer)
        return cls(backend)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """A tokenizer as Hugging Face's libraries save it; nothing but this folder is read.

        `tokenizer.json` is the tokenizer, or without it the older files of GPT-2 and BioGPT
        (vocab.json, merges.txt) and BERT (vocab.txt). BOS, EOS and PAD are those that
        `tokenizer_config.json` or `special_tokens_map.json` name (CLS and SEP where BOS and EOS are
        not). One that is missing, or is the same token as another of the three, is added to the
        vocabulary.

        ConfigError: a file is missing or cannot be used.
        """
        files = hub.find(str(folder), _FILES, "text.tokenizer")
        file = next((files[name] for name in _VOCABULARIES if name in files), None)
        if file is None or (file.name == "vocab.json" and "merges.txt" not in files):
            raise ConfigError(
                f"no tokenizer in {folder} (looked from {Path.cwd()}): wanted are tokenizer.json "
                "(or vocab.json and merges.txt, or vocab.txt) and, for the special tokens, "
                f"{' or '.join(_TOKEN_FILES)}; save_pretrained of a tokenizer writes them"
            )
        folder = file.parent
        try:
            backend, named = _backend_of(file)
        except ConfigError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"{file} is not a tokenizer: {error}") from error
        if isinstance(backend, tokenizers.Tokenizer):
            backend.no_padding()
            backend.no_truncation()
        special = _with_special_tokens(backend, named | _named_tokens(folder), file)
        tokenizer = cls(backend, special)
        try:
            tokenizer.tokens("\u2603 z\u00e9 0")
        except Exception as error:  # likewise
            raise ConfigError(
                f"{file} cannot encode every text ({error}); give its model an unknown token"
            ) from error
        return tokenizer

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """The tokenizer written by `to_json`; CheckpointError when it is none."""
        try:
            content = json.loads(text)
            if "special_tokens" not in content:
                return cls(tokenizers.Tokenizer.from_str(text))
            own: Backend
            if "moses" in content["tokenizer"]:
                own = MosesBackend.from_content(content["tokenizer"])
            else:
                own = tokenizers.Tokenizer.from_str(json.dumps(content["tokenizer"]))
            return cls(own, SpecialTokens(**content["special_tokens"]))
        except (CheckpointError, ConfigError):
            raise
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(
                f"the tokenizer cannot be read ({error}); the checkpoint or file is damaged"
            ) from error

    def to_json(self) -> str:
        """All of the tokenizer as text: the library's form, and beside it any names of our own."""
        text: str = self._backend.to_str()
        if self.special == _OURS:
            return text
        content = {"special_tokens": asdict(self.special), "tokenizer": json.loads(text)}
        return json.dumps(content, ensure_ascii=False)

    def files(self) -> dict[str, str]:
        """Name -> content of the files by which Hugging Face's libraries know it."""
        names = {f"{role}_token": token for role, token in asdict(self.special).items()}
        if isinstance(self._backend, MosesBackend):
            own = self._backend.files()
            unknown = {"unk_token": self._backend.unknown}
            settings = {"tokenizer_class": "BioGptTokenizer", **names, **unknown}
        else:
            own = {"tokenizer.json": self._backend.to_str()}
            settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
        return {**own, "tokenizer_config.json": json.dumps(settings, indent=1) + "\n"}

    def __getstate__(self) -> dict[str, Any]:
        return {"json": self.to_json()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(Tokenizer.from_json(state["json"]).__dict__)

    def _encoded(self, normal: str) -> tuple[list[int], list[int]]:
        """Ids of a normalised text, and where in it each token ends."""
        encoding = self._backend.encode(normal, add_special_tokens=False)
        # A vocabulary of whole words may have one that reads like a special token.
        special = (self.pad_id, self.bos_id, self.eos_id)
        plain = [
            (number, end)
            for number, (_, end) in zip(encoding.ids, encoding.offsets, strict=True)
            if number not in special
        ]
        return [number for number, _ in plain], [end for _, end in plain]

    def tokens(self, text: str) -> list[int]:
        """All of the text's ids, without BOS and EOS."""
        return self._encoded(normalise(text))[0]

    def encode(self, text: str, max_tokens: int) -> list[int]:
        """BOS, the text's tokens, EOS: at most `max_tokens` ids.

        A longer text is cut after the last sentence that fits, where that keeps at least half of
        the room, else after the last token that does.
        """
        room = max_tokens - 2
        assert room >= 0, f"max_tokens {max_tokens} leaves no room for BOS and EOS"
        normal = normalise(text)
        ids, ends = self._encoded(normal)
        if len(ids) > room:
            ids = ids[: _fitting(normal, ends[:room])]
        return [self.bos_id, *ids, self.eos_id]

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


def _keep_no_words(backend: tokenizers.Tokenizer) -> None:
    """Switch the library's cache of words off.

    Since 0.23 a BPE's words are kept by thread, and stay when the tokenizer is gone: up to 10,000
    of each tokenizer that a process ever had. Without them a report takes some 4% longer.
    """
    resize = getattr(backend.model, "_resize_cache", None)  # before 0.21 there is none
    if resize is not None:
        resize(0)


# The end of a sentence: its mark and closing brackets or quotes, then a space or the text's end.
_SENTENCE_END = re.compile(r"[.!?][\"')\]\u201d\u2019\u00bb]*(?=\s|$)|[\u3002\uff01\uff1f]")
# "2." and "(A)." before a finding, and abbreviations that a sentence goes on after.
_NO_SENTENCE = re.compile(
    r"\(?[a-z0-9]{1,2}|.*\b(approx|ca|cf|dr|e\.g|fig|i\.e|incl|mr|mrs|no|prof|vs)", re.I
)


def sentence_ends(text: str) -> list[int]:
    """Places in a normalised text right after a sentence.

    >>> text = "A. Breast: carcinoma, grade 3. Size 2.5 cm. 2. No tumour"
    >>> [text[:end][-9:] for end in sentence_ends(text)]
    [' grade 3.', 'e 2.5 cm.']
    """
    ends, start = [], 0
    for match in _SENTENCE_END.finditer(text):
        if _NO_SENTENCE.fullmatch(text[start : match.start()].strip()) is None:
            start = match.end()
            ends.append(start)
    return ends


def _fitting(text: str, ends: Sequence[int]) -> int:
    """How many of the tokens that fit, which end at `ends` in `text`, to keep."""
    if not ends:
        return 0
    # One letter more, to see that "2." is not the end of a sentence but the beginning of "2.5".
    for place in reversed(sentence_ends(text[: ends[-1] + 1])):
        kept = bisect.bisect_right(ends, place)
        if 2 * kept < len(ends):
            break
        if ends[kept - 1] == place:
            return kept
    return len(ends)


_TOKEN_FILES = ("tokenizer_config.json", "special_tokens_map.json")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt")
_FILES = (*_VOCABULARIES, "merges.txt", *_TOKEN_FILES)


def _backend_of(file: Path) -> tuple[Backend, dict[str, str]]:
    """The tokenizer of a vocabulary file, and its special tokens where no file names others."""
    if file.name == "tokenizer.json":
        return tokenizers.Tokenizer.from_file(str(file)), {}
    if file.name == "vocab.txt":
        return _wordpiece(file), {"bos": "[CLS]", "eos": "[SEP]", "pad": "[PAD]"}
    vocab = json_of(file.read_text(encoding="utf-8"))
    merges = file.with_name("merges.txt")
    if any(piece.endswith(END) for piece in vocab):
        text = merges.read_text(encoding="utf-8")
        unknown = _content(_settings(file).get("unk_token")) or "<unk>"
        special = {"bos": "<s>", "eos": "</s>", "pad": "<pad>"}
        named = {role: token for role, token in special.items() if token in vocab}
        return MosesBackend.from_files(vocab, text, unknown), named
    backend = tokenizers.Tokenizer(models.BPE.from_file(str(file), str(merges)))
    space = bool(_settings(file).get("add_prefix_space", False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    backend.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    return backend, {"bos": end, "eos": end} if end in vocab else {}


def _wordpiece(file: Path) -> tokenizers.Tokenizer:
    """BERT's: words split off punctuation, then the longest pieces of the vocabulary."""
    settings = _settings(file)
    unknown = _content(settings.get("unk_token")) or "[UNK]"
    vocab = models.WordPiece.read_file(str(file))
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=unknown))
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=bool(settings.get("do_lower_case", True)),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=bool(settings.get("tokenize_chinese_chars", True)),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend


def _settings(file: Path) -> dict[str, Any]:
    """tokenizer_config.json beside a file; empty without it."""
    beside = file.with_name("tokenizer_config.json")
    if not beside.is_file():
        return {}
    content = json_of(beside.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


_ROLES = {
    "eos": ("eos_token", "sep_token"),
    "bos": ("bos_token", "cls_token"),
    "pad": ("pad_token",),
}


def _named_tokens(folder: Path) -> dict[str, str]:
    """Role ("eos", "bos", "pad") -> the token that the folder's files name, where they name one."""
    named: dict[str, str] = {}
    for file in (folder / name for name in _TOKEN_FILES):
        if not file.is_file():
            continue
        try:
            content = json_of(file.read_text(encoding="utf-8"))
            tokens = {key: _content(content.get(key)) for keys in _ROLES.values() for key in keys}
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigError(f"{file} cannot be used: {error}") from error
        for role, keys in _ROLES.items():
            found = next((token for key in keys if (token := tokens[key])), None)
            if found and role not in named:
                named[role] = found
    return named


def _content(token: Any) -> str | None:
    """A token as these files have it: text, or a mapping with its `content`."""
    return token.get("content") if isinstance(token, dict) else token


def _with_special_tokens(backend: Backend, named: dict[str, str], file: Path) -> SpecialTokens:
    """Make the three tokens special ones of `backend`, adding what is missing.

    They must differ: a report is read at EOS, generation begins with BOS and ends with EOS, and
    padding is none of both. Many tokenizers use one token for two of these.
    """
    chosen: dict[str, str] = {}
    for role, ours in (("eos", _OURS.eos), ("bos", _OURS.bos), ("pad", _OURS.pad)):
        token = named.get(role)
        if token is None or token in chosen.values():
            token = ours
            while token in chosen.values():
                token = f"<{token}>"
        chosen[role] = token
    before = backend.get_vocab(with_added_tokens=True)
    backend.add_special_tokens(
        [tokenizers.AddedToken(t, special=True, normalized=False) for t in chosen.values()]
    )
    after = backend.get_vocab(with_added_tokens=True)
    added = [token for token in chosen.values() if token not in before]
    if len(set(after.values())) < len(set(before.values())) + len(added):
        raise ConfigError(
            f"{file}: its ids have gaps, so {', '.join(added)} cannot be added; add them with the "
            "library that made it, and name them in tokenizer_config.json"
        )
    if added:
        log.info("%s: added %s to the vocabulary", file, ", ".join(added))
    return SpecialTokens(**chosen)
