"""Find what a question is about: the names in it, by which its keys are found."""

from __future__ import annotations

import re

from bm25s.stopwords import STOPWORDS_EN_PLUS
from transformers import PreTrainedTokenizerBase

from memory_adapters.base_model.tokens import tokenize

__all__ = ["is_common_word", "names_in", "occurs", "times_named"]

_LINKS = r"(?:of|de|del|di|da|du|la|von|van|der|den|the|and|&)"
_WORD = r"[^\W\d_a-zß-öø-ÿ][\w&'’./-]*"  # begins with a capital letter
_NAME = re.compile(rf"{_WORD}(?:\s+(?:{_LINKS}\s+){{0,2}}(?:{_WORD}|\d[\w.-]*))*")
_BEGINS_SENTENCE = re.compile(r"(?:^|[:\"“(]\s*)$")
# A line, or what ends with a full stop that is not that of an abbreviation such as "J.", "St." or "Mrs.".
_SENTENCE_END = re.compile(r"\n+|(?<=[.!?…])(?<!\b[A-ZÀ-Þ]\.)(?<!\b[A-ZÀ-Þ][a-zß-ÿ]\.)(?<!\b[A-ZÀ-Þ][a-zß-ÿ]{2}\.)\s+")


def names_in(text: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the names in a text, in their order: runs of words with capital letters, in one line and sentence.

    The first word of a sentence has one anyway: it counts if it is no common word. Words such as "The" are no names.
    """
    found = []
    for sentence in _SENTENCE_END.split(text):
        for match in _NAME.finditer(sentence):
            name = re.sub(r"(?:['’]s)?[.,/&'’-]*$", "", match[0])
            if _BEGINS_SENTENCE.search(sentence[: match.start()]):
                first, _, rest = name.partition(" ")
                if is_common_word(first, tokenizer):
                    name = re.sub(rf"^(?:{_LINKS}\s+)+", "", rest)
            if len(name) > 1 and name.lower() not in STOPWORDS_EN_PLUS:
                found.append(name)
    return list(dict.fromkeys(found))


def is_common_word(name: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a name is a single letter or, in lower case, a single token, as common words are."""
    return len(name) == 1 or len(tokenize(tokenizer, f" {name.lower()}", rendered=True)) == 1


def occurs(name: str, text: str) -> bool:
    """Return whether a name stands in a text as whole words."""
    return re.search(_whole_words(name), text) is not None


def times_named(name: str, text: str) -> int:
    """Return how often a name stands in a text as whole words."""
    return len(re.findall(_whole_words(name), text))


def _whole_words(name: str) -> str:
    return rf"(?<!\w){re.escape(name)}(?!\w)"
