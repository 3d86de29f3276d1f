"""The batcher: many answers at once are those that each would get alone."""

from __future__ import annotations

import codecs
import threading
import time

import numpy as np
import pytest
from adapters import random_adapter
from child import in_child
from listener import Listener, answer

from safegene_edge import Engine, SafeLlama
from safegene_edge.errors import LlamaCppError, SettingError
from safegene_edge.runtime.batcher import Ask, Batcher, QueueFullError
from safegene_edge.runtime.sampling import Sampling

F32 = 0


@pytest.fixture(scope="module")
def llama(tiny):
    path = tiny("llama", max_position_embeddings=8192).gguf_path
    with SafeLlama(path, n_ctx=512, type_k=F32, type_v=F32, n_threads=1) as model:
        yield model


@pytest.fixture
def batcher(llama):
    with Engine(llama, n_parallel=4, n_ctx=2048) as engine:
        made = Batcher(engine, max_waiting=64)
        yield made
        made.close()


def prompts(count, seed=3):
    random = np.random.default_rng(seed)
    return [random.integers(0, 290, n).tolist() for n in random.integers(1, 60, count)]


def test_answers_are_the_engines(llama, batcher):
    asked = prompts(40)
    with Engine(llama, n_parallel=4, n_ctx=2048) as engine:
        expected = engine.generate(asked, max_tokens=12)
    listeners = [Listener(prompt) for prompt in asked]
    for listener in listeners:
        batcher.submit(listener.ask)
    decoders = (codecs.getincrementaldecoder("utf-8")("replace") for _ in expected)
    said = [  # but for a character that was begun
        decoder.decode(llama.detokenize(one.tokens))
        for decoder, one in zip(decoders, expected, strict=True)
    ]
    assert [listener.text() for listener in listeners] == said
    assert [listener.finish for listener in listeners] == [e.finish for e in expected]


def test_a_kept_prefix_changes_nothing(llama, batcher):
    first = prompts(1, seed=5)[0] * 3
    once = answer(batcher, first)
    longer = [*first, *llama.tokenize(once.text().encode(), add_bos=False), 7, 8, 9]
    again, cold = answer(batcher, longer), prompts(8, seed=9)
    assert again.ask.reused >= len(first)
    for prompt in cold:  # all slots hold something else now
        answer(batcher, prompt)
    fresh = answer(batcher, longer)
    assert (fresh.ask.reused, fresh.text()) == (0, again.text())


def test_full_context_makes_idle_slots_forget(llama):
    with Engine(llama, n_parallel=4, n_ctx=256) as engine:
        batcher = Batcher(engine)
        expected = [answer(batcher, [n] * 100, 50).text() for n in (5, 6, 7)]
        again = [answer(batcher, [n] * 100, 50).text() for n in (5, 6, 7, 5, 6, 7)]
        batcher.close()
    assert again == expected * 2


def test_cancelling_frees_the_slot_at_once(batcher):
    long = [Listener([n, n + 1, n + 2], 1500) for n in range(40, 44)]
    for listener in long:
        batcher.submit(listener.ask)
    while not all(listener.pieces for listener in long[:1]):
        time.sleep(0.001)
    for listener in long:
        batcher.cancel(listener.ask)
    assert answer(batcher, [1, 2, 3]).finish in ("length", "stop")
    assert not any(listener.over.is_set() for listener in long)
    assert batcher.n_active == batcher.n_waiting == 0


def test_too_many_are_refused(llama):
    held = threading.Event()
    with Engine(llama, n_parallel=1, n_ctx=256) as engine:
        batcher = Batcher(engine, max_waiting=2, deliver=lambda _: held.wait(30))
        asks = [Listener([1, 2, 3], 5).ask for _ in range(5)]
        batcher.submit(asks[0])
        while not batcher.n_active:
            time.sleep(0.001)
        batcher.submit(asks[1])
        batcher.submit(asks[2])
        with pytest.raises(QueueFullError) as caught:
            batcher.submit(asks[3])
        assert 1 <= caught.value.retry_after <= 60
        held.set()
        batcher.close()
        with pytest.raises(LlamaCppError, match="closed"):
            batcher.submit(asks[4])


class Slow(Listener):
    """Reads its first text until the time is over, so that no machine is too fast."""

    def listen(self, text, finish):
        super().listen(text, finish)
        time.sleep(max(0.0, self.ask.deadline - time.monotonic() + 0.01))


