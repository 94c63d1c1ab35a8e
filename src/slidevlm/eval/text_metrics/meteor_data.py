"""What METEOR knows of the language: function words, WordNet's synonyms, paraphrases.

All of it but the function words is read from METEOR 1.5's own distribution.
"""

from __future__ import annotations

import gzip
import zipfile
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from slidevlm.errors import DataError

Paraphrases = dict[tuple[str, ...], list[tuple[str, ...]]]

# What METEOR 1.5 counts as function words of English: those of more than one in a thousand in
# news. They are a parameter of the score, as its weights are.
_FREQUENT = (
    "a about after all also an and are as at be been but by can could first for from had has have "
    "he her his i if in into is it its last more new no not of on one or other out over people s "
    "said she so some than that the their there they this time to two up was we were what when "
    "which who will with would year years you 's 't -lrb- -rrb- \" $ ' ( ) , - -- . : ? "
    "\u2014 \u2019 \u201c \u201d"
)
FUNCTION_WORDS = frozenset(_FREQUENT.split())

# WordNet's endings of nouns, verbs and adjectives, and what they stand for in the base form.
_ENDINGS = (
    ("s", ""), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"),
    ("men", "man"), ("ies", "y"), ("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"),
    ("ed", ""), ("ing", "e"), ("ing", ""), ("er", ""), ("est", ""), ("er", "e"), ("est", "e"),
)  # fmt: skip


@dataclass(frozen=True)
class MeteorData:
    """Function words, and synonyms and paraphrases where METEOR's own data are at hand.

    Args:
        function_words: words that weigh less.
        synsets: word -> numbers of its sets of synonyms.
        bases: irregular form -> its base forms.
        table: file of paraphrases, of which only those of the texts at hand are ever kept.
    """

    function_words: frozenset[str] = FUNCTION_WORDS
    synsets: dict[str, frozenset[str]] = field(default_factory=dict)
    bases: dict[str, list[str]] = field(default_factory=dict)
    table: Path | None = None

    @property
    def name(self) -> str:
        """What the score is called."""
        return "meteor" if self.synsets else "meteor_exact_stem"

    def synonyms(self, word: str) -> frozenset[str]:
        """Numbers of the sets of synonyms that a word or its base form is in."""
        own = self.synsets.get(word, frozenset())
        bases = self.bases.get(word)
        if bases is None:
            bases = [self._base(word)]
        return own.union(*(self.synsets.get(base, ()) for base in bases))

    def _base(self, word: str) -> str:
        """The first regular base form that has synonyms; the word itself where it has no ending."""
        if len(word) <= 2 or word.endswith("ss"):
            return word
        for ending, instead in _ENDINGS:
            base = word.removesuffix(ending) + instead
            if word.endswith(ending) and base in self.synsets:
                # METEOR adds the "ful" that it has not taken off; such a form has no synonyms.
                return base + ("ful" if word.endswith("ful") else "")
        return ""

    def paraphrases(self, words: Collection[str]) -> Paraphrases:
        """phrase -> phrases that may stand for it, of these words alone, in the table's order.

        Raises:
            DataError: the table cannot be read.
        """
        found: Paraphrases = {}
        if self.table is None:
            return found
        known = set(words)
        try:
            with gzip.open(self.table, "rt", encoding="utf-8") as lines:
                for _ in lines:  # a probability, which METEOR 1.5 does not use
                    one, other = next(lines).split(), next(lines).split()
                    if known.issuperset(one) and known.issuperset(other):
                        found.setdefault(tuple(one), []).append(tuple(other))
        except (OSError, EOFError, ValueError, StopIteration) as error:
            raise DataError(f"METEOR's paraphrases in {self.table} cannot be read") from error
        return found


def read_data(folder: Path) -> MeteorData:
    """The data of METEOR 1.5 from the folder that has meteor-1.5.jar and data/paraphrase-en.gz.

    Raises:
        DataError: a file is missing, or not what it should be.
    """
    jar, table = folder / "meteor-1.5.jar", folder / "data" / "paraphrase-en.gz"
    for file in (jar, table):
        if not file.is_file():
            raise DataError(
                f"METEOR's data: no {file}; give the folder of METEOR 1.5 with meteor-1.5.jar and "
                "data/paraphrase-en.gz (pycocoevalcap/meteor has both)"
            )
    try:
        with zipfile.ZipFile(jar) as archive:
            words = archive.read("function/english.words").decode().split()
            synsets = archive.read("synonym/english.synsets").decode().splitlines()
            exceptions = archive.read("synonym/english.exceptions").decode().splitlines()
    except (KeyError, OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"METEOR's data in {folder} cannot be read: {error}") from error
    bases: dict[str, list[str]] = {}
    for base, forms in zip(exceptions[::2], exceptions[1::2], strict=False):
        for form in forms.split():
            bases.setdefault(form, []).append(base)
    pairs = zip(synsets[::2], synsets[1::2], strict=False)
    sets = {word: frozenset(numbers.split()) for word, numbers in pairs}
    return MeteorData(frozenset(words), sets, bases, table)
