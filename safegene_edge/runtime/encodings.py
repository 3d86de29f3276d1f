"""Texts that a message carries encoded, put back where they stand.

Whoever asks in Base64 or with every letter moved asks the same thing, but a small model refuses by
its words. The guard asks with the words in the clear. Undone are Base64, hexadecimal and binary
digits, percent signs and numeric entities, letters that only look otherwise, letters moved by some
places (ROT13), digits that stand for letters, and letters in backward order. Languages and synonyms
are not: the model reads these itself.
"""

from __future__ import annotations

import base64
import html
import math
import re
import string
import unicodedata
import urllib.parse
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import product

_DEEP = 8  # rounds: encodings lie within each other
_LETTERS, _LONG = (0.85, 0.6), 12  # of what was decoded are letters and spaces; if it is long
_SHORT = 16  # digits that may be a plain word
_WORDS = """
the and that have for not with you this but his from they say her she will one all would there their
what out about who get which when make can like time just him know take people into year your good
some could them see other than then now look only come its over think also back after use two how
our work first well way even new want because any these give day most are was were been has had did
does write create explain describe list tell show provide help teach develop design plan
instructions steps guide step without someone should where why more need please build using find
code program script story article post email letter ways best to of in it is on as at by my up if do
go no so or an we he be me us
"""
_COMMON = frozenset(_WORDS.split())
# Letters of English texts, in percent.
_SHARES = (8.2, 1.5, 2.8, 4.3, 12.7, 2.2, 2.0, 6.1, 7.0, 0.15, 0.8, 4.0, 2.4, 6.7, 7.5, 1.9, 0.1,
           6.0, 6.3, 9.1, 2.8, 1.0, 2.4, 0.15, 2.0, 0.07)  # fmt: skip
_NATS = dict(zip(string.ascii_lowercase, map(math.log, _SHARES), strict=True))
_BACKWARD = 26  # beside the places by which letters are moved
_WAYS_TRIED = 3
_FLIPPED = 3.0  # nats, for want of a letter that tells: a common word's worth in backward order
_LEAST = 10.0  # nats by which words are likelier when moved
_HITS, _SHARE = 2, 0.15  # common words of a span when moved, different ones; and of all its words
_BASE64 = re.compile(
    r"(?<![\w+/-])(?:[\w+/-]{8,}(?:\r?\n[\w+/-]{4,})*|[\w+/-]{6,7}(?==))={0,4}(?![\w+/=-])",
    re.ASCII,
)
_HEX = re.compile(r"(?<!\w)(?:(?:0x|\\x)?[\da-f]{2}[\s,:;-]{0,2}){8,}(?![\da-f])", re.I)
_BINARY = re.compile(r"(?<!\d)(?:(?:0b)?[01]{8}[\s,;-]{0,2}){6,}(?!\d)")
_PERCENT, _LEAST_PERCENT = re.compile(r"(?:%[\da-f]{2})+", re.I), 3
_ENTITY = re.compile(r"&#(?:\d{1,7}|x[\da-f]{1,6});", re.I)
_UNSEEN = "\u00ad\u034f\u0335-\u0338\u180e\u200b-\u200f\u2060-\u2064\u3164\ufe00-\ufe0f\ufeff"
_HIDDEN = re.compile(f"(?<=[ -~])[{_UNSEEN}]+(?=[ -~])")
_TAGS = {0xE0000 + code: chr(code) for code in range(0x20, 0x7F)}  # invisible copies of ASCII
_ALIKE = str.maketrans("аеорсухіѕј", "aeopcyxisj")  # noqa: RUF001  # Cyrillic and Latin
_MIXED = re.compile("[A-Za-zа-џ]+")  # noqa: RUF001
_WORD, _SPELT = re.compile(r"[A-Za-z]+"), re.compile(r"[A-Za-z\d@$]+")
_FOR_LETTERS = str.maketrans("@43105$7", "aaeiosst")
_BESIDE = re.compile(r"[^\sA-Za-z]*")
_LEAST_SPELT = 2  # common words, of three letters or more, that have digits in them


