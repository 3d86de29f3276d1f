"""An ask of a batcher, and a test that waits for what comes of it."""

from __future__ import annotations

import threading

from safegene_edge.runtime.batcher import Ask


class Listener:
    """An ask and what came of it."""

    def __init__(self, prompt, max_tokens=12, **options):
        self.pieces, self.finish, self.over = [], None, threading.Event()
        self.ask = Ask(prompt, max_tokens, self.listen, **options)

    def listen(self, text, finish):
        self.pieces.append(text)
        if finish:
            self.finish = finish
            self.over.set()

    def text(self):
        assert self.over.wait(30)
        return "".join(self.pieces)


def answer(batcher, prompt, *args, **options):
    """Submit an ask and wait for its end."""
    listener = Listener(prompt, *args, **options)
    batcher.submit(listener.ask)
    listener.text()
    return listener
