// The chat page. Everything that a model or a person wrote becomes a text node, never markup.

import { copyText, el, markdown } from "/markdown.js";

const $ = (id) => document.getElementById(id);
const CHATS = "safegene.chats", THEME = "safegene.theme", COMPARE = "safegene.compare";
const IDEAS = [
  "Explain how rainbows form, for a ten-year-old.",
  "Write a short, friendly email that declines an invitation.",
  "Give me three ideas for a rainy Sunday.",
  "What makes a good password?",
];
const AGAIN = 0.8; // the temperature of another try: the same one would give the same answer
const LIMITS = { temperature: [0, 2], top_p: [0, 1], max_tokens: [1, 1 << 20] }; // the server may have lower ones

const state = { chats: [], now: null, models: [], running: null, dropped: null, editing: null };

function icon(path) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
  line.setAttribute("d", path);
  svg.append(line);
  return svg;
}

// -- the server ---------------------------------------------------------------

function headers() {
  const key = sessionStorage.getItem("safegene.key");
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

async function fault(response) {
  if (response.status === 401) wantKey();
  const body = await response.json().catch(() => null);
  return new Error(body?.error?.message || `The server answered ${response.status}.`);
}

async function loadModels() {
  const response = await fetch("/v1/models", { headers: headers() });
  if (!response.ok) throw await fault(response);
  state.models = (await response.json()).data;
  const [model, bare] = state.models;
  $("model").textContent = $("model").title = model.id;
  $("gene").textContent = model.gene;
  $("gene").classList.toggle("off", model.gene === "no-gene");
  $("compare").hidden = !bare;
  const { max_tokens: most, temperature } = model.limits;
  LIMITS.max_tokens[1] = $("max_tokens").max = most;
  $("max_tokens").placeholder = most;
  $("temperature").placeholder = temperature;
  document.title = `${model.id} · SafeGene Edge`;
}

/** One answer, streamed: `onText` gets the text so far. Returns why it ended, and how fast it was. */
async function answer(model, messages, options, signal, onText) {
  const usage = { stream: true, stream_options: { include_usage: true } };
  const body = JSON.stringify({ model, messages, ...usage, ...options });
  const response = await fetch("/v1/chat/completions", { method: "POST", headers: headers(), body, signal });
  if (!response.ok) throw await fault(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "", rest = "", reason = "", begun = 0, speed = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.slice("data: ".length);
      if (data === "[DONE]") return { reason, speed };
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      const [choice] = chunk.choices;
      if (choice?.delta?.content) begun ||= performance.now();
      if (chunk.usage) speed = speedOf(chunk.usage.completion_tokens, performance.now() - begun);
      reason = choice?.finish_reason || reason;
      text += choice?.delta?.content || "";
      onText(text);
    }
  }
  throw new Error("The answer was cut off.");
}

/** Tokens a second, without the first: its time is the prompt's. */
function speedOf(tokens, milliseconds) {
  const count = tokens === 1 ? "1 token" : `${tokens} tokens`;
  return tokens > 1 && milliseconds > 0 ? `${count}, ${((1000 * (tokens - 1)) / milliseconds).toFixed(1)} a second` : count;
}

function wantKey() {
  if (!$("lock").open) $("lock").showModal();
}

// -- conversations ------------------------------------------------------------

// A chat: {id, title, system, options, next, at}. A turn: {ask, drafts, at}. A draft: {text, note, fault,
// speed, edited, next, at} and, where compared, {bare, bareNote, bareFault}. `next` holds the turns that go on
// from there, of which `at` is shown: an edited question is another turn, another try another draft.

const shown = (holder) => holder.next[holder.at];
const draftOf = (turn) => turn.drafts[turn.at];
const newDraft = (more) => ({ text: "", note: "", fault: "", next: [], at: 0, ...more });

/** What is shown of a chat: each turn with its draft and with what it goes on from. */
function path(chat) {
  const found = [];
  for (let holder = chat, turn; (turn = shown(holder)); holder = draftOf(turn)) {
    found.push({ holder, turn, draft: draftOf(turn) });
  }
  return found;
}

