"""What people write never becomes a control token.

A chat template marks turns with control tokens, written as text such as "<|im_end|>". A
rendered chat is tokenised with those texts read as tokens, so a message that contains one
would end its own turn and forge another. Here such texts are replaced, before rendering, by
stand-ins that no message can contain, and afterwards tokenised as the plain characters that
they are. A chat without any is tokenised exactly as ever.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import llama_cpp

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"  # Unicode noncharacters: never part of an exchanged text
_FIRST = 0xF0000  # private use; 65,534 numbers
_MOST = 0xFFFE
_STAND_IN = re.compile(f"{_OPEN}(.){_CLOSE}", re.DOTALL)
_RESERVED = re.compile(f"[{_OPEN}{_CLOSE}\ud800-\udfff]")  # half a surrogate pair is no text either


class ControlTexts:
    """The texts of a vocabulary's control tokens.

    Args:
        texts: as llama.cpp's tokenizer would find them in text that it trusts.
        others: texts of tokens that it finds in any text ("user defined").
    """

    def __init__(self, texts: Iterable[str], others: Iterable[str] = ()) -> None:
        self.others = frozenset(text for text in others if len(text) > 1)
        self._broken: frozenset[str] = frozenset()
        self.texts = sorted({text for text in texts if text}, key=len, reverse=True)
        self._any = re.compile(_longest_of(self.texts) if self.texts else r"(?!)")
        self._first = re.compile(f"[{re.escape(''.join({text[0] for text in self.texts}))}]"
                                 if self.texts else r"(?!)")  # fmt: skip
        self._longest = max(map(len, self.texts), default=0)
        # A message may also end in the first half of a control text, and the template go on
        # with the second.
        self._heads = {text[:i] for text in self.texts for i in range(1, len(text))}
        self._tails = {text[i:] for text in self.texts for i in range(1, len(text))}

    @classmethod
    def of(cls, vocab: Any, n_vocab: int) -> ControlTexts:
        """Those of a llama.cpp vocabulary."""
        special = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
        attribute, text = llama_cpp.llama_vocab_get_attr, llama_cpp.llama_vocab_get_text
        found: tuple[list[str], list[str]] = [], []
        for token in range(n_vocab):
            kind = attribute(vocab, token)
            if kind & (special | llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED):
                shown = text(vocab, token).decode("utf-8", "replace")
                found[not kind & special].append(shown)
        return cls(*found)

    def with_markers(self, shown: str) -> ControlTexts:
        """Those, and the others that a template shows between messages.

        Many a fine-tune has added its marks of turns as plain tokens. In a message such a text is
        tokenised in two halves, or llama.cpp would find the token there, too.
        """
        markers = frozenset(
            text for text in self.others if text in shown and text.strip() and not text.isalnum()
        )
        if not markers:
            return self
        found = ControlTexts([*self.texts, *markers], self.others - markers)
        found._broken = markers
        return found

    def hide(self, content: str, hidden: list[str]) -> str:
        """The content with stand-ins; what they stand for is appended to `hidden`."""

        def stand_in(text: str) -> str:
            return self._stand_in(text, hidden)

        content = _RESERVED.sub("\ufffd", content)
        core = content.strip()  # templates may strip, so its edges are edges as well
        if not core:
            return content
        before, _, after = content.partition(core)
        lengths = range(min(self._longest - 1, len(core)), 0, -1)
        head = next((core[:n] for n in lengths if core[:n] in self._tails), "")
        core = core[len(head) :]
        tail = next((core[-n:] for n in lengths if core[-n:] in self._heads), "")
        core = core[: len(core) - len(tail)]
        core = self._any.sub(lambda match: stand_in(match[0]), core)
        return before + stand_in(head) + core + stand_in(tail) + after

    def may_begin(self, *values: Any) -> bool:
        """Whether a control text could begin in one of the strings of some values."""
        return any(self._first.search(text) for text in _strings(values))

    def hide_all(self, content: str, hidden: list[str]) -> str:
        """As `hide`, with stand-ins for whatever a control text could begin with, too."""
        content = self.hide(content, hidden)
        return self._first.sub(lambda match: self._stand_in(match[0], hidden), content)

    def counted(self, parts: Iterable[tuple[str, bool]]) -> Counter[str]:
        """How often each control text stands in what is trusted."""
        return Counter(found for text, own in parts if own for found in self._any.findall(text))

    @staticmethod
    def _stand_in(text: str, hidden: list[str]) -> str:
        if not text or len(hidden) >= _MOST:
            return "\ufffd" if text else ""
        hidden.append(text)
        return f"{_OPEN}{chr(_FIRST + len(hidden) - 1)}{_CLOSE}"

    def parts(self, rendered: str, hidden: list[str]) -> Iterator[tuple[str, bool]]:
        """The rendered text in parts, and whether each is the template's, to be trusted."""
        for i, part in enumerate(_STAND_IN.split(rendered)):
            number = ord(part) - _FIRST if i % 2 else 0
            if i % 2 == 0:
                if part:
                    yield part, True
            elif 0 <= number < len(hidden):
                cut = 1 if hidden[number] in self._broken else len(hidden[number])
                yield hidden[number][:cut], False
                if cut < len(hidden[number]):
                    yield hidden[number][cut:], False


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for pair in value.items():
            yield from _strings(pair)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _longest_of(texts: Iterable[str]) -> str:
    """A pattern for the longest of some texts: a tree, for there may be a thousand of them."""
    tree: dict[str, list[str]] = {}
    for text in texts:
        if text:
            tree.setdefault(text[0], []).append(text[1:])
    found = []
    for first, rests in sorted(tree.items()):
        behind = _longest_of(rests) if any(rests) else ""
        found.append(re.escape(first) + (f"(?:{behind})?" if behind and "" in rests else behind))
    return found[0] if len(found) == 1 else f"(?:{'|'.join(found)})"
