"""The chat page in a real browser, on a real server."""

from __future__ import annotations

import json

import pytest
from adapters import random_adapter
from browser import axe_faults
from serving import running

CHATS = "JSON.parse(localStorage.getItem('safegene.chats') || '[]')"
MODEL = "document.getElementById('model').textContent"
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
def files(tiny, tmp_path_factory):
    model = tiny("llama", max_position_embeddings=8192).gguf_path
    gene = tmp_path_factory.mktemp("gene") / "gene.gguf"
    random_adapter(model).save(gene)
    return model, gene


@pytest.fixture(scope="module")
def server(files):
    with running(*files, compare=True, ctx=8192, max_tokens=24) as found:
        yield found


def show(visit, server, chats=None, **options):
    """A new visitor's page, with these conversations in its history or none."""
    kept = [{"name": "safegene.chats", "value": json.dumps(chats)}] if chats else []
    state = {"cookies": [], "origins": [{"origin": server.url, "localStorage": kept}]}
    tab = visit(server.url, storage_state=state, **options)
    tab.page.wait_for_function(f"() => {MODEL} != '…'")
    return tab


def chat_of(*turns):
    return [{"id": "a", "title": "A talk", "turns": [{"ask": q, "text": a} for q, a in turns]}]


def idle(page):
    """Wait until nothing is being answered."""
    page.wait_for_selector("#stop", state="hidden")
    page.wait_for_selector("#send")


def send(page, text):
    """Type and send with the keyboard alone."""
    page.focus("#text")
    page.keyboard.insert_text(text)
    page.keyboard.press("Enter")


def asked(page, text):
    """The turn that is kept once a question is answered."""
    send(page, text)
    page.wait_for_function(f"text => {CHATS}[0]?.turns.at(-1).ask == text", arg=text)
    idle(page)
    return turns(page)[-1]


def turns(page):
    """The turns of the newest conversation, as the browser keeps them."""
    return page.evaluate(f"{CHATS}[0].turns")


def said(page):
    """Questions and answers, as they are read."""
    return page.locator("#log .said").all_inner_texts()


def titles(page):
    """The conversations to choose from."""
    return page.locator("#chats .open").all_text_contents()


def paper(page):
    """The colour of the page."""
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def reply(server, messages, model=None):
    """What the API says to the same."""
    name = server.ask("GET", "/v1/models").json["data"][0 if model is None else 1]["id"]
    answer = server.post(CHAT, {"model": name, "messages": messages}).json
    return answer["choices"][0]["message"]["content"]


def test_it_sends_and_shows_what_the_server_says(visit, server):
    tab = show(visit, server)
    page, keyboard = tab.page, tab.page.keyboard
    assert page.evaluate("document.activeElement.id") == "text"
    keyboard.insert_text("One")
    keyboard.press("Shift+Enter")
    keyboard.insert_text("Two")
    assert page.input_value("#text") == "One\nTwo"
    keyboard.press("Enter")
    page.wait_for_function(f"() => {CHATS}.length == 1")
    idle(page)
    messages = [{"role": "user", "content": "One\nTwo"}]
    first = reply(server, messages)
    (turn,) = turns(page)
    assert (turn["ask"], turn["text"]) == ("One\nTwo", first)
    messages += [
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And then?"},
    ]
    assert asked(page, "And then?")["text"] == reply(server, messages)
    assert len(said(page)) == 4
    # What a screen reader hears, once, when the answer is whole.
    assert page.text_content("#status")
    assert tab.reported == []
    assert all(url.startswith(server.url) for url in tab.requested)
    assert server.url + "/page.js" in tab.requested


def test_model_and_gene_are_shown(visit, server):
    page = show(visit, server).page
    about = server.ask("GET", "/v1/models").json["data"][0]
    assert page.text_content("#model") == about["id"]
    assert page.text_content("#gene") == about["gene"]


def test_history_survives_a_reload_and_can_be_deleted(visit, server):
    tab = show(visit, server)
    page = tab.page
    asked(page, "First talk")
    page.click("#new")
    asked(page, "Second talk")
    before = said(page)
    assert before[0] == "Second talk"
    page.reload()
    assert said(page) == before
    assert titles(page) == ["Second talk", "First talk"]
    page.locator("#chats .open").nth(1).click()
    assert said(page)[0] == "First talk"
    page.locator("#chats .drop").first.click()
    assert titles(page) == ["First talk"]
    assert page.evaluate(f"{CHATS}.map(chat => chat.title)") == ["First talk"]
    page.evaluate("localStorage.setItem('safegene.chats', '[{\"broken\"')")
    page.reload()
    assert titles(page) == []
    assert tab.reported == []


