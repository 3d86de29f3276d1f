"""The chat page in a real browser, on a real server."""

from __future__ import annotations

import json
import re

import pytest
from adapters import random_adapter
from browser import axe_faults
from serving import running

CHATS = "JSON.parse(localStorage.getItem('safegene.chats') || '[]')"
TURNS = f"""((chat) => {{
  const found = [];
  for (let holder = chat, turn; (turn = holder?.next[holder.at]); holder = turn.drafts[turn.at]) {{
    found.push({{ ask: turn.ask, ...turn.drafts[turn.at] }});
  }}
  return found;
}})({CHATS}[0])"""
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
    page.wait_for_function(f"text => {TURNS}.at(-1)?.ask == text", arg=text)
    idle(page)
    return turns(page)[-1]


def turns(page):
    """The turns of the newest conversation that are shown, as the browser keeps them."""
    return page.evaluate(TURNS)


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


def test_another_tabs_conversations_stay(visit, files):
    """It writes while an answer comes here."""
    grows = "() => document.querySelector('#log .answer .said')?.textContent.length > 10"
    write = "chats => localStorage.setItem('safegene.chats', JSON.stringify(chats))"
    with running(*files, ctx=8192, max_tokens=4000) as long:
        page = show(visit, long, chat_of(("Old", "Gone in the other tab"))).page
        press(page, "New conversation")
        send(page, "Tell me everything")
        page.wait_for_function(grows)
        tab = page.context.new_page()
        tab.goto(long.url)
        other = [{**chat_of(("A question", "An answer"))[0], "id": "b", "title": "Elsewhere"}]
        tab.evaluate(write, other)
        page.wait_for_timeout(500)  # the browser tells the tab by itself
        page.keyboard.press("Escape")
        idle(page)
        kept = page.evaluate(CHATS)
        assert sorted(chat["title"] for chat in kept) == ["Elsewhere", "Tell me everything"]
        assert len(next(c for c in kept if c["id"] != "b")["next"][0]["drafts"][0]["text"]) > 10


def press(page, name, place=0):
    """Click a button by its name."""
    page.get_by_role("button", name=name, exact=True).nth(place).click()


def test_drafts_are_kept_and_flipped_through(visit, server):
    tab = show(visit, server)
    page = tab.page
    first = asked(page, "Say something")["text"]
    press(page, "Try again")
    page.wait_for_function(f"first => {TURNS}[0].text != first", arg=first)
    idle(page)
    (second,) = turns(page)
    assert page.locator("#log .flip").inner_text() == "2 of 2"
    press(page, "Previous draft")
    assert said(page)[1].split() == first.split() and turns(page)[0]["text"] == first
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Previous draft"
    asked(page, "And on?")  # goes on from the first
    page.reload()
    assert turns(page)[0]["text"] == first and len(turns(page)) == 2
    press(page, "Next draft")
    assert [turn["text"] for turn in turns(page)] == [second["text"]]
    press(page, "Next draft")  # round
    assert len(turns(page)) == 2
    assert tab.reported == []


def test_an_edited_question_is_a_branch(visit, server):
    tab = show(visit, server)
    page = tab.page
    asked(page, "One")
    asked(page, "Two")
    whole = turns(page)
    press(page, "Edit")
    assert page.evaluate("document.activeElement.value") == "One"
    page.keyboard.press("Escape")
    assert page.locator("#log textarea").count() == 0 and turns(page) == whole
    press(page, "Edit")
    page.keyboard.press("Control+A")
    page.keyboard.insert_text("Another")
    page.keyboard.press("Enter")
    page.wait_for_function(f"() => {TURNS}[0].ask == 'Another'")
    idle(page)
    (turn,) = turns(page)
    assert turn["text"] == reply(server, [{"role": "user", "content": "Another"}])
    press(page, "Previous question")
    assert turns(page) == whole and said(page)[0] == "One"
    press(page, "Edit", 1)  # the second question, which has a branch of its own
    page.keyboard.press("Control+A")
    page.keyboard.insert_text("Deeper")
    press(page, "Send")
    page.wait_for_function(f"() => {TURNS}[1]?.ask == 'Deeper'")
    idle(page)
    page.reload()
    assert [turn["ask"] for turn in turns(page)] == ["One", "Deeper"]
    assert tab.reported == []


def test_an_answer_is_changed_only_where_the_operator_allows_it(visit, server, files):
    page = show(visit, server).page
    asked(page, "May I?")
    assert page.get_by_role("button", name="Edit answer").count() == 0
    with running(*files, ctx=8192, max_tokens=8, allow_edit=True) as allowing:
        tab = show(visit, allowing)
        page = tab.page
        own = asked(page, "May I?")["text"]
        press(page, "Edit answer")
        page.keyboard.press("Control+A")
        page.keyboard.insert_text("In my words.")
        press(page, "Keep")
        (turn,) = turns(page)
        assert (turn["text"], turn["edited"]) == ("In my words.", True)
        assert page.locator("#log .edited").inner_text() == "Changed by hand"
        history = [("user", "May I?"), ("assistant", "In my words."), ("user", "Then?")]
        messages = [{"role": role, "content": content} for role, content in history]
        assert asked(page, "Then?")["text"] == reply(allowing, messages)
        page.reload()
        assert page.locator("#log .edited").count() == 1
        press(page, "Previous draft")
        assert turns(page)[0]["text"] == own and "edited" not in turns(page)[0]
        assert tab.reported == []