def _moved(text: str, places: int) -> str:
    """Text with its letters moved back by some places, or in backward order."""
    if places == _BACKWARD:
        return text[::-1]
    lower, upper = string.ascii_lowercase, string.ascii_uppercase
    turned = (letters[-places:] + letters[:-places] for letters in (lower, upper))
    return text.translate(str.maketrans(lower + upper, "".join(turned)))


@cache
def _ways() -> dict[str, int]:
    """Every common word as it looks when moved, and by how many places."""
    found: dict[str, int] = {}
    for word in _COMMON:
        found |= {_moved(word, 26 - places): places for places in range(1, 26)}
        found[word[::-1]] = _BACKWARD
    return {word: places for word, places in found.items() if word not in _COMMON}


def in_the_clear(text: str) -> tuple[str, str]:
    """The text with whatever is encoded in it undone, where it stands.

    Returns:
        With what can be decoded, and then with what only looks as if it were moved or spelt
        otherwise. There a decoy may have drawn plain words along.
    """
    decoded = guessed = _decode(text)
    for _ in range(_DEEP):
        before = guessed
        guessed = _decode(_turned(_spelt(before)))
        if guessed == before:
            break
    return decoded, guessed


def _decode(text: str) -> str:
    for _ in range(_DEEP):
        before = text
        for undo in (_plain_letters, _digits, _entities):
            text = undo(text)
        if text == before:
            break
    return text


def _plain_letters(text: str) -> str:
    """Letters that are ASCII's in another dress, and none that cannot be seen between them."""
    if text.isascii():
        return text
    text = "".join(map(_plain, _HIDDEN.sub("", text.translate(_TAGS))))
    return _MIXED.sub(_of_one_alphabet, text)


def _of_one_alphabet(found: re.Match[str]) -> str:
    """A word that holds ASCII letters has no others that only look like them."""
    word = found[0]
    return word.translate(_ALIKE) if re.search("[A-Za-z]", word) else word


def _plain(letter: str) -> str:
    dressed = unicodedata.normalize("NFKC", letter)
    is_one = len(dressed) == 1 and dressed.isascii() and dressed.isalpha()
    return dressed if is_one and letter not in "ªº" else letter  # 3º is a number


def _digits(text: str) -> str:
    """Base64, hexadecimal and binary digits and percent signs that are a text."""
    for pattern, decode in (
        (_BINARY, lambda found: bytes(int(byte, 2) for byte in re.findall("[01]{8}", found))),
        (_HEX, lambda found: bytes.fromhex(re.sub(r"0x|\\x|[\s,:;-]", "", found, flags=re.I))),
    ):
        text = pattern.sub(partial(_decoded, decode), text)
    text = _BASE64.sub(_lines_of_base64, text)
    if sum(map(len, _PERCENT.findall(text))) < 3 * _LEAST_PERCENT:  # "100 %d" is none
        return text
    return _PERCENT.sub(_of_percent, text)


def _of_percent(found: re.Match[str]) -> str:
    said = urllib.parse.unquote(found[0])
    return said if all(map(_is_shown, said)) else found[0]


def _decoded(decode: Callable[[str], bytes], found: re.Match[str], errors: str = "replace") -> str:
    try:
        said = decode(found[0]).decode(errors=errors)
    except ValueError:
        return found[0]
    return said if _is_text(said) else found[0]


def _lines_of_base64(found: re.Match[str]) -> str:
    """A run of lines; or without the first or the last one, which may be words; or each alone."""
    lines = found[0].splitlines()
    for errors in ("strict", "replace"):
        for first, last in product((0, 1), (0, 1)):
            text = "\n".join(lines[first : len(lines) - last])
            if one := _BASE64.fullmatch(text):
                said = _decoded(_of_base64, one, errors)
                if said != text:
                    return "\n".join([*lines[:first], said, *lines[len(lines) - last :]])
    return "\n".join(_BASE64.sub(partial(_decoded, _of_base64), line) for line in lines)


def _of_base64(found: str) -> bytes:
    if len(found) < _SHORT and (found.islower() or found.isupper()):
        raise ValueError("a word")
    digits = "".join(found.rstrip("=").split()).replace("-", "+").replace("_", "/")
    return base64.b64decode(digits + "=" * (-len(digits) % 4), validate=True)