def test_it_streams_and_stops(visit, files):
    size = "[...document.querySelectorAll('#log .answer .said')].at(-1)?.textContent.length"
    with running(*files, ctx=8192, max_tokens=4000) as long:
        for stop in ("Escape", "click"):
            page = show(visit, long).page
            send(page, "Tell me everything")
            before = page.wait_for_function(f"() => {size} > 10 && {size}").json_value()
            page.wait_for_function(f"before => {size} > before", arg=before)  # it grows on
            assert page.is_hidden("#send")
            if stop == "click":
                page.click("#stop")
            else:
                page.keyboard.press("Escape")
            idle(page)
            (turn,) = turns(page)
            assert turn["note"] == "Stopped."
            assert len(turn["text"]) > 0
            none = "safegene_requests_active 0\n"
            while none not in long.ask("GET", "/metrics").body.decode():
                pass
        send(page, "Once more")
        page.wait_for_function("() => document.querySelectorAll('#log .answer').length == 2")
        page.wait_for_function(f"() => {size} > 10")
        page.reload()  # in the middle; it keeps what came
        assert [turn["ask"] for turn in turns(page)] == ["Tell me everything", "Once more"]
        assert len(turns(page)[1]["text"]) > 0


def test_another_try_takes_the_place_of_the_first(visit, server):
    page = show(visit, server).page
    first = asked(page, "Say something")["text"]
    page.get_by_role("button", name="Try again").click()
    page.wait_for_function(f"first => {CHATS}[0].turns[0].text != first", arg=first)
    idle(page)
    assert len(turns(page)) == 1


def test_compare_shows_both(visit, server, files):
    page = show(visit, server).page
    page.click("#compare")
    turn = asked(page, "What differs?")
    messages = [{"role": "user", "content": "What differs?"}]
    assert turn["text"] == reply(server, messages)
    assert turn["bare"] == reply(server, messages, "no-gene")
    assert turn["text"] != turn["bare"]
    labels = "[...document.querySelectorAll('#log .side')].map(s => s.getAttribute('aria-label'))"
    assert page.evaluate(labels) == ["without the gene", "with the gene"]
    before = said(page)
    assert len(before) == 3
    page.reload()
    assert page.evaluate(labels) == ["without the gene", "with the gene"]
    assert said(page) == before
    page.click("#compare")
    assert "bare" not in asked(page, "And alone?")
    with running(*files) as plain:
        assert show(visit, plain).page.is_hidden("#compare")


def test_what_goes_wrong_is_said(visit, files):
    with running(*files, api_key="right", max_tokens=9, ctx=512) as locked:
        page = visit(locked.url).page
        page.wait_for_selector("#lock[open]")
        page.keyboard.insert_text("right")
        page.keyboard.press("Enter")
        page.wait_for_function(f"() => {MODEL}.startsWith('tiny')")
        asked(page, "word " * 500 + "end")
        assert "do not fit" in page.locator("#log .fault").text_content()
    asked(page, "Anybody there?")
    assert "reached" in page.locator("#log .fault").last.text_content()


# -- what is shown ------------------------------------------------------------


@pytest.mark.parametrize("role", ["answer", "question", "title"])
def test_hostile_text_stays_text(visit, server, role):
    chats = chat_of(("q", HOSTILE) if role == "answer" else (HOSTILE, "a"))
    chats[0]["title"] = HOSTILE if role == "title" else "t"
    tab = show(visit, server, chats)
    page = tab.page
    assert page.locator("#log .said").count() == 2
    assert page.evaluate("window.bad") is None
    assert page.locator("script").count() == 1
    for wrong in ("script", "img", "svg", "iframe", "[onerror]", "[onload]", "[style]"):
        assert page.locator(f"#log .said {wrong}").count() == 0
    links = page.evaluate(
        "[...document.querySelectorAll('#log a')].map(a => [a.href, a.rel, a.target])"
    )
    assert (len(links) > 2) is (role == "answer")
    for href, rel, target in links:
        assert href.startswith(("https://e", "mailto:a@example.org"))
        assert ("noopener" in rel, target) == (True, "_blank")
    shown = page.inner_text("#chats" if role == "title" else "#log")
    assert "<script>window.bad = 1</script>" in shown
    assert "javascript:window.bad=1" in shown
    assert tab.reported == []
    assert all(url.startswith(server.url) for url in tab.requested)