/** A chat out of storage or of a file: known fields alone, of the right types; null where it is none. */
function read(value) {
  const text = (given, most = 1 << 20) => (typeof given === "string" ? given.slice(0, most) : "");
  const place = (given, list) => (Number.isInteger(given) && given >= 0 && given < list.length ? given : 0);
  const list = (given) => (Array.isArray(given) ? given : []);
  const turns = (given) => list(given).filter((one) => one && typeof one.ask === "string").map(turn);
  const draft = (given) => {
    const next = turns(given.next);
    const made = newDraft({ text: text(given.text), note: text(given.note), fault: text(given.fault), next, at: place(given.at, next) });
    if (given.edited === true) made.edited = true;
    if (given.speed) made.speed = text(given.speed, 60);
    if (typeof given.bare === "string") {
      Object.assign(made, { bare: text(given.bare), bareNote: text(given.bareNote), bareFault: text(given.bareFault) });
    }
    return made;
  };
  const turn = (given) => {
    const drafts = list(given.drafts).filter((one) => one && typeof one === "object").map(draft);
    return { ask: text(given.ask), drafts: drafts.length ? drafts : [draft({ ...given, next: [] })], at: place(given.at, drafts) };
  };
  if (typeof value?.id !== "string") return null;
  let next = turns(value.next);
  if (Array.isArray(value.turns)) { // as it was kept before there were branches: a list of turns
    for (const one of turns(value.turns).reverse()) {
      one.drafts[0].next = next;
      next = [one];
    }
  }
  const options = {};
  for (const [name, [least, most]] of Object.entries(LIMITS)) {
    const given = value.options?.[name];
    if (typeof given === "number" && given >= least && given <= most) options[name] = given;
  }
  return { id: text(value.id, 80), title: text(value.title, 200), system: text(value.system), options, next, at: place(value.at, next) };
}

function load() {
  try {
    state.chats = JSON.parse(localStorage.getItem(CHATS) || "[]").map(read).filter(Boolean);
  } catch {
    state.chats = [];
  }
}

function save() {
  const kept = state.chats.filter((chat) => chat.next.length);
  for (let n = kept.length; n >= 0; n -= 1) {
    try {
      localStorage.setItem(CHATS, JSON.stringify(kept.slice(0, n)));
      return;
    } catch {
      // storage is full: the oldest goes
    }
  }
}

const newId = () => Math.random().toString(36).slice(2);

function newChat() {
  stop();
  state.now = { id: newId(), title: "", system: "", options: {}, next: [], at: 0 };
  draw();
  showSide(false);
  $("text").focus();
}

function openChat(chat) {
  stop();
  state.now = chat;
  draw();
  showSide(false);
  $("log").focus();
}

function dropChat(chat) {
  const place = state.chats.indexOf(chat);
  state.chats.splice(place, 1);
  state.dropped = { chat, place };
  save();
  say("Conversation deleted. It can be brought back.");
  if (chat === state.now) newChat();
  else drawSide();
  $("undo").hidden = false;
  (document.querySelectorAll("#chats .open")[place] || $("undo")).focus();
}

function undo() {
  const { chat, place } = state.dropped;
  state.dropped = null;
  $("undo").hidden = true;
  state.chats.splice(place, 0, chat);
  save();
  openChat(chat);
  say("Conversation brought back.");
}