def _is_text(said: str) -> bool:
    """Broken bytes are allowed at the end alone: within a text they may be a plain word's."""
    said = said.rstrip("\ufffd")
    count, is_long = len(said), len(said) >= _LONG  # what is shorter may be so by chance
    if not all(map(_is_shown, said)) or not (is_long or said.isascii()):
        return False
    letters = sum(letter.isalpha() or letter == " " for letter in said)
    known = {word for word in _WORD.findall(said.lower()) if len(word) > 2} & _COMMON
    return letters >= _LETTERS[is_long] * count > 0 or len(known) >= _HITS


def _is_shown(letter: str) -> bool:
    return letter != "\ufffd" and (letter.isprintable() or letter in "\t\n\r\u00a0")


def _entities(text: str) -> str:
    return _ENTITY.sub(lambda found: html.unescape(found[0]), text)


def _spelt(text: str) -> str:
    """Letters in place of the digits that stand for them, where common words are spelt so."""
    said = {word for word in _SPELT.findall(text) if not word.isalpha()}
    clear = {word: word.translate(_FOR_LETTERS) for word in said}
    known = {word for word in said if clear[word].lower() in _COMMON}
    if sum(len(word) > 2 and not word.isdigit() for word in known) < _LEAST_SPELT:
        return text
    numbers = {word for word in said - known if word.isdigit()} - set("145")  # I, a, 's
    return _SPELT.sub(
        lambda found: found[0] if found[0] in numbers else clear.get(found[0], found[0]), text
    )


def _turned(text: str) -> str:
    """The span of words that are English when their letters are moved, moved back."""
    words = list(_WORD.finditer(text))
    lower, ways = [word[0].lower() for word in words], _ways()
    seen = Counter(ways[word] for word in set(lower) & ways.keys())
    for places, count in seen.most_common(_WAYS_TRIED):
        if count < _HITS:
            break
        span = _best(list(map(cache(partial(_worth, places)), lower)))
        if span and _is_moved(lower[span[0] : span[1] + 1], places):
            first, last = _wider(text, words, *span)
            begin, end = words[first].start(), words[last].end()
            if places == _BACKWARD:  # and the marks beside it
                begin -= len(_BESIDE.match(text[:begin][::-1])[0])  # type: ignore[index]
                end = _BESIDE.match(text, end).end()  # type: ignore[union-attr]
            return text[:begin] + _moved(text[begin:end], places) + text[end:]
    return text


def _is_moved(words: Sequence[str], places: int) -> bool:
    """Whether enough of a span's words are common ones when moved, and more than as they stand."""
    ways = _ways()
    hits = [word for word in words if ways.get(word) == places]
    known = sum(word in _COMMON for word in words)
    long = {word for word in hits if len(word) > 2}
    return len(long) >= _HITS and len(hits) >= max(_SHARE * len(words), known)


def _worth(places: int, word: str) -> float:
    """By how many nats a word is likelier when moved."""
    if places == _BACKWARD:
        return _FLIPPED * ((_ways().get(word) == places) - (word in _COMMON)) - _FLIPPED / 10
    moved = _moved(word, places)
    return sum(_NATS[there] - _NATS[here] for here, there in zip(word, moved, strict=True))


def _best(worth: Sequence[float]) -> tuple[int, int] | None:
    """The first and the last of those that add up to most; None where it is too little."""
    best, found, total, first = _LEAST, None, 0.0, 0
    for number, value in enumerate(worth):
        if total <= 0:
            total, first = 0.0, number
        total += value
        if total >= best:
            best, found = total, (first, number)
    return found


def _wider(text: str, words: Sequence[re.Match[str]], first: int, last: int) -> tuple[int, int]:
    """The span with the words beside it, up to a common one, a line's end, a quote or a colon."""

    def joined(one: int, new: int, other: int) -> bool:
        gap = text[words[one].end() : words[other].start()]
        return words[new][0].lower() not in _COMMON and not re.search(r'[\n":]', gap)

    while first and joined(first - 1, first - 1, first):
        first -= 1
    while last + 1 < len(words) and joined(last, last + 1, last + 1):
        last += 1
    return first, last