def test_the_policy_forbids_what_markup_could_do(visit, server):
    tab = show(visit, server)
    page = tab.page
    policy = server.ask("GET", "/").headers["content-security-policy"]
    assert policy.startswith("default-src 'self';")
    assert "unsafe" not in policy
    page.evaluate(
        "document.getElementById('log').innerHTML = '<img src=x onerror=\"window.bad = 1\">'"
    )
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), "
                  "{textContent: 'window.bad = 1'}))")  # fmt: skip
    page.wait_for_function("() => document.querySelector('#log img').complete")
    assert page.evaluate("window.bad") is None
    assert "Content Security Policy" in "".join(tab.reported)


def test_markdown_is_shown(visit, server):
    page = show(visit, server, chat_of(("q", MARKDOWN))).page
    found = {
        "h2": "Head", "strong": "strong", "em": "soft", "p code": "code", "ol > li": "first",
        "ol li ul li": "inner", "blockquote p": "quoted", "pre code": "x = 1 < 2",
        "thead th": "a", "tbody td + td": "2", "a": "link",
    }  # fmt: skip
    for selector, text in found.items():
        assert page.locator(f"#log .answer {selector}").first.text_content() == text, selector
    assert page.get_attribute("#log a", "href") == "https://example.org/a_(b)"


@pytest.mark.parametrize(
    "text",
    ["**" * 3000, "[" * 5000, "`" * 5001, "> " * 3000, "- " * 3000, "|" * 3000, "*a " * 3000,
     "[a](" * 2000, "    " * 1000 + "- x", "```\n" * 1001, "~~a" * 2000, "\\" * 5000,
     "\n".join("  " * n + "- x" for n in range(300)), "a".join("`" * n for n in range(420))],
)  # fmt: skip
def test_strange_markdown_does_not_hang_the_page(visit, server, text):
    tab = show(visit, server, chat_of(("q", text)))
    tab.page.locator("#log .said").nth(1).wait_for(timeout=10_000)
    assert tab.page.locator("#log .said").count() == 2
    assert tab.reported == []


# -- for everyone -------------------------------------------------------------

FULL = [
    *chat_of(("A question", MARKDOWN), ("Another", "An answer")),
    {"id": "b", "title": "Compared", "turns": [{"ask": "x", "text": "y", "bare": "z"}]},
]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("what", ["empty", "talk", "compared", "menu"])
def test_axe_finds_no_fault(visit, server, what, width, dark):
    page = show(visit, server, None if what == "empty" else FULL, width=width, dark=dark).page
    if what == "compared":
        page.evaluate("document.querySelectorAll('#chats .open')[1].click()")
        assert page.locator("#log .side").count() == 2
    if what == "menu" and width == 390:
        page.click("#menu")
        page.wait_for_function(
            "() => getComputedStyle(document.getElementById('side')).transform == 'none'"
        )
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert axe_faults(page) == []


def test_the_theme_is_kept(visit, server):
    page = show(visit, server).page
    light = paper(page)
    assert page.get_attribute("#theme", "aria-pressed") == "false"
    page.click("#theme")
    dark = paper(page)
    assert dark != light
    page.reload()
    assert paper(page) == dark
    assert page.get_attribute("#theme", "aria-pressed") == "true"


def test_the_keyboard_reaches_everything(visit, server):
    page = show(visit, server, FULL).page
    page.evaluate("document.activeElement.blur()")
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate("document.activeElement.id || document.activeElement.className || "
                          "document.activeElement.textContent")
        )  # fmt: skip
    assert {"skip", "new", "open", "drop", "compare", "theme", "log", "text", "Copy"} <= reached


def test_a_phone_has_its_menu(visit, server):
    page = show(visit, server, FULL, width=390).page
    assert page.is_hidden("#side")
    page.click("#menu")
    page.wait_for_selector("#side")
    assert page.evaluate("document.activeElement.id") == "new"
    page.keyboard.press("Escape")
    page.wait_for_selector("#side", state="hidden")
    assert page.evaluate("document.activeElement.id") == "menu"