/** All conversations as a file; and those of a file beside the ones that are there. */
function exportChats() {
  const kept = state.chats.filter((chat) => chat.next.length);
  const text = JSON.stringify({ safegene_chats: 1, chats: kept }, null, 2);
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  el("a", { href: url, download: "conversations.json" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
  say(counted(kept.length, "exported"));
}

async function importChats(file) {
  let found;
  try {
    const facts = JSON.parse(await file.text());
    found = facts.safegene_chats === 1 ? facts.chats.map(read).filter((chat) => chat?.next.length) : [];
  } catch {
    found = [];
  }
  if (!found.length) {
    tell("This file holds no conversations.");
    return;
  }
  for (const chat of found) chat.id = newId(); // none takes another one's place
  state.chats.unshift(...found);
  save();
  openChat(found[0]);
  say(counted(found.length, "imported"));
}

const counted = (n, done) => `${n} ${n === 1 ? "conversation" : "conversations"} ${done}.`;

/** The messages that a model is asked with: the answers are its own, where it gave some. */
function messagesFor(chat, steps, bare) {
  const messages = chat.system.trim() ? [{ role: "system", content: chat.system }] : [];
  for (const [place, { turn, draft }] of steps.entries()) {
    messages.push({ role: "user", content: turn.ask });
    const said = bare && draft.bare !== undefined ? draft.bare : draft.text;
    if (place < steps.length - 1) messages.push({ role: "assistant", content: said });
  }
  return messages;
}

/** Ask where the conversation stands; with a `holder`, in place of what goes on from there. */
async function ask(text, holder) {
  const chat = state.now;
  if (!state.chats.includes(chat)) state.chats.unshift(chat);
  chat.title ||= text.slice(0, 60);
  const end = path(chat).at(-1);
  const after = holder || (end ? end.draft : chat);
  const draft = newDraft(comparing() ? { bare: "", bareNote: "", bareFault: "" } : {});
  after.at = after.next.push({ ask: text, drafts: [draft], at: 0 }) - 1;
  await run(chat, draft, {});
}

async function again() {
  const chat = state.now, { turn } = path(chat).at(-1);
  const draft = newDraft(comparing() ? { bare: "", bareNote: "", bareFault: "" } : {});
  turn.at = turn.drafts.push(draft) - 1;
  await run(chat, draft, { temperature: chat.options.temperature || AGAIN });
}

const pressed = () => $("compare").getAttribute("aria-pressed") === "true";
const comparing = () => state.models.length > 1 && pressed();

/** Ask for one answer, or for two side by side, and show them as they come. */
async function run(chat, draft, options) {
  const controller = new AbortController();
  const mine = (state.running = { controller });
  const both = draft.bare !== undefined;
  const steps = path(chat);
  state.editing = null;
  draw();
  setBusy(true);
  say("Answering.");
  const one = async (model, kind) => {
    const name = (suffix) => (kind ? `bare${suffix}` : suffix.toLowerCase());
    const said = document.querySelector(`#log .turn:last-child .said[data-kind="${kind}"]`);
    const show = painter(said);
    try {
      const messages = messagesFor(chat, steps, Boolean(kind));
      const asked = { ...chat.options, ...options };
      const { reason, speed } = await answer(model, messages, asked, controller.signal, (text) => {
        draft[kind || "text"] = text;
        show(text);
      });
      const notes = { length: "The answer reached its limit.", content_filter: "The guard ended this answer." };
      draft[name("Note")] = notes[reason] || "";
      if (!kind) draft.speed = speed;
    } catch (error) {
      if (controller.signal.aborted) draft[name("Note")] = "Stopped.";
      else draft[name("Fault")] = error instanceof TypeError ? "The server cannot be reached." : error.message;
    }
  };
  const jobs = [one(state.models[0]?.id, "")];
  if (both) jobs.push(one(state.models[1].id, "bare"));
  await Promise.all(jobs);
  save();
  if (state.running !== mine) return;
  state.running = null;
  setBusy(false);
  if (state.now === chat) draw();
  say(draft.fault || (both ? `With the gene: ${draft.text} Without: ${draft.bare}` : draft.text) || draft.note || "No answer.");
}

function stop() {
  state.editing = null;
  state.running?.controller.abort();
  state.running = null;
  setBusy(false);
}

// -- drawing ------------------------------------------------------------------

/** Shows text as markdown, at most once a frame, and keeps the end in view. */
function painter(node) {
  let wanted = null;
  return (text) => {
    if (wanted === null) {
      requestAnimationFrame(() => {
        const log = $("log"), atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
        node.replaceChildren(...markdown(wanted));
        if (atEnd) log.scrollTop = log.scrollHeight;
        wanted = null;
      });
    }
    wanted = text;
  };
}

function draw(keep) {
  const top = $("log").scrollTop, steps = path(state.now);
  drawSide();
  $("log").replaceChildren(...(steps.length ? steps.flatMap(drawTurn) : [hello()]));
  $("log").scrollTop = keep ? top : $("log").scrollHeight;
}

function drawSide() {
  $("chats").replaceChildren(
    ...state.chats.filter((chat) => chat.next.length).map((chat) => {
      const open = el("button", { type: "button", className: "open", title: chat.title }, chat.title);
      if (chat === state.now) open.setAttribute("aria-current", "true");
      open.addEventListener("click", () => openChat(chat));
      const drop = el("button", { type: "button", className: "drop", "aria-label": `Delete “${chat.title}”` });
      drop.append(icon("M6 6l12 12M18 6L6 18"));
      drop.addEventListener("click", () => dropChat(chat));
      return el("li", { className: chat === state.now ? "now" : "" }, open, drop);
    }),
  );
  $("export").disabled = !state.chats.length;
  const set = state.now.system.trim() || Object.keys(state.now.options).length;
  $("tune").classList.toggle("set", Boolean(set));
}

function hello() {
  const ideas = IDEAS.map((idea) => {
    const button = el("button", { type: "button" }, idea);
    button.addEventListener("click", () => submit(idea));
    return el("li", {}, button);
  });
  const compare = state.models.length > 1 ? " Turn on Compare to see each answer with and without the gene." : "";
  return el(
    "div",
    { className: "hello" },
    el("img", { src: "/icon.svg", alt: "", width: 44, height: 44 }),
    el("h2", {}, "What is on your mind?"),
    el("p", {}, `The model runs on this server, and nothing that you write goes elsewhere.${compare}`),
    el("ul", {}, ...ideas),
  );
}

/** Flip through what stands beside it: `list` is a holder's turns, or a turn's drafts. */
function flip(holder, list, name) {
  if (list.length < 2 || state.running) return null;
  const alike = (label) => [...document.querySelectorAll("#log .flip button")].filter((b) => b.getAttribute("aria-label") === label);
  const go = (step) => (event) => {
    const label = event.currentTarget.getAttribute("aria-label"), which = alike(label).indexOf(event.currentTarget);
    holder.at = (holder.at + step + list.length) % list.length;
    state.editing = null;
    save();
    draw(true);
    say(`${name} ${holder.at + 1} of ${list.length}.`);
    alike(label)[which]?.focus(); // it was drawn anew
  };
  const step = (label, shape, by) => {
    const button = el("button", { type: "button", "aria-label": `${label} ${name.toLowerCase()}` });
    button.append(icon(shape));
    button.addEventListener("click", go(by));
    return button;
  };
  return el("span", { className: "flip" }, step("Previous", "M15 6l-6 6 6 6", -1),
    el("span", {}, `${holder.at + 1} of ${list.length}`), step("Next", "M9 6l6 6-6 6", 1));
}

/** A box with text to change; `done` gets the new text. */
function editor(text, label, done) {
  const close = () => {
    state.editing = null;
    draw(true);
  };
  const box = el("textarea", { className: "edit", value: text, rows: Math.min(text.split("\n").length + 1, 12), "aria-label": label });
  box.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      close();
    } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing && label === "Your message") {
      event.preventDefault();
      finish();
    }
  });
  const finish = () => {
    if (!box.value.trim()) return;
    state.editing = null;
    done(box.value.trim());
  };
  const row = el("div", { className: "tools" }, action(label === "Your message" ? "Send" : "Keep", finish), action("Cancel", close));
  return [box, row];
}

