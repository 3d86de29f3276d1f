"""Bytes become text as they come, whole characters alone, up to the first stop string."""

from __future__ import annotations

import pytest

from safegene_edge.runtime.sampling import TextStream


@pytest.mark.parametrize("stop", [(), ("END",), ("é→", "x")])
def test_text_comes_out_whole_whatever_the_pieces(stop):
    text = "naïve → EN 日本 E"
    data = text.encode()
    for size in (1, 2, 3, 5):
        stream, found = TextStream(stop), ""
        for start in range(0, len(data), size):
            piece, stopped = stream.push(data[start : start + size])
            assert not stopped
            found += piece
            assert text.startswith(found)
        assert found + stream.rest() == text


def test_the_first_stop_string_wins():
    stream = TextStream(("STOP", "P!"))
    assert stream.push(b"say ST") == ("say ", False)
    assert stream.push(b"UT") == ("STUT", False)
    assert stream.push(b" STOP! more") == (" ", True)
    assert TextStream().push(b"\xff\xfe") == ("\ufffd\ufffd", False)
    begun = TextStream()
    assert begun.push("a\U0001f600".encode()[:3]) == ("a", False)
    assert begun.rest() == ""  # of a character that was begun, nothing is shown