def test_time_runs_out(batcher):
    late = answer(batcher, [1, 2], 5, deadline=time.monotonic() - 1)
    assert (late.finish, late.text()) == ("timeout", "")
    cut = Slow([3, 4], 1500, deadline=time.monotonic() + 0.2)
    batcher.submit(cut.ask)
    assert cut.text()
    assert cut.finish == "timeout"


def test_bad_asks_are_refused(batcher):
    for prompt, count in (([], 1), ([1], 0), ([1] * 2000, 100)):
        with pytest.raises(SettingError):
            batcher.submit(Listener(prompt, count).ask)


def test_an_engine_that_fails_fails_its_answers_alone(llama):
    """A token outside of the vocabulary makes llama.cpp refuse the batch."""
    with Engine(llama, n_parallel=2, n_ctx=256) as engine:
        batcher = Batcher(engine)
        expected = answer(batcher, [1, 2, 3]).text()
        assert answer(batcher, [10**6, 1, 2]).finish == "error"
        assert answer(batcher, [1, 2, 3]).text() == expected
        assert batcher.alive
        batcher.close()


def test_seeds_repeat_and_penalties_bite(batcher):
    hot = {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    texts = {
        seed: [answer(batcher, [5, 6], 20, sampling=Sampling(seed=seed, **hot)).text()] * 1
        + [answer(batcher, [5, 6], 20, sampling=Sampling(seed=seed, **hot)).text()]
        for seed in (1, 2, -3)
    }
    assert all(first == second for first, second in texts.values())
    assert len({first for first, _ in texts.values()}) == 3
    plain = answer(batcher, [5, 6], 100).text()
    fresh = answer(batcher, [5, 6], 100, sampling=Sampling(frequency_penalty=2.0)).text()
    assert len(set(fresh)) > len(set(plain))  # a random model repeats itself without end
    whole = answer(batcher, [5, 6], 100, stream=False)
    assert whole.pieces == [plain]


def test_stop_strings_end_an_answer(batcher):
    whole = answer(batcher, [5, 6, 7], 60).text()
    word = whole[10:14]
    for stream in (True, False):
        cut = answer(batcher, [5, 6, 7], 60, stop=("\0never", word), stream=stream)
        assert cut.finish == "stop"
        assert cut.text() == whole[: whole.index(word)]


# -- what may go wrong --------------------------------------------------------


def test_an_ask_that_cannot_be_begun_ends_alone(batcher):
    """No sampler can be made of this temperature; the others do not notice."""
    expected = answer(batcher, [5, 6], 40).text()
    others = [Listener([5, 6], 40) for _ in range(3)]
    broken = Listener([5, 6], 40, sampling=Sampling(temperature="hot"))
    batcher.submit(others[0].ask)
    batcher.submit(broken.ask)
    for listener in others[1:]:
        batcher.submit(listener.ask)
    assert (broken.text(), broken.finish) == ("", "error")
    assert [listener.text() for listener in others] == [expected] * 3
    assert {listener.finish for listener in others} <= {"stop", "length"}
    for _ in range(8):  # every slot is still there
        assert answer(batcher, [5, 6], 40).text() == expected
    assert len(batcher._idle) == 4


@pytest.mark.parametrize("stream", [True, False])
def test_a_listener_that_raises_ends_its_ask_alone(batcher, stream):
    expected = answer(batcher, [5, 6], 60).text()
    seen = []

    def broken(text, finish):
        seen.append(finish)
        raise RuntimeError("a listener's own fault")

    other = Listener([5, 6], 60)
    batcher.submit(Ask([5, 6], 1500, broken, stream=stream))
    batcher.submit(other.ask)
    assert other.text() == expected
    if stream:
        assert seen == [None, "error"]  # what it raised ends it, long before 1500 tokens
    assert answer(batcher, [5, 6], 60).text() == expected


def test_a_delivery_that_raises_ends_what_it_carried(llama):
    """`deliver` fails once: the answer in it ends, and the next is delivered."""
    faults = iter([True])

    def deliver(events):
        if next(faults, False):
            raise RuntimeError("the loop is gone")
        for ask, text, finish in events:
            ask.listener(text, finish)

    with Engine(llama, n_parallel=2, n_ctx=2048) as engine:
        batcher = Batcher(engine, deliver=deliver)
        assert answer(batcher, [5, 6], 1500).finish == "error"
        assert answer(batcher, [5, 6], 12).finish in ("stop", "length")


def test_a_listener_may_close_its_batcher_and_nothing_below(llama):
    refused, over = [], threading.Event()
    engine = Engine(llama, n_parallel=2, n_ctx=2048)
    batcher = Batcher(engine)

    def listen(text, finish):
        if finish:
            over.set()
            return
        for close in (engine.close, llama.close):
            with pytest.raises(LlamaCppError, match="another thread") as caught:
                close()
            refused.append(caught)
        batcher.close()

    batcher.submit(Ask([5, 6], 1500, listen))
    assert over.wait(30)
    batcher.close()
    assert len(refused) == 2 and not batcher.alive
    assert engine.generate([[1, 2, 3]], max_tokens=4)[0].tokens  # free again
    engine.close()


def test_an_engine_belongs_to_its_batcher(llama, batcher):
    with pytest.raises(SettingError, match="batcher"):
        batcher.engine.generate([[1, 2]], max_tokens=1)
    with pytest.raises(SettingError, match="batcher"):
        Batcher(batcher.engine)
    assert answer(batcher, [1, 2, 3]).finish in ("stop", "length")
    batcher.engine.close()  # closes the batcher first
    assert not batcher.alive
    batcher.close()


# -- in a process of their own: these were crashes ------------------------------

COMMON = """
import threading, time
from safegene_edge import Engine, SafeLlama
from safegene_edge.errors import SafeGeneError, SettingError
from safegene_edge.runtime.batcher import Ask, Batcher

class Listener:
    def __init__(self, prompt, count):
        self.pieces, self.finish = [], None
        self.begun, self.over = threading.Event(), threading.Event()
        self.ask = Ask(prompt, count, self.listen)

    def listen(self, text, finish):
        self.pieces.append(text)
        self.begun.set()
        if finish:
            self.finish = finish
            self.over.set()

    def text(self):
        assert self.over.wait(60)
        return "".join(self.pieces)

def opened():
    return SafeLlama(model, [gene] if gene else [], n_ctx=512, type_k=0, type_v=0, n_threads=1)

llama = opened()
engine = Engine(llama, n_parallel=2, n_ctx=8192)
batcher = Batcher(engine)

def answer(count=COUNT):
    listener = Listener([10, 11, 12], count)
    batcher.submit(listener.ask)
    return listener
"""
COUNT = 400


@pytest.fixture(scope="module")
def model(tiny):
    return tiny("llama", max_position_embeddings=8192).gguf_path


@pytest.fixture(scope="module")
def gene(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("gene") / "gene.gguf"
    random_adapter(model).save(path)
    return path


def alone(model, adapters, count):
    """The text of an engine's answer to the children's prompt."""
    settings = {"n_ctx": 512, "type_k": F32, "type_v": F32, "n_threads": 1}
    with SafeLlama(model, adapters, **settings) as llama, Engine(llama, n_ctx=8192) as engine:
        return llama.text(engine.generate([[10, 11, 12]], max_tokens=count)[0].tokens)


def child(script, **values):
    return in_child(COMMON.replace("COUNT", str(COUNT)) + script, **values)


DETACH = """
(handle,) = llama.adapters
listener = answer()
assert listener.begun.wait(60)
refused = set()
while not listener.over.is_set():
    try:
        llama.detach(handle)
    except SafeGeneError as error:
        refused.add(str(error))
with_gene = listener.text()
batcher.close()
llama.detach(handle)
batcher = Batcher(engine)
without = answer().text()
print(json.dumps({"refused": list(refused), "with": with_gene, "without": without}))
"""


def test_detaching_under_a_batcher_is_refused(model, gene):
    found = child(DETACH, model=model, gene=gene)
    assert found["refused"] == [
        f"{gene}: a batcher answers with it. Close the batcher or server first"
    ]
    assert found["with"] == alone(model, [gene], COUNT)
    assert found["without"] == alone(model, [], COUNT) != found["with"]
    assert not found["stderr"]


CLOSE = """
first = answer().text()
listeners = [answer(3000) for _ in range(4)]  # two run, two wait
assert listeners[0].begun.wait(60) and listeners[1].begun.wait(60)
CLOSE_IT
ends = [listener.finish for listener in listeners]
try:
    answer()
    closed = ""
except SafeGeneError as error:
    closed = str(error)
alive = batcher.alive
llama.close()
llama.close()
llama = opened()
engine = Engine(llama, n_parallel=2, n_ctx=8192)
batcher = Batcher(engine)
facts = {"first": first, "again": answer().text(), "ends": ends, "alive": alive, "closed": closed}
print(json.dumps(facts))
"""


@pytest.mark.parametrize(
    "how", ["llama.close()", "engine.close()", "batcher.close(); llama.close()"]
)
def test_closing_under_a_batcher_ends_it_first(model, gene, how):
    found = child(CLOSE.replace("CLOSE_IT", how), model=model, gene=gene)
    assert found["ends"] == ["error"] * 4 and not found["alive"]
    assert "batcher is closed" in found["closed"]
    assert found["first"] == found["again"] == alone(model, [gene], COUNT)
    assert not found["stderr"]


RAISE = """
calls = []

def broken(text, finish):
    calls.append(finish)
    raise RuntimeError("a listener's own fault")

other = answer()
batcher.submit(Ask([10, 11, 12], 3000, broken))
texts = [other.text(), answer().text()]
print(json.dumps({"texts": texts, "calls": calls, "alive": batcher.alive}))
llama.close()
"""


def test_a_listener_that_raises_does_not_end_the_process(model, gene):
    found = child(RAISE, model=model, gene=gene)
    assert found["texts"] == [alone(model, [gene], COUNT)] * 2
    assert found["calls"] == [None, "error"] and found["alive"]
    assert "a listener's own fault" in found["stderr"]  # logged, with its traceback


def test_a_process_may_end_in_mid_answer(model, gene):
    """Nothing is closed; the daemon thread dies with the process, and quietly."""
    script = "assert answer(3000).begun.wait(60)\nprint(json.dumps({}))"
    assert not child(script, model=model, gene=gene)["stderr"]


STORM = """
import collections, sys
batcher.close()
llama.close()
sys.setswitchinterval(1e-5)
seen, odd = collections.Counter(), []

def repeat(name, act):
    while not over.is_set():
        try:
            act()
            seen[name] += 1
        except SafeGeneError as error:
            seen[name + " refused"] += 1
            if over_soon.is_set() or "closed" not in str(error):
                continue
            odd.append(str(error))  # nothing is closed yet

def come_and_go():
    extra = llama.attach(gene, prove=False)
    seen["attach"] += 1
    while True:
        try:
            return llama.detach(extra)
        except SettingError:  # a run answers with it
            time.sleep(0.001)

for round in range(12):
    over, over_soon = threading.Event(), threading.Event()
    llama = opened()
    (handle,) = llama.adapters
    engine = Engine(llama, n_parallel=2, n_ctx=1024, n_threads=1)
    free = Engine(llama, n_parallel=2, n_ctx=256, n_threads=1)
    batcher = Batcher(engine)
    acts = {
        "submit": lambda: batcher.submit(Ask([10, 11, 12], 20, lambda *_: None)),
        "attach": come_and_go,
        "detach": lambda: llama.detach(handle),
        "set_scale": lambda: llama.set_scale(handle, 0.5),
        "run": lambda: free.generate([[1, 2, 3]] * 3, max_tokens=5),
        "chat": lambda: llama.create_completion("Hello", max_tokens=20),
        "tokenize": lambda: llama.text(llama.tokenize(b"Hello there")),
    }
    threads = [threading.Thread(target=repeat, args=act) for act in acts.items()]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    over_soon.set()
    closers = [threading.Thread(target=what.close)
               for what in ([llama, llama], [engine, llama], [batcher, free, llama])[round % 3]]
    for closer in closers:
        closer.start()
    for closer in closers:
        closer.join()
    over.set()
    for thread in threads:
        thread.join()
print(json.dumps({"seen": seen, "odd": odd}))
"""


def test_a_model_may_be_closed_in_the_midst_of_everything(model, gene):
    found = child(STORM, model=model, gene=gene)
    for name in ("submit", "attach", "set_scale", "run", "chat", "tokenize"):
        assert found["seen"].get(name) and found["seen"].get(f"{name} refused")
    assert not found["odd"] and not found["stderr"]


@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1e-39, 1e-9])
def test_a_temperature_near_0_takes_the_likeliest_token(batcher, temperature):
    """Logits over a denormal are infinite, and llama.cpp then takes the last candidate."""
    wanted = answer(batcher, [5, 6], 8).text()
    sampling = Sampling(temperature=temperature, top_k=2, top_p=1.0, min_p=0.0)
    assert answer(batcher, [5, 6], 8, sampling=sampling).text() == wanted
