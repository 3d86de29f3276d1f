"""Make completions comparable, and tell text from garbage."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from operator import eq

# written as code points, since the characters look alike
_SINGLE_QUOTES = "\u2018\u2019\u201b\u00b4\u02bc"
_DOUBLE_QUOTES = "\u201c\u201d\u201e\u00ab\u00bb"
_DASHES = "\u2010\u2011\u2013\u2014"
_INVISIBLE = "\u200b\u200d\ufeff\u00ad"
_SPELLINGS = {
    **dict.fromkeys(map(ord, _SINGLE_QUOTES), "'"),
    **dict.fromkeys(map(ord, _DOUBLE_QUOTES), '"'),
    **dict.fromkeys(map(ord, _DASHES), "-"),
    **dict.fromkeys(map(ord, _INVISIBLE), None),
}
# "<|im_start|>assistant", "<end_of_turn>", "[INST]", "<</SYS>>", "</s>"
_TEMPLATE = re.compile(
    r"<\|[a-z_0-9]{1,32}\|>|</?(?:s|bos|eos|pad|start_of_turn|end_of_turn)>|\[/?INST\]|<</?SYS>>",
    re.I,
)
_ROLE = re.compile(r"^\s*(?:#{1,6}\s*)?(?:assistant|model|response|answer|ai)\s*(?::\s*|\n)", re.I)
_THOUGHT = re.compile(r"<(think|thinking|thought|reasoning)>.*?</\1>", re.S | re.I)
_OPEN_THOUGHT = re.compile(r"<(?:think|thinking|thought|reasoning)>.*\Z", re.S | re.I)
_OPENING = re.compile(r"\s*<(think|thinking|thought|reasoning)>", re.I)
_LOST_OPENING = re.compile(r"\A.*?</(?:think|thinking|thought|reasoning)>", re.S | re.I)
_EMPHASIS = re.compile(r"\*\*|__|(?<!\w)[*_](?=\w)|(?<=[\w.!?])[*_](?!\w)")
_HEADING = re.compile(r"^[ \t]*#{1,6}[ \t]+", re.M)
_RULE = re.compile(r"^[ \t]*[-=*_|:+ ]{3,}$", re.M)
_LOOP_WORDS = 200  # as many tell a loop; more only cost time
# By Unicode's names. Japanese alone mixes three (five, with its long vowels and doubled
# characters), and Latin names occur everywhere.
_MIXED = {"HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "IDEOGRAPHIC", "LATIN"}
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


def normalise(completion: str) -> str:
    """One spelling for what templates, markdown and Unicode write in many ways.

    Line breaks stay, since lists and letters are known by them; case stays too.
    """
    text = unicodedata.normalize("NFKC", completion.translate(_SPELLINGS))
    if "<" in text or "[" in text:
        text = _THOUGHT.sub(" ", text)
        text = _LOST_OPENING.sub(" ", text)  # some templates open the block in the prompt
        text = _OPEN_THOUGHT.sub(" ", text)  # cut off while thinking: no answer yet
        text = _TEMPLATE.sub(" ", text)
    text = _ROLE.sub("", text)
    text = _RULE.sub("", _HEADING.sub("", _EMPHASIS.sub("", text)))
    return text.strip()


def behind_thought(text: str) -> str:
    """What follows a thought that opens a text; the text itself where none does, or none ends."""
    opened = _OPENING.match(text)
    closed = opened and re.compile(f"</{opened[1]}>", re.I).search(text, opened.end())
    return text[closed.end() :] if closed else text


def words(text: str) -> list[str]:
    """Lower-case words; in scripts without spaces, runs of characters."""
    return _WORD.findall(text.lower())


def drop_echo(prompt: str, text: str) -> str:
    """The text without the prompt that it opens with; "" if there is nothing else."""
    asked = words(prompt)
    while True:
        said = words(text[: 2 * len(prompt) + 200])
        if len(said) >= 5 and said == asked[: len(said)]:
            return ""
        if len(asked) < 4 or said[: len(asked)] != asked:
            return text
        ends = [match.end() for match in _WORD.finditer(text)]
        text = text[ends[len(asked) - 1] :].lstrip(" \t\n.?!:\"'")


def garbled(text: str) -> str:
    """The part of a text that makes it no answer, or "" if it may be one.

    Garbage is: no letters or digits, mostly symbols, a word or phrase over and over, or
    words of many scripts thrown together.
    """
    solid = [char for char in text if not char.isspace()]
    known = _known(text, solid)
    if not known or (len(solid) >= 12 and known < 0.45 * len(solid)):
        return text[:40]
    return _repeated(text) or _script_soup(text)


def _known(text: str, solid: list[str]) -> int:
    """How many characters are letters, digits or marks on letters."""
    if text.isascii():
        return sum(map(str.isalnum, solid))
    return sum(char.isalnum() or unicodedata.category(char)[0] == "M" for char in solid)


def _repeated(text: str) -> str:
    """A character, word or short phrase that fills most of the text."""
    run = re.search(r"(\S)\1{15,}", text)
    if run and run.end() - run.start() > 0.5 * len(text):
        return run.group()[:40]
    said = words(text)[:_LOOP_WORDS]
    if len(said) < 8:
        return ""
    word, times = Counter(said).most_common(1)[0]
    if times > 0.6 * len(said):
        return word
    for period in range(2, min(12, len(said) // 3) + 1):
        same = sum(map(eq, said[period:], said))
        # a loop may start late; what comes before it must be short
        if same >= 2 * period and same > 0.7 * (len(said) - period):
            return " ".join(said[-period:])
    return ""


def _script_soup(text: str) -> str:
    if text.isascii():
        return ""
    scripts: Counter[str] = Counter()
    for char in text[:400]:
        if char.isalpha():
            scripts[unicodedata.name(char, "?").split(" ", 1)[0]] += 1
    counted = scripts.keys() - _MIXED
    return text[:40] if len(counted) >= 3 else ""
