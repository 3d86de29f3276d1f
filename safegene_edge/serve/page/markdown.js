// Markdown as DOM nodes. Nothing is ever parsed as HTML: text becomes text nodes, and the only
// attribute that takes a value from the text is the address of a link, after a check.

/** An element with properties, and children that are nodes or text. */
export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

const INLINE = new RegExp(
  [
    "\\\\([\\\\`*_{}\\[\\]()#+.!|>~-])", // 1: an escape
    "(?<!(?<!\\\\)`)(`+)(?!`)([^]*?[^`])\\2(?!`)", // 2, 3: code, between whole runs: parts of them cost minutes
    "\\*\\*(?=\\S)([^]*?\\S)\\*\\*", // 4: strong
    "(?<![\\w*])[*_](?=[^\\s*_])([^*_\\n]*?[^\\s*_])[*_](?![\\w*])", // 5: emphasis
    "~~(?=\\S)([^]*?\\S)~~", // 6: struck out
    "!?\\[([^\\[\\]\\n]*)\\]\\(<?([^\\s()<>]*(?:\\([^\\s()]*\\)[^\\s()<>]*)*)>?(?:\\s+[\"'][^\"'\\n]*[\"'])?\\)", // 7, 8
    "(https?://[^\\s<>()\\[\\]\"'`]*[^\\s<>()\\[\\]\"'`.,;:!?])", // 9: an address
  ].join("|"),
  "g",
);

/** Text with inline markdown, as nodes. */
function inline(text, depth = 0) {
  if (depth > 6) return [text];
  const nodes = [];
  let end = 0;
  for (const found of text.matchAll(INLINE)) {
    if (found.index > end) nodes.push(text.slice(end, found.index));
    end = found.index + found[0].length;
    const [whole, escaped, , code, strong, emphasis, struck, label, target, address] = found;
    if (escaped) nodes.push(escaped);
    else if (code !== undefined) nodes.push(el("code", {}, code.replace(/^ (.*) $/s, "$1")));
    else if (strong) nodes.push(el("strong", {}, ...inline(strong, depth + 1)));
    else if (emphasis) nodes.push(el("em", {}, ...inline(emphasis, depth + 1)));
    else if (struck) nodes.push(el("del", {}, ...inline(struck, depth + 1)));
    else if (address) nodes.push(link(address, [address], whole));
    else nodes.push(link(target, inline(label || target, depth + 1), whole));
  }
  if (end < text.length) nodes.push(text.slice(end));
  return nodes;
}