function edit(what) {
  state.editing = what;
  draw(true);
  document.querySelector("#log .edit").focus();
}

/** The operator allowed it: the answer in the user's words, beside the model's own and marked. */
function keepAnswer(turn, text) {
  turn.at = turn.drafts.push(newDraft({ text, edited: true })) - 1;
  save();
  draw(true);
  say("Answer changed by hand.");
}

function drawTurn({ holder, turn, draft }, place, steps) {
  const last = place === steps.length - 1, busy = Boolean(state.running);
  const paired = draft.bare !== undefined;
  const tools = (...children) => el("div", { className: "tools" }, ...children);
  const asking = state.editing === turn
    ? editor(turn.ask, "Your message", (text) => ask(text, holder))
    : [el("div", { className: "said" }, turn.ask),
      tools(busy ? null : action("Edit", () => edit(turn)), flip(holder, holder.next, "Question"))];
  const user = el("article", { className: `turn user${paired ? " broad" : ""}`, "aria-label": "You" }, ...asking);
  const one = (kind, text, note, failed) => {
    if (!kind && state.editing === draft) return editor(text, "The answer", (words) => keepAnswer(turn, words));
    const said = el("div", { className: "said" }, ...markdown(text));
    said.dataset.kind = kind;
    const copy = text ? action("Copy", (event) => copyText(text, event.target)) : null;
    const own = !kind && !busy;
    const row = tools(
      busy && last ? null : copy,
      own && last ? action("Try again", again) : null,
      own && !paired && state.models[0]?.allow_edit ? action("Edit answer", () => edit(draft)) : null,
      kind ? null : flip(turn, turn.drafts, "Draft"),
      draft.edited && !kind ? el("span", { className: "note edited" }, "Changed by hand") : null,
    );
    for (const words of [note, kind || busy && last ? "" : draft.speed]) {
      if (words) row.append(el("span", { className: "note" }, words));
    }
    return [said, failed ? el("p", { className: "fault", role: "alert" }, failed) : null, row];
  };
  const own = one("", draft.text, draft.note, draft.fault);
  if (!paired) {
    return [user, el("article", { className: "turn answer", "aria-label": "Answer" }, ...own)];
  }
  const side = (name, label, off, children) =>
    el("section", { className: `side ${name}`, "aria-label": label },
      el("p", { className: off ? "badge off" : "badge" }, label), ...children);
  const pair = el(
    "article",
    { className: "turn answer pair", "aria-label": "Two answers" },
    side("without", "without the gene", true, one("bare", draft.bare, draft.bareNote, draft.bareFault)),
    side("with", "with the gene", false, own),
  );
  return [user, pair];
}