def test_a_deleted_conversation_comes_back(visit, server):
    page = show(visit, server, FULL).page
    page.locator("#chats .drop").first.click()
    assert titles(page) == ["Compared"]
    page.click("#undo")
    assert titles(page) == ["A talk", "Compared"] and page.is_hidden("#undo")
    assert page.evaluate(f"{CHATS}.map(chat => chat.title)") == ["A talk", "Compared"]
    assert said(page)[0] == "A question"


def test_conversations_leave_as_a_file_and_come_back(visit, server, tmp_path):
    page = show(visit, server, FULL).page
    with page.expect_download() as caught:
        page.click("#export")
    file = tmp_path / "talks.json"
    caught.value.save_as(file)
    facts = json.loads(file.read_text())
    assert [chat["title"] for chat in facts["chats"]] == ["A talk", "Compared"]
    tab = show(visit, server)
    page = tab.page
    assert page.is_disabled("#export")
    page.set_input_files("#file", file)
    page.wait_for_function(f"() => {CHATS}.length == 2")
    assert titles(page) == ["A talk", "Compared"] and said(page)[0] == "A question"
    page.set_input_files("#file", file)  # once more: beside the others
    page.wait_for_function(f"() => new Set({CHATS}.map(chat => chat.id)).size == 4")
    for wrong in ("{", "[]", '{"safegene_chats": 1, "chats": [1, {"id": "a", "next": "x"}]}'):
        file.write_text(wrong)
        page.set_input_files("#file", file)
        page.wait_for_selector("#notice")
        assert "no conversations" in page.inner_text("#notice")
        assert len(titles(page)) == 4
        page.evaluate("document.getElementById('notice').hidden = true")
    assert tab.reported == []


def test_a_hostile_file_gives_text_alone(visit, server, tmp_path):
    turn = {"ask": HOSTILE, "drafts": [{"text": HOSTILE, "note": HOSTILE, "speed": HOSTILE}]}
    options = {"temperature": 99, "top_p": "x", "gene": "off", "max_tokens": 5}
    chat = {"id": "__proto__", "title": HOSTILE, "next": [turn], "at": -7, "options": options}
    file = tmp_path / "bad.json"
    file.write_text(json.dumps({"safegene_chats": 1, "chats": [chat]}))
    tab = show(visit, server)
    tab.page.set_input_files("#file", file)
    tab.page.wait_for_function(f"() => {CHATS}.length == 1")
    assert tab.page.evaluate("window.bad") is None and tab.page.locator("script").count() == 1
    assert tab.page.evaluate(f"{CHATS}[0].options") == {"max_tokens": 5}
    assert tab.reported == []


def test_system_prompt_and_sampling_go_with_the_question(visit, server):
    tab = show(visit, server)
    page = tab.page
    page.click("#tune")
    page.fill("#system", "Be brief.")
    page.fill("#max_tokens", "3")
    page.fill("#temperature", "0")
    press(page, "Keep")
    text = asked(page, "Tell me")["text"]
    name = server.ask("GET", "/v1/models").json["data"][0]["id"]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tell me"}]
    said_there = server.post(CHAT, {"model": name, "messages": messages, "max_tokens": 3}).json
    assert text == said_there["choices"][0]["message"]["content"]
    page.reload()
    assert "set" in page.get_attribute("#tune", "class")
    page.click("#tune")
    assert page.input_value("#system") == "Be brief." and page.input_value("#max_tokens") == "3"
    page.fill("#max_tokens", "25")  # the operator's limit is 24
    press(page, "Keep")
    assert page.is_visible("#tuning")  # the browser holds the field to it
    press(page, "Cancel")
    assert page.is_hidden("#tuning")
    assert tab.reported == []


def test_the_speed_is_shown(visit, server):
    page = show(visit, server).page
    turn = asked(page, "How fast?")
    assert re.fullmatch(r"\d+ tokens, \d+\.\d a second", turn["speed"])
    assert turn["speed"] in page.inner_text("#log .answer")


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
BRANCHED = {
    "id": "c", "title": "Branched", "at": 1, "next": [
        {"ask": "First", "at": 0, "drafts": [{"text": "An answer"}]},
        {"ask": "Second", "at": 1, "drafts": [
            {"text": "The model's"},
            {"text": "Mine", "edited": True, "speed": "12 tokens, 40.1 a second", "next": [
                {"ask": "And on", "drafts": [{"text": "So it goes", "note": "Stopped."}]}]},
        ]},
    ],
}  # fmt: skip


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("what", ["empty", "talk", "compared", "menu", "settings"])
def test_axe_finds_no_fault(visit, server, what, width, dark):
    chats = None if what == "empty" else [*FULL, BRANCHED]
    page = show(visit, server, chats, width=width, dark=dark).page
    if what == "compared":
        page.evaluate("document.querySelectorAll('#chats .open')[1].click()")
        assert page.locator("#log .side").count() == 2
    if what == "settings":
        page.click("#tune")
    if what == "talk":  # with drafts, an edited answer, a box to edit in, and what was deleted
        page.evaluate("document.querySelectorAll('#chats .open')[2].click()")
        press(page, "Edit")
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
