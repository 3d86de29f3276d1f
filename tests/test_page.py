"""The chat page in a real browser, on a real server."""

from __future__ import annotations

import json

import pytest
from adapters import random_adapter
from browser import Browser, find_axe, find_chromium
from serving import running

LOG = "document.getElementById('log')"
TEXT = "document.getElementById('text')"
IDLE = "!document.getElementById('send').hidden"
SAID = f"[...{LOG}.querySelectorAll('.said')].map(said => said.innerText)"
ANSWERS = "JSON.parse(localStorage.getItem('safegene.chats') || '[]')"
CHAT = "/v1/chat/completions"
HOSTILE = """# <script>window.bad = 1</script>
<img src=x onerror="window.bad = 1"> <a href="javascript:window.bad=1">x</a> &lt;b&gt;
[one](javascript:window.bad=1) [two](JaVaScRiPt:window.bad=1)
[three](data:text/html,<script>1</script>)
[four](vbscript:x) [five](//evil.example/x) ![six](https://evil.example/x.png)
[seven](\tjavascript:1)
[eight](https://example.org/"onclick="window.bad=1) <https://example.org/> [nine](file:///etc/passwd)
[ten](mailto:a@example.org) `<script>window.bad = 1</script>` **<svg onload=window.bad=1>**

```html"><script>window.bad = 1</script>
<script>window.bad = 1</script>
```

| <script>window.bad = 1</script> | b |
| --- | --- |
| <img src=x onerror=window.bad=1> | [c](javascript:window.bad=1) |
"""
MARKDOWN = """## Head
One **strong** and *soft* `code` with a [link](https://example.org/a_(b)).

1. first
2. second
   - inner

> quoted

```python
x = 1 < 2
```

| a | b |
| - | - |
| 1 | 2 |
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = find_chromium()
    if program is None:
        pytest.skip("needs a Chromium (apt-get install chromium), or CHROMIUM=its path")
    found = Browser(program, tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory):
    model = tiny("llama", max_position_embeddings=8192).gguf_path
    gene = tmp_path_factory.mktemp("gene") / "gene.gguf"
    random_adapter(model).save(gene)
    return model, gene


@pytest.fixture(scope="module")
def server(files):
    with running(*files, compare=True, ctx=8192, max_tokens=24) as found:
        yield found


def show(browser, server, chats=None, **options):
    """The page, with these conversations in its history or none."""
    browser.open(server.url)
    browser.run("localStorage.clear(); sessionStorage.clear()")
    if chats is not None:
        browser.run(f"localStorage.setItem('safegene.chats', {json.dumps(json.dumps(chats))})")
    browser.open(server.url, **options)
    browser.wait_for("document.getElementById('model').textContent != '…'")


def chat_of(*turns):
    return [{"id": "a", "title": "A talk", "turns": [{"ask": q, "text": a} for q, a in turns]}]


def asked(browser, text):
    """Type and send with the keyboard alone; wait for the answer."""
    browser.run(f"{TEXT}.focus()")
    browser.type(text)
    browser.press("Enter")
    browser.wait_for(f"{ANSWERS}[0]?.turns.at(-1).ask == {json.dumps(text)}")
    browser.wait_for(IDLE)


def reply(server, messages, model=None):
    """What the API says to the same."""
    name = server.ask("GET", "/v1/models").json["data"][0 if model is None else 1]["id"]
    answer = server.post(CHAT, {"model": name, "messages": messages}).json
    return answer["choices"][0]["message"]["content"]


def test_it_sends_and_shows_what_the_server_says(browser, server):
    show(browser, server)
    assert browser.run("document.activeElement.id") == "text"
    browser.type("One")
    browser.press("Enter", shift=True)
    browser.type("Two")
    assert browser.run(f"{TEXT}.value") == "One\nTwo"
    browser.press("Enter")
    browser.wait_for(f"{ANSWERS}.length == 1 && {IDLE}")
    messages = [{"role": "user", "content": "One\nTwo"}]
    first = reply(server, messages)
    (turn,) = browser.run(f"{ANSWERS}[0].turns")
    assert (turn["ask"], turn["text"]) == ("One\nTwo", first)
    asked(browser, "And then?")
    messages += [
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And then?"},
    ]
    assert browser.run(f"{ANSWERS}[0].turns[1].text") == reply(server, messages)
    assert len(browser.run(SAID)) == 4
    # What a screen reader hears, once, when the answer is whole.
    assert browser.run("document.getElementById('status').textContent")
    assert browser.reported() == []
    assert all(url.startswith(server.url) for url in browser.requested())
    assert server.url + "/page.js" in browser.requested()


def test_model_and_gene_are_shown(browser, server, files):
    show(browser, server)
    about = server.ask("GET", "/v1/models").json["data"][0]
    assert browser.run("document.getElementById('model').textContent") == about["id"]
    assert browser.run("document.getElementById('gene').textContent") == about["gene"]


def test_history_survives_a_reload_and_can_be_deleted(browser, server):
    show(browser, server)
    asked(browser, "First talk")
    browser.run("document.getElementById('new').click()")
    asked(browser, "Second talk")
    before = browser.run(SAID)
    browser.open(server.url)
    assert browser.run(SAID) == before
    titles = "[...document.querySelectorAll('#chats .open')].map(b => b.textContent)"
    assert browser.run(titles) == ["Second talk", "First talk"]
    browser.run("document.querySelectorAll('#chats .open')[1].click()")
    assert browser.run(SAID)[0] == "First talk"
    browser.run("document.querySelector('#chats .drop').click()")
    assert browser.run(titles) == ["First talk"]
    assert browser.run(f"{ANSWERS}.map(chat => chat.title)") == ["First talk"]
    browser.run("localStorage.setItem('safegene.chats', '[{\"broken\"')")
    browser.open(server.url)
    assert browser.run(titles) == []
    assert browser.reported() == []


def test_it_streams_and_stops(browser, files):
    with running(*files, ctx=8192, max_tokens=4000) as long:
        for stop in ("Escape", "click"):
            show(browser, long)
            browser.run(f"{TEXT}.focus()")
            browser.type("Tell me everything")
            browser.press("Enter")
            shown = f"{LOG}.querySelector('.answer .said').textContent.length"
            size = browser.wait_for(f"{shown} > 10 && {shown}")
            browser.wait_for(f"{shown} > {size}")  # it grows while we look
            assert browser.run(IDLE) is False
            if stop == "click":
                browser.run("document.getElementById('stop').click()")
            else:
                browser.press("Escape")
            browser.wait_for(IDLE)
            (turn,) = browser.run(f"{ANSWERS}[0].turns")
            assert turn["note"] == "Stopped."
            assert len(turn["text"]) > 0
            idle = "safegene_requests_active 0\n"
            while idle not in long.ask("GET", "/metrics").body.decode():
                pass
        browser.run(f"{TEXT}.focus()")
        browser.type("Once more")
        browser.press("Enter")
        browser.wait_for(f"{LOG}.querySelectorAll('.answer').length == 2")
        browser.open(long.url)  # a reload in the middle keeps what came
        assert [turn["ask"] for turn in browser.run(f"{ANSWERS}[0].turns")] == [
            "Tell me everything",
            "Once more",
        ]


def test_another_try_takes_the_place_of_the_first(browser, server):
    show(browser, server)
    asked(browser, "Say something")
    first = browser.run(f"{ANSWERS}[0].turns[0].text")
    again = f"[...{LOG}.querySelectorAll('.tools button')].find(b => b.textContent == 'Try again')"
    browser.run(f"{again}.click()")
    browser.wait_for(f"{IDLE} && {ANSWERS}[0].turns[0].text != {json.dumps(first)}")
    assert len(browser.run(f"{ANSWERS}[0].turns")) == 1


def test_compare_shows_both(browser, server, files):
    show(browser, server)
    browser.run("document.getElementById('compare').click()")
    asked(browser, "What differs?")
    (turn,) = browser.run(f"{ANSWERS}[0].turns")
    messages = [{"role": "user", "content": "What differs?"}]
    assert turn["text"] == reply(server, messages)
    assert turn["bare"] == reply(server, messages, "no-gene")
    assert turn["text"] != turn["bare"]
    labels = f"[...{LOG}.querySelectorAll('.side')].map(s => s.getAttribute('aria-label'))"
    assert browser.run(labels) == ["without the gene", "with the gene"]
    browser.open(server.url)
    assert browser.run(labels) == ["without the gene", "with the gene"]
    browser.wait_for("document.getElementById('compare').checkVisibility()")
    browser.run("document.getElementById('compare').click()")
    asked(browser, "And alone?")
    assert "bare" not in browser.run(f"{ANSWERS}[0].turns[1]")
    with running(*files) as plain:
        show(browser, plain)
        assert browser.run("document.getElementById('compare').checkVisibility()") is False


def test_what_goes_wrong_is_said(browser, files):
    with running(*files, api_key="right", max_tokens=9, ctx=512) as locked:
        browser.open(locked.url)
        browser.run("localStorage.clear()")
        browser.wait_for("document.getElementById('lock').open")
        browser.type("right")
        browser.press("Enter")
        browser.wait_for("document.getElementById('model').textContent.startsWith('tiny')")
        asked(browser, "word " * 500 + "end")
        fault = f"{LOG}.querySelector('.fault').textContent"
        assert "do not fit" in browser.run(fault)
    asked(browser, "Anybody there?")
    assert "reached" in browser.run(f"[...{LOG}.querySelectorAll('.fault')].at(-1).textContent")


# -- what is shown ------------------------------------------------------------


@pytest.mark.parametrize("role", ["answer", "question", "title"])
def test_hostile_text_stays_text(browser, server, role):
    chats = chat_of(("q", HOSTILE) if role == "answer" else (HOSTILE, "a"))
    chats[0]["title"] = HOSTILE if role == "title" else "t"
    show(browser, server, chats)
    browser.wait_for(f"{LOG}.querySelectorAll('.said').length == 2")
    assert browser.run("window.bad") is None
    assert browser.run("document.querySelectorAll('script').length") == 1
    for wrong in ("script", "img", "svg", "iframe", "[onerror]", "[onload]", "[style]"):
        assert browser.run(f"{LOG}.querySelectorAll('.said {wrong}').length") == 0
    links = browser.run(f"[...{LOG}.querySelectorAll('a')].map(a => [a.href, a.rel, a.target])")
    assert (len(links) > 2) is (role == "answer")
    for href, rel, target in links:
        assert href.startswith(("https://e", "mailto:a@example.org"))
        assert ("noopener" in rel, target) == (True, "_blank")
    shown = browser.run(f"{LOG}.innerText")
    assert "<script>window.bad = 1</script>" in shown or role == "title"
    assert "javascript:window.bad=1" in shown or role == "title"
    assert browser.reported() == []
    assert all(url.startswith(server.url) for url in browser.requested())


def test_the_policy_forbids_what_markup_could_do(browser, server):
    show(browser, server)
    policy = server.ask("GET", "/").headers["content-security-policy"]
    assert policy.startswith("default-src 'self';")
    assert "unsafe" not in policy
    browser.run(f"{LOG}.innerHTML = '<img src=x onerror=\"window.bad = 1\">'")
    browser.run("document.body.append(Object.assign(document.createElement('script'), "
                "{textContent: 'window.bad = 1'}))")  # fmt: skip
    browser.wait_for("document.querySelector('#log img').complete")
    assert browser.run("window.bad") is None
    assert "Content Security Policy" in "".join(browser.reported())


def test_markdown_is_shown(browser, server):
    show(browser, server, chat_of(("q", MARKDOWN)))
    found = {
        "h2": "Head", "strong": "strong", "em": "soft", "p code": "code", "ol > li": "first",
        "ol li ul li": "inner", "blockquote p": "quoted", "pre code": "x = 1 < 2",
        "thead th": "a", "tbody td + td": "2", "a": "link",
    }  # fmt: skip
    for selector, text in found.items():
        query = f"{LOG}.querySelector('.answer {selector}')?.textContent"
        assert browser.run(query) == text, selector
    assert browser.run(f"{LOG}.querySelector('a').href") == "https://example.org/a_(b)"


@pytest.mark.parametrize(
    "text",
    ["**" * 3000, "[" * 5000, "`" * 5001, "> " * 3000, "- " * 3000, "|" * 3000, "*a " * 3000,
     "[a](" * 2000, "    " * 1000 + "- x", "```\n" * 1001, "~~a" * 2000, "\\" * 5000,
     "\n".join("  " * n + "- x" for n in range(300))],
)  # fmt: skip
def test_strange_markdown_does_not_hang_the_page(browser, server, text):
    show(browser, server, chat_of(("q", text)))
    browser.wait_for(f"{LOG}.querySelectorAll('.said').length == 2", 10)
    assert browser.reported() == []


# -- for everyone -------------------------------------------------------------

FULL = [
    *chat_of(("A question", MARKDOWN), ("Another", "An answer")),
    {"id": "b", "title": "Compared", "turns": [{"ask": "x", "text": "y", "bare": "z"}]},
]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("what", ["empty", "talk", "compared", "menu"])
def test_axe_finds_no_fault(browser, server, what, width, dark):
    axe = find_axe()
    if axe is None:
        pytest.skip("needs axe-core: pip install axe-core-python, or AXE_JS=axe.min.js")
    show(browser, server, None if what == "empty" else FULL, width=width, dark=dark)
    if what == "compared":
        browser.run("document.querySelectorAll('#chats .open')[1].click()")
    if what == "menu" and width == 390:
        browser.run("document.getElementById('menu').click()")
        browser.wait_for("getComputedStyle(document.getElementById('side')).transform == 'none'")
    assert browser.run("document.documentElement.scrollWidth") <= width
    browser.run(axe.read_text(encoding="utf-8") + ";true")
    faults = browser.run(
        "axe.run().then(r => r.violations.map(v => v.impact + ': ' + v.id + ': ' + "
        "v.nodes.map(n => n.target).join(', ')))"
    )
    assert faults == []


def test_the_theme_is_kept(browser, server):
    paper = "getComputedStyle(document.body).backgroundColor"
    pressed = "document.getElementById('theme').getAttribute('aria-pressed')"
    show(browser, server, dark=False)
    light = browser.run(paper)
    assert browser.run(pressed) == "false"
    browser.run("document.getElementById('theme').click()")
    dark = browser.run(paper)
    assert dark != light
    browser.open(server.url, dark=False)
    assert (browser.run(paper), browser.run(pressed)) == (dark, "true")


def test_the_keyboard_reaches_everything(browser, server):
    show(browser, server, FULL)
    browser.run("document.activeElement.blur()")
    reached = set()
    for _ in range(40):
        browser.press("Tab")
        reached.add(
            browser.run("document.activeElement.id || document.activeElement.className || "
                        "document.activeElement.textContent")
        )  # fmt: skip
    assert {"skip", "new", "open", "drop", "compare", "theme", "log", "text", "Copy"} <= reached


def test_a_phone_has_its_menu(browser, server):
    show(browser, server, FULL, width=390)
    side = "getComputedStyle(document.getElementById('side')).visibility"
    assert browser.run(side) == "hidden"
    browser.run("document.getElementById('menu').click()")
    browser.wait_for(f"{side} == 'visible'")
    assert browser.run("document.activeElement.id") == "new"
    browser.press("Escape")
    browser.wait_for(f"{side} == 'hidden'")
    assert browser.run("document.activeElement.id") == "menu"
