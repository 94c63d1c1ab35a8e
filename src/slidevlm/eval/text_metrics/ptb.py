"""Penn Treebank tokens of a report, as pycocoevalcap has them before it scores.

It runs Stanford's PTBTokenizer (CoreNLP 3.4.1) with lower case and drops punctuation. This is that
lexer written again for the text of reports: at each place the longest of the rules below wins.
Brackets stay, as `-lrb-` and the like: pycocoevalcap means to drop them, but looks for capitals.

Compared with the original in tests/eval/text_metrics/test_ptb.py (where Java and pycocoevalcap are
there); docs/reports.md tells how often the two differ.
"""

from __future__ import annotations

import re
import sys
from functools import lru_cache

# A letter or digit; fractions in one character are none.
_X = r"[^\W_\u00bc-\u00be\u2150-\u215e]"
_L = r"[^\W\d_]"
_DATES = "Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec|Mon|Tues?|Wed|Thu(?:rs)?|Fri"
_STATES = (
    "Ala|Ariz|Az|Ark|Calif|Colo|Conn|Ct|Dak|Del|Fla|Ga|Ill|Ind|Kans?|Ky|La|Mass|Md|Mich|Minn|Miss|"
    "Mo|Mont|Neb|Nev|Okla|Ore|Pa|Penn|Tenn|Tex|Va|Vt|Wash|Wisc?|Wyo"
)
_COMPANIES = (
    "Inc|Cos?|Corp|Pp?t[ye]s?|Ltd|Plc|Bancorp|Bhd|Assn|Univ|Intl|Sys|Invt|Elec|Natl|Mfg|Mtg|Dept|"
    "Est|Ext|Sq|est|ext|sq|md"
)
_TITLES = (
    "Rt|Mr|Mrs|Ms|Drs?|Profs?|Sens?|Reps?|Attys?|Lt|Col|Gen|Messrs|Govs?|Adm|Rev|Maj|Sgt|Cpl|Pvt|"
    "Capt|Ste?|Ave|Pres|Lieut|Hon|Brig|Co?mdr|Pfc|Spc|Supts?|Det|Mt|Ft|Adj|Adv|Asst|Assoc|Ens|Insp|"
    r"Mlle|Mme|Msgr|Sfc|Jr|Sr|Bros|Ph\.D|Ed\.D|Blvd|Rd|Esq|etc|al|seq|Bldg|vs|cf|Alex|Wm|Jos|Cie"
)
_NAMES = f"{_DATES}|{_STATES}|{_COMPANIES}"
_CONTRACTED = "[sSmMdD]|ll|re|ve|LL|RE|VE"
_RULES = tuple(
    re.compile(rule)
    for rule in (
        # words, also joined by a full stop that no space follows; numbers; with hyphens
        rf"{_L}{_X}*(?:[.!?]{_L}{_X}*)*",
        rf"(?:[dDoOlL]'{_L}{_X}*|{_X}+)(?:[-_](?:[dDoOlL]'{_L}{_X}*|{_X}+))*",
        r"[A-Za-z0-9][A-Za-z0-9.,]*(?:-(?:[A-Za-z](?:\.[A-Za-z])+\.|[A-Za-z0-9]+))+",
        r"[-+]?(?:\d*(?:[.:,]\d+)+|\d+)",
        # fractions, dates, alternatives
        r"\d{1,4}/\d{1,4}",
        r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}",
        r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}|\d+-\d+/\d+",
        r"[A-Z]+(?:[+&][A-Z]+)+",
        # with their full stop: abbreviations, and whatever goes on after it
        r"[A-Za-z](?:\.[A-Za-z])+\.",
        r"[A-Za-z]\.(?!\x02)",
        rf"(?:{_NAMES}|{_NAMES.upper()}|(?i:{_TITLES}))\.",
        r"(?i:nos?|figs?|ca|pp)\.(?=\d|\x03)",
        rf"{_X}+(?:[-.!?]{_X}+)*\.(?=[,;:])",
        # apostrophes
        rf"'(?:{_CONTRACTED})(?!{_X})",
        rf"[nN]'[tT](?!{_X})|'n'?(?!{_X})|'em(?!{_X})|[lLdDjJ]'|ol'|[A-HJ-XZn]'{_L}{{2,}}",
        rf"{_L}+[aeiouyAEIOUY]'(?!(?:{_CONTRACTED})(?!{_X}))[aeiouA-Z]{_L}*",
        r"'[tT](?=[iI]s|[wW]as)|'\d0s|'\d\d(?=[\x01-\x04])",
        # runs of marks, smileys, tags, addresses
        r"\*+|[!?]{2,}|#+|-+|\.\.\.|_+|@+",
        r"[<>]?[:;=][-o*']?[()DPdpO](?![^\W_])",
        r"</?[A-Za-z][A-Za-z0-9:._-]*/?>",
        rf"#{_L}+|[A-Z]*\$|[CF]#",
        r"<?[A-Za-z0-9][^\s\"<>|()\x01-\x04]*@(?:[^\s\"<>|().\x01-\x04]+\.)*[^\s\"<>|().\x01-\x04]+>?",
        r"@[A-Za-z_]\w*",
        r"(?:https?://|www\.)[^\s<>|.,;\x01-\x04]+(?:\.[^\s<>|.,;\x01-\x04]+)*",
    )
)
_BEFORE_NOT = re.compile(rf"{_L}+?(?=[nN]'[tT])")
_DROPPED = frozenset(
    (
        *("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "---", "----", "...", ";"),
        *('"', "\u2018", "\u2019", "\u201c", "\u201d", "\u2013", "\u2014"),
    )
)
_BRACKETS = str.maketrans(
    {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
)
_REPLACED = {
    "cannot": ("can", "not"),
    "gonna": ("gon", "na"),
    "wanna": ("wan", "na"),
    "gotta": ("got", "ta"),
    "lemme": ("lem", "me"),
    "gimme": ("gim", "me"),
    "\u00bc": ("1/4",),
    "\u00bd": ("1/2",),
    "\u00be": ("3/4",),
    "\u2153": ("1/3",),
    "\u2154": ("2/3",),
    "\u00a3": ("#",),
    "\u20ac": ("$",),
}
# What a sentence often begins with: before these a letter's full stop ends a sentence.
_SENTENCE_WORDS = (
    "A About According Additionally After An As At But Earlier He Her Here However If In It Last "
    "Many More Mr. Ms. Now Once One Other Our She Since So Some Such That The Their Then There "
    "These They This We When While What Yet You"
)
_STARTS = frozenset(_SENTENCE_WORDS.split())
_STARTS |= {word.upper() for word in _STARTS}
_TAG = re.compile(r"</?[A-Za-z]+/?>")


def tokenize(text: str) -> list[str]:
    """Lower-cased tokens without punctuation, as `pycocoevalcap.tokenizer.PTBTokenizer` gives them.

    >>> tokenize("Lung, left: adenocarcinoma (2.5 cm), pT2a; Dr. Smith's 3/12 nodes.")[:7]
    ['lung', 'left', 'adenocarcinoma', '-lrb-', '2.5', 'cm', '-rrb-']
    """
    pieces = text.split()
    tokens: list[str] = []
    for piece, after in zip(pieces, [*pieces[1:], ""], strict=False):
        # Most pieces are plain words, to which no rule applies.
        if piece.isalpha() and (lower := piece.lower()) not in _REPLACED:
            tokens.append(sys.intern(lower))  # a word of many reports is in memory once
        else:
            tokens += _of_piece(piece, _kind(after))
    return tokens


def _kind(after: str) -> str:
    """What a piece without spaces need know of the next one, as one character."""
    if after in _STARTS or _TAG.match(after):
        return "\x02"
    if after[:1].isdigit():
        return "\x03"
    return "\x01" if after else "\x04"


@lru_cache(maxsize=100_000)
def _of_piece(piece: str, after: str) -> tuple[str, ...]:
    text, place, tokens = piece + after, 0, list[str]()
    while place < len(piece):
        end = _longest(text, place)
        token = text[place:end]
        place = end
        lower = token.translate(_BRACKETS).lower()
        if token.lower() in _REPLACED:
            tokens += _REPLACED[token.lower()]
        elif token not in _DROPPED:
            tokens.append(lower)
    return tuple(tokens)


def _longest(text: str, place: int) -> int:
    """Where the token that begins at `place` ends."""
    found = _BEFORE_NOT.match(text, place)
    if found:
        return found.end()
    matches = (rule.match(text, place) for rule in _RULES)
    return max((m.end() for m in matches if m and m.end() > place), default=place + 1)
