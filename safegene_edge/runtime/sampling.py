"""How the next token is chosen and how tokens become text, one request at a time.

llama.cpp's own sampler chain chooses; the text comes out as soon as it is certain: whole
characters, and nothing that may yet turn out to be the beginning of a stop string.
"""

from __future__ import annotations

import codecs
import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp

from ..errors import SettingError

_RANDOM = 0xFFFFFFFF  # llama.cpp's word for "seed yourself"
# A temperature that is as good as 0; with much smaller ones logits overflow, and llama.cpp takes
# the least likely token.
_COLD = 1e-6
_LAST = 256  # tokens that the penalties look back


@dataclass(frozen=True, slots=True)
class Sampling:
    """What a request may ask of the sampler; the defaults are llama.cpp's but for greediness.

    Attributes:
        temperature: 0 is greedy, and the rest is then without effect but for the penalties.
        top_k: 0 is off; top_p: 1 is off; min_p: 0 is off.
        seed: None draws another one each time.
        presence_penalty, frequency_penalty: taken off the logits of tokens that this answer
            has used. The prompt's tokens do not count, so that no prompt can push the words
            of a refusal down.
    """

    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def chain(self, n_vocab: int) -> Any:
        """A new llama.cpp sampler chain; `free_chain` it."""
        chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        if not chain:
            raise SettingError("llama.cpp could not make a sampler")
        try:
            for sampler in self._samplers(n_vocab):
                llama_cpp.llama_sampler_chain_add(chain, sampler)
        except BaseException:
            free_chain(chain)
            raise
        return chain

    def _samplers(self, n_vocab: int) -> list[Any]:
        samplers = []
        if self.presence_penalty or self.frequency_penalty:
            penalties = (_LAST, 1.0, self.frequency_penalty, self.presence_penalty)
            samplers.append(llama_cpp.llama_sampler_init_penalties(n_vocab, *penalties))
        if self.temperature < _COLD:
            return [*samplers, llama_cpp.llama_sampler_init_greedy()]
        if self.top_k:
            samplers.append(llama_cpp.llama_sampler_init_top_k(self.top_k))
        if self.top_p < 1:
            samplers.append(llama_cpp.llama_sampler_init_top_p(self.top_p, 1))
        if self.min_p:
            samplers.append(llama_cpp.llama_sampler_init_min_p(self.min_p, 1))
        seed = _RANDOM if self.seed is None else self.seed % _RANDOM
        samplers.append(llama_cpp.llama_sampler_init_temp(self.temperature))
        return [*samplers, llama_cpp.llama_sampler_init_dist(seed)]


def free_chain(chain: Any) -> None:
    """Free a chain and the samplers in it."""
    llama_cpp.llama_sampler_free(chain)


class Pieces:
    """The bytes of a vocabulary's tokens, each asked of llama.cpp once; control tokens are empty.

    `ends` holds the tokens that end an answer.
    """

    def __init__(self, vocab: Any, n_vocab: int) -> None:
        self._vocab, self._known = vocab, dict[int, bytes]()
        self._buffer = ctypes.create_string_buffer(512)
        is_end = llama_cpp.llama_vocab_is_eog
        self.ends = frozenset(token for token in range(n_vocab) if is_end(vocab, token))

    def __getitem__(self, token: int) -> bytes:
        piece = self._known.get(token)
        if piece is None:
            size = len(self._buffer)
            n = llama_cpp.llama_token_to_piece(self._vocab, token, self._buffer, size, 0, False)
            if n < 0:  # the length that it needs
                self._buffer = ctypes.create_string_buffer(-n)
                return self[token]
            piece = self._known[token] = self._buffer.raw[:n]
        return piece


class TextStream:
    """Bytes in, certain text out; ends at the first stop string, which is not given out."""

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def push(self, piece: bytes) -> tuple[str, bool]:
        """The text that is certain now, and whether a stop string was met."""
        text = self._decoder.decode(piece)
        if not self._stop:
            return text, False
        self._held += text
        found = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            return self._held[: min(found)], True
        keep = max(map(self._overlap, self._stop))
        certain = len(self._held) - keep
        text, self._held = self._held[:certain], self._held[certain:]
        return text, False

    def rest(self) -> str:
        """What was held back, when no more comes."""
        self._decoder.reset()  # of a character that was begun, nothing is shown
        return self._held

    def _overlap(self, stop: str) -> int:
        """How many characters at the end of the text may be the beginning of `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