function action(label, act) {
  const button = el("button", { type: "button" }, label);
  button.addEventListener("click", act);
  return button;
}

function setBusy(busy) {
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  for (const said of document.querySelectorAll("#log .turn:last-child .said")) {
    said.classList.toggle("writing", busy);
  }
}

const say = (text) => ($("status").textContent = text);

/** Say it to all, not to screen readers alone. */
function tell(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
  say(text);
}

function showSide(out) {
  $("side").classList.toggle("out", out);
  $("veil").hidden = !out;
  $("menu").setAttribute("aria-expanded", String(out));
  if (out) $("new").focus();
}

// -- what people do -----------------------------------------------------------

function submit(text) {
  if (!text.trim() || state.running) return;
  $("text").value = "";
  state.editing = null;
  fit();
  tell("");
  $("text").focus();
  ask(text.trim());
}

function fit() {
  const text = $("text");
  text.style.height = "auto";
  text.style.height = `${text.scrollHeight}px`;
  $("send").disabled = !text.value.trim();
}

const dark = () => {
  const theme = document.documentElement.dataset.theme;
  return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  $("theme").setAttribute("aria-pressed", String(dark()));
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit($("text").value);
});
$("text").addEventListener("input", fit);
$("text").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit($("text").value);
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if ($("side").classList.contains("out")) {
    showSide(false);
    $("menu").focus();
  } else if (state.running) {
    state.running.controller.abort();
  }
});
$("stop").addEventListener("click", () => {
  state.running?.controller.abort();
  $("text").focus();
});
$("new").addEventListener("click", newChat);
$("menu").addEventListener("click", () => showSide(!$("side").classList.contains("out")));
$("veil").addEventListener("click", () => showSide(false));
$("theme").addEventListener("click", () => {
  const theme = dark() ? "light" : "dark";
  localStorage.setItem(THEME, theme);
  setTheme(theme);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => setTheme());
$("compare").addEventListener("click", () => {
  const on = !pressed();
  $("compare").setAttribute("aria-pressed", String(on));
  localStorage.setItem(COMPARE, on ? "on" : "");
});
$("lock").addEventListener("close", () => {
  sessionStorage.setItem("safegene.key", $("key").value);
  $("key").value = "";
  start();
});
$("undo").addEventListener("click", undo);
$("export").addEventListener("click", exportChats);
$("import").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  const [file] = $("file").files;
  if (file) importChats(file);
  $("file").value = ""; // so that the same file can be taken again
});
$("tune").addEventListener("click", () => {
  $("system").value = state.now.system;
  for (const name of Object.keys(LIMITS)) $(name).value = state.now.options[name] ?? "";
  $("tuning").showModal();
});
$("tuned").addEventListener("submit", () => {
  const chat = state.now;
  chat.system = $("system").value;
  chat.options = {};
  for (const name of Object.keys(LIMITS)) if ($(name).value) chat.options[name] = $(name).valueAsNumber;
  save();
  draw(true);
});
$("cancel").addEventListener("click", () => $("tuning").close());
addEventListener("pagehide", () => state.running && save()); // what came so far
addEventListener("storage", (event) => {
  if (event.key !== CHATS) return; // else another tab has written
  load();
  const place = state.chats.findIndex((chat) => chat.id === state.now.id);
  if (state.running) { // what is being said here counts, of this conversation alone
    state.chats.splice(Math.max(place, 0), place < 0 ? 0 : 1, state.now);
    return;
  }
  state.now = state.chats[place] || state.now;
  draw();
});

async function start() {
  try {
    await loadModels();
    draw(true);
  } catch (error) {
    say(error.message);
    $("model").textContent = "not connected";
  }
}

setTheme(localStorage.getItem(THEME));
$("compare").setAttribute("aria-pressed", String(localStorage.getItem(COMPARE) === "on"));
load();
if (state.chats.length) {
  state.now = state.chats[0];
  draw();
} else {
  newChat();
}
fit();
start();