/** A link where the address is a web or mail address; otherwise the text as it was written. */
function link(target, children, whole) {
  let url;
  try {
    url = new URL(target);
  } catch {
    return whole;
  }
  if (!["http:", "https:", "mailto:"].includes(url.protocol)) return whole;
  return el("a", { href: url.href, target: "_blank", rel: "noopener noreferrer nofollow" }, ...children);
}

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)[^`]*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const HEAD = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/;
const CELLS = /^\s*\|?(\s*:?-+:?\s*\|)+\s*(:?-+:?\s*)?$/;

let level = 1; // of the last heading

/** Lines of markdown as nodes. */
function blocks(lines, depth = 0) {
  const nodes = [];
  let i = 0;
  while (i < lines.length) {
    const line = lines[i];
    let found;
    if (!line.trim()) i += 1;
    else if ((found = FENCE.exec(line))) {
      let last = i + 1;
      while (last < lines.length && !lines[last].trim().startsWith(found[1])) last += 1;
      nodes.push(codeBlock(lines.slice(i + 1, last).join("\n"), found[2]));
      i = last + 1;
    } else if ((found = HEAD.exec(line))) {
      level = Math.min(found[1].length + 1, level + 1, 4); // no level is left out
      nodes.push(el(`h${level}`, {}, ...inline(found[2])));
      i += 1;
    } else if (RULE.test(line)) {
      nodes.push(el("hr"));
      i += 1;
    } else if (line.startsWith(">") && depth < 5) {
      let last = i;
      while (last < lines.length && lines[last].startsWith(">")) last += 1;
      const inner = lines.slice(i, last).map((quoted) => quoted.replace(/^> ?/, ""));
      nodes.push(el("blockquote", {}, ...blocks(inner, depth + 1)));
      i = last;
    } else if (ITEM.test(line) && depth < 5) {
      const [list, last] = listBlock(lines, i, depth);
      nodes.push(list);
      i = last;
    } else if (line.includes("|") && CELLS.test(lines[i + 1] || "")) {
      let last = i + 2;
      while (last < lines.length && lines[last].includes("|")) last += 1;
      nodes.push(tableBlock([line, ...lines.slice(i + 2, last)]));
      i = last;
    } else {
      let last = i + 1;
      while (last < lines.length && lines[last].trim() && !startsBlock(lines[last])) last += 1;
      const parts = lines.slice(i, last).flatMap((part, n) => (n ? [el("br"), part.trim()] : [part.trim()]));
      nodes.push(el("p", {}, ...joined(parts)));
      i = last;
    }
  }
  return nodes;
}

const startsBlock = (line) =>
  FENCE.test(line) || HEAD.test(line) || ITEM.test(line) || RULE.test(line) || line.startsWith(">");

/** Inline markdown may go over a line's end, so lines are parsed together. */
function joined(parts) {
  const text = parts.map((part) => (typeof part === "string" ? part : "\n")).join("");
  return inline(text).flatMap((node) =>
    typeof node === "string" ? node.split("\n").flatMap((piece, n) => (n ? [el("br"), piece] : [piece])) : [node],
  );
}

function listBlock(lines, start, depth) {
  const [, indent, mark] = ITEM.exec(lines[start]);
  const ordered = /\d/.test(mark);
  const list = el(ordered ? "ol" : "ul", ordered ? { start: parseInt(mark, 10) } : {});
  let i = start;
  while (i < lines.length) {
    const item = ITEM.exec(lines[i]);
    if (!item || item[1].length > indent.length + 1 || /\d/.test(item[2]) !== ordered) break;
    if (item[1].length < indent.length) break;
    const inner = [item[3]];
    const width = indent.length + 2;
    i += 1;
    while (i < lines.length) {
      const deeper = lines[i].search(/\S/) >= width;
      const blank = !lines[i].trim() && (lines[i + 1] || "").search(/\S/) >= width;
      if (!deeper && !blank) break;
      inner.push(lines[i].slice(width));
      i += 1;
    }
    const nodes = blocks(inner, depth + 1);
    const [first] = nodes;
    if (first && first.tagName === "P") nodes.splice(0, 1, ...first.childNodes);
    list.append(el("li", {}, ...nodes));
    if (!(lines[i] || "").trim() && ITEM.test(lines[i + 1] || "")) i += 1;
  }
  return [list, i];
}

function tableBlock(rows) {
  const cells = (row) => row.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const [head, ...body] = rows.map(cells);
  const row = (tag, values) => el("tr", {}, ...values.map((value) => el(tag, {}, ...inline(value))));
  const table = el("table", {}, el("thead", {}, row("th", head)), el("tbody", {}, ...body.map((b) => row("td", b))));
  return el("div", { className: "grid", tabIndex: 0, role: "group", "aria-label": "Table" }, table);
}

function codeBlock(text, language) {
  const copy = el("button", { type: "button" }, "Copy");
  copy.addEventListener("click", () => copyText(text, copy));
  const label = language ? `Code, ${language}` : "Code";
  const pre = el("pre", { tabIndex: 0, role: "group", "aria-label": label }, el("code", {}, text));
  return el("div", { className: "code" }, el("div", {}, el("span", {}, language || "code"), copy), pre);
}

/** Copy, and say on the button that it was done. */
export async function copyText(text, button) {
  const before = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed";
  }
  setTimeout(() => (button.textContent = before), 1500);
}

/** Markdown as nodes: text nodes and a few harmless elements, whatever was written. */
export function markdown(text) {
  level = 1;
  return blocks(text.replaceAll("\r\n", "\n").split("\n"));
}
