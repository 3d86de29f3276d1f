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

const state = { chats: [], now: null, models: [], running: null };

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
  document.title = `${model.id} · SafeGene Edge`;
}

/** One answer, streamed: `onText` gets the text so far. Returns why it ended. */
async function answer(model, messages, options, signal, onText) {
  const body = JSON.stringify({ model, messages, stream: true, ...options });
  const response = await fetch("/v1/chat/completions", { method: "POST", headers: headers(), body, signal });
  if (!response.ok) throw await fault(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "", rest = "", reason = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.slice("data: ".length);
      if (data === "[DONE]") return reason;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      const [choice] = chunk.choices;
      reason = choice?.finish_reason || reason;
      text += choice?.delta?.content || "";
      onText(text);
    }
  }
  throw new Error("The answer was cut off.");
}

function wantKey() {
  if (!$("lock").open) $("lock").showModal();
}

// -- conversations ------------------------------------------------------------

// A chat: {id, title, turns}; a turn: {ask, text, note} and, where compared, {bare, bareNote}.

function load() {
  try {
    const found = JSON.parse(localStorage.getItem(CHATS) || "[]");
    state.chats = found.filter((chat) => typeof chat?.id === "string" && Array.isArray(chat.turns));
  } catch {
    state.chats = [];
  }
}

function save() {
  const kept = state.chats.filter((chat) => chat.turns.length);
  for (let n = kept.length; n >= 0; n -= 1) {
    try {
      localStorage.setItem(CHATS, JSON.stringify(kept.slice(0, n)));
      return;
    } catch {
      // storage is full: the oldest goes
    }
  }
}

function newChat() {
  stop();
  const id = Math.random().toString(36).slice(2);
  state.now = { id, title: "", turns: [] };
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
  save();
  say("Conversation deleted.");
  if (chat === state.now) newChat();
  else drawSide();
  (document.querySelectorAll("#chats .open")[place] || $("new")).focus();
}

/** The messages that a model is asked with: the answers are its own, where it gave some. */
function messagesFor(turns, bare) {
  const messages = [];
  for (const turn of turns) {
    messages.push({ role: "user", content: turn.ask });
    const said = bare && turn.bare !== undefined ? turn.bare : turn.text;
    if (turn !== turns[turns.length - 1]) messages.push({ role: "assistant", content: said });
  }
  return messages;
}

async function ask(text) {
  const chat = state.now;
  if (!state.chats.includes(chat)) state.chats.unshift(chat);
  chat.title ||= text.slice(0, 60);
  const turn = { ask: text, text: "" };
  if (comparing()) turn.bare = "";
  chat.turns.push(turn);
  await run(chat, turn, {});
}

async function again() {
  const chat = state.now, turn = chat.turns[chat.turns.length - 1];
  Object.assign(turn, { text: "", note: "", fault: "" });
  delete turn.bare;
  if (comparing()) Object.assign(turn, { bare: "", bareNote: "", bareFault: "" });
  await run(chat, turn, { temperature: AGAIN });
}

const pressed = () => $("compare").getAttribute("aria-pressed") === "true";
const comparing = () => state.models.length > 1 && pressed();

/** Ask for one answer, or for two side by side, and show them as they come. */
async function run(chat, turn, options) {
  const controller = new AbortController();
  const mine = (state.running = { controller });
  const both = turn.bare !== undefined;
  draw();
  setBusy(true);
  say("Answering.");
  const one = async (model, kind) => {
    const name = (suffix) => (kind ? `bare${suffix}` : suffix.toLowerCase());
    const said = document.querySelector(`#log .turn:last-child .said[data-kind="${kind}"]`);
    const show = painter(said);
    try {
      const messages = messagesFor(chat.turns, Boolean(kind));
      const reason = await answer(model, messages, options, controller.signal, (text) => {
        turn[kind || "text"] = text;
        show(text);
      });
      turn[name("Note")] = reason === "length" ? "The answer reached its limit." : "";
    } catch (error) {
      if (controller.signal.aborted) turn[name("Note")] = "Stopped.";
      else turn[name("Fault")] = error instanceof TypeError ? "The server cannot be reached." : error.message;
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
  say(turn.fault || (both ? `With the gene: ${turn.text} Without: ${turn.bare}` : turn.text) || turn.note || "No answer.");
}

function stop() {
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

function draw() {
  drawSide();
  const turns = state.now.turns;
  $("log").replaceChildren(...(turns.length ? turns.flatMap(drawTurn) : [hello()]));
  $("log").scrollTop = $("log").scrollHeight;
}

function drawSide() {
  $("chats").replaceChildren(
    ...state.chats.filter((chat) => chat.turns.length).map((chat) => {
      const open = el("button", { type: "button", className: "open", title: chat.title }, chat.title);
      if (chat === state.now) open.setAttribute("aria-current", "true");
      open.addEventListener("click", () => openChat(chat));
      const drop = el("button", { type: "button", className: "drop", "aria-label": `Delete “${chat.title}”` });
      drop.append(icon("M6 6l12 12M18 6L6 18"));
      drop.addEventListener("click", () => dropChat(chat));
      return el("li", { className: chat === state.now ? "now" : "" }, open, drop);
    }),
  );
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

function drawTurn(turn, place, turns) {
  const last = place === turns.length - 1;
  const user = el(
    "article",
    { className: turn.bare === undefined ? "turn user" : "turn user broad", "aria-label": "You" },
    el("div", { className: "said" }, turn.ask),
  );
  const tools = () => [last && !state.running ? action("Try again", again) : null];
  const one = (kind, text, note, failed) => {
    const said = el("div", { className: "said" }, ...markdown(text));
    said.dataset.kind = kind;
    const copy = text ? action("Copy", (event) => copyText(text, event.target)) : null;
    const row = el("div", { className: "tools" }, state.running && last ? null : copy, ...(kind ? [] : tools()));
    if (note) row.append(el("span", { className: "note" }, note));
    return [said, failed ? el("p", { className: "fault", role: "alert" }, failed) : null, row];
  };
  const own = one("", turn.text, turn.note, turn.fault);
  if (turn.bare === undefined) {
    return [user, el("article", { className: "turn answer", "aria-label": "Answer" }, ...own)];
  }
  const side = (name, label, off, children) =>
    el("section", { className: `side ${name}`, "aria-label": label },
      el("p", { className: off ? "badge off" : "badge" }, label), ...children);
  const pair = el(
    "article",
    { className: "turn answer pair", "aria-label": "Two answers" },
    side("without", "without the gene", true, one("bare", turn.bare, turn.bareNote, turn.bareFault)),
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
  fit();
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
addEventListener("pagehide", () => state.running && save()); // what came so far
addEventListener("storage", (event) => {
  if (event.key !== CHATS || state.running) return; // another tab has written
  load();
  state.now = state.chats.find((chat) => chat.id === state.now.id) || state.now;
  draw();
});

async function start() {
  try {
    await loadModels();
    if (!state.now.turns.length) draw();
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
