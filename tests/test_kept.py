"""What slots leave behind when they are given away: the same answers, read in fewer tokens."""

from __future__ import annotations

import pytest
from listener import Listener, answer

from safegene_edge import Engine, SafeLlama
from safegene_edge.runtime.batcher import Batcher

F32 = 0
LONG = 60  # tokens of a prompt that are worth keeping


@pytest.fixture(scope="module")
def llama(tiny):
    path = tiny("llama", max_position_embeddings=8192).gguf_path
    with SafeLlama(path, n_ctx=512, type_k=F32, type_v=F32, n_threads=1) as model:
        yield model


def asked_in_turn(llama, keep, turns, **options):
    """Answers to prompts that take one slot from each other, and how much of each was kept."""
    options = {"n_parallel": 1, "n_ctx": 512, **options}
    with Engine(llama, **options) as engine:
        batcher = Batcher(engine, keep=keep)
        found = [answer(batcher, prompt, 12) for prompt in turns]
        kept = batcher._kept
        assert kept.size == sum(len(state.data) for state in kept._states.values()) <= keep
        batcher.close()
        assert len(kept) == kept.size == 0
    return [one.text() for one in found], [one.ask.reused for one in found]


def test_a_prompt_comes_again_after_its_slot_was_given_away(llama):
    first, second, third = ([n, n + 1] * (LONG // 2) for n in (5, 50, 100))
    turns = [first, second, third, first, second]
    cold, none = asked_in_turn(llama, 0, turns)
    warm, reused = asked_in_turn(llama, 1 << 24, turns)
    assert none == [0] * 5
    assert reused == [0, 0, 0, LONG - 1, LONG - 1]
    assert warm == cold


def test_a_text_is_kept_once(llama):
    first, second, third = ([n, n + 1] * (LONG // 2) for n in (5, 50, 100))
    with Engine(llama, n_parallel=1, n_ctx=512) as engine:
        batcher = Batcher(engine, keep=1 << 24)
        said = answer(batcher, first).text()
        for prompt in (second, third, first, second):
            answer(batcher, prompt)
        assert len(batcher._kept) == 3
        longer = [*first, *llama.tokenize(said.encode(), add_bos=False), 7, 8, 9]
        for prompt in (longer, second, third, first, second):
            answer(batcher, prompt)
        kept = list(batcher._kept._states)
        batcher.close()
    assert not any(a != b and a == b[: len(a)] for a in kept for b in kept)


def test_a_conversation_goes_on_after_others(llama):
    first, other = [5, 6] * (LONG // 2), [50, 51] * (LONG // 2)
    (said, *_), _ = asked_in_turn(llama, 0, [first])
    longer = [*first, *llama.tokenize(said.encode(), add_bos=False), 7, 8, 9]
    cold, _ = asked_in_turn(llama, 0, [longer])
    warm, reused = asked_in_turn(llama, 1 << 24, [first, other, longer])
    assert reused[2] >= LONG
    assert warm[2] == cold[0]


def test_what_is_kept_stays_within_its_bound(llama):
    turns = [[n, n + 1] * (LONG // 2) for n in (5, 50, 100, 5)]
    with Engine(llama, n_parallel=1, n_ctx=512) as engine:
        batcher = Batcher(engine, keep=1 << 24)
        for prompt in turns[:2]:
            answer(batcher, prompt, 12)
        one = batcher._kept.size
        batcher.close()
    assert one > 0
    assert asked_in_turn(llama, one - 1, turns)[1] == [0, 0, 0, 0]  # none fits
    # The second pushes out the first.
    assert asked_in_turn(llama, one + 8, turns)[1] == [0, 0, 0, 0]
    assert asked_in_turn(llama, 3 * one, turns)[1] == [0, 0, 0, LONG - 1]


def test_the_start_of_a_longer_text_is_taken_from_it(llama):
    long = [5, 6] * 100
    turns = [long, [50, 51] * 100, long[:40]]
    cold, _ = asked_in_turn(llama, 0, turns, n_ctx=256)
    warm, reused = asked_in_turn(llama, 1 << 24, turns, n_ctx=256)
    assert (warm, reused[2]) == (cold, 39)


def test_a_kept_text_waits_while_others_take_the_cells(llama):
    long = [5, 6] * 100
    with Engine(llama, n_parallel=2, n_ctx=512) as engine:
        batcher = Batcher(engine, keep=1 << 24)
        expected = answer(batcher, long[:40]).text()
        for prompt in (long, [50, 51] * 100, [60, 61] * 100):
            answer(batcher, prompt)
        held = Listener([70, 71, 72], 400)
        batcher.submit(held.ask)
        found = answer(batcher, long[:40])
        batcher.cancel(held.ask)
        batcher.close()
    assert (found.ask.reused, found.text()) == (0, expected)


def test_a_state_that_makes_room_for_another_is_loaded_all_the_same(llama):
    """Memory holds one: keeping what the slot held pushes out what is asked for."""
    first, second = ([n, n + 1] * (LONG // 2) for n in (5, 50))
    turns = [first, second, first, second]
    cold, _ = asked_in_turn(llama, 0, turns)
    with Engine(llama, n_parallel=1, n_ctx=512) as engine:
        batcher = Batcher(engine, keep=1 << 24)
        for prompt in turns[:2]:
            answer(batcher, prompt)
        one = batcher._kept.size
        batcher.close()
    warm, reused = asked_in_turn(llama, one + 8, turns)
    assert (warm, reused) == (cold, [0, 0, LONG - 1, LONG - 1])
