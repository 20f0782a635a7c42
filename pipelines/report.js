"use strict";
// All text of the data goes into the page through textContent: it can never become markup.
const DATA = JSON.parse(document.getElementById("data").textContent);
const PLAIN = 0;
const CHUNK = 40; // cards made at once: a page of thousands opens as fast as one of forty

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.filter((child) => child !== null));
  return node;
}

function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function number(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e6)) return value.toExponential(1);
  return value.toLocaleString("en", { maximumFractionDigits: size >= 100 ? 0 : size >= 10 ? 1 : 3 });
}

const signed = (value) => (value >= 0 ? "+" : "−") + Math.abs(value).toFixed(2);
const percent = (value) => (100 * value).toFixed(1) + " %";

// --- filters ---

const correctness = (rollout) => (rollout.correct === null ? "unscored" : rollout.correct ? "yes" : "no");
const routesOf = (rollout) => [...new Set(rollout.pieces.map((piece) => DATA.paints[piece[1]]))];
const FILTERS = {
  correct: { label: "Correct", of: (rollout) => [correctness(rollout)] },
  route: { label: "Tokens", of: (rollout) => routesOf(rollout) },
  type: { label: "Type", of: (rollout) => [rollout.type ?? "no type"] },
  annotator: { label: "Annotator", of: (rollout) => [rollout.annotator ?? "not annotated"] },
  status: { label: "Annotation", of: (rollout) => [rollout.status ?? "not annotated"] },
  verdict: { label: "Verdict", of: (rollout) => [rollout.verdict] },
  step: { label: "Policy step", of: (rollout) => [String(rollout.step)] },
};

function buildFilters() {
  for (const [name, { label, of }] of Object.entries(FILTERS)) {
    const counts = new Map();
    for (const rollout of DATA.rollouts)
      for (const value of of(rollout)) counts.set(value, (counts.get(value) ?? 0) + 1);
    const values = [...counts.keys()];
    if (name !== "step") values.sort();
    const options = values.map((value) => el("option", { value }, `${value} (${counts.get(value)})`));
    const select = el("select", { name, "aria-label": label }, el("option", { value: "" }, label), ...options);
    select.hidden = values.length < 2;
    document.getElementById("selects").append(select);
  }
}

function setHash(change) {
  const hash = new URLSearchParams(location.hash.slice(1));
  for (const [name, value] of Object.entries(change)) value ? hash.set(name, value) : hash.delete(name);
  history.replaceState(null, "", `#${hash}`);
  applyHash();
}

function haystack(rollout) {
  const problem = DATA.problems[rollout.problem_id].problem;
  rollout.haystack ??= [problem, rollout.id, textOf(rollout)].join("\n").toLowerCase();
  return rollout.haystack;
}

function applyHash() {
  const hash = new URLSearchParams(location.hash.slice(1));
  const text = (hash.get("q") ?? "").toLowerCase();
  document.getElementById("q").value = hash.get("q") ?? "";
  const active = Object.entries(FILTERS).filter(([name]) => hash.get(name));
  for (const select of document.querySelectorAll("#filters select")) {
    select.value = hash.get(select.name) ?? "";
    select.classList.toggle("set", Boolean(select.value));
    if (select.value) select.hidden = false;
  }
  shown = DATA.rollouts.filter(
    (rollout) =>
      active.every(([name, { of }]) => of(rollout).includes(hash.get(name))) &&
      (!text || haystack(rollout).includes(text)),
  );
  restart();
}

// --- rollouts ---

const list = document.getElementById("list");
const groups = new Map(); // group id -> all its rollouts, filtered out or not
let shown = [], made = 0, current = -1, section = null;

function restart() {
  list.replaceChildren();
  [made, current, section] = [0, -1, null];
  const total = DATA.rollouts.length;
  const some = shown.length === total ? `${number(total)} rollouts` : `${shown.length} of ${total} rollouts`;
  document.getElementById("count").textContent = some;
  if (!shown.length) list.append(el("p", { class: "empty" }, "No rollout matches these filters."));
  makeMore();
}

function makeMore(count = CHUNK) {
  for (const rollout of shown.slice(made, made + count)) {
    if (section?.dataset.group !== rollout.group) {
      section = groupSection(rollout);
      list.append(section);
    }
    section.lastElementChild.append(card(rollout));
  }
  made = Math.min(shown.length, made + count);
}

function groupSection(rollout) {
  const problem = DATA.problems[rollout.problem_id];
  const members = groups.get(rollout.group);
  const dots = members.map((member) => {
    const state = correctness(member);
    return el("span", { class: state }, state === "yes" ? "●" : state === "no" ? "○" : "·");
  });
  const right = members.filter((member) => member.correct).length;
  const makers = [problem.source, `${rollout.policy}, step ${rollout.step}`, rollout.annotator ?? "not annotated"];
  const about = el("span", { class: "about" }, "answer ", el("b", {}, problem.answer), ` · ${makers.join(" · ")}`);
  const score = el("span", { class: "about" }, `${right} of ${members.length} right`);
  const short = members.every((member) => lines(member) <= SHORT.lines && longestLine(member) <= SHORT.width);
  return el("section", { class: short ? "group short" : "group", "data-group": rollout.group },
    el("header", {},
      el("h3", { class: "problem", dir: "auto" }, problem.problem),
      el("span", { class: "dots", title: "filled: right, hollow: wrong" }, ...dots),
      about, score),
    el("div", { class: "cards" }));
}

// Short responses stand two by two.
const SHORT = { lines: 14, width: 34 };
const textOf = (rollout) => rollout.pieces.map((piece) => piece[0]).join("");
const lines = (rollout) => textOf(rollout).split("\n").length;
const longestLine = (rollout) => Math.max(...textOf(rollout).split("\n").map((line) => line.length));

function card(rollout) {
  const node = el("article", { class: "card", tabindex: "-1", id: `r-${rollout.id}` }, ribbon(rollout), response(rollout), facts(rollout));
  node.addEventListener("click", () => select([...list.querySelectorAll(".card")].indexOf(node), false));
  return node;
}

function ribbon(rollout) {
  const total = rollout.pieces.reduce((sum, piece) => sum + piece[0].length, 0) || 1;
  const strip = svg("svg", { class: "ribbon", viewBox: `0 0 ${total} 1`, preserveAspectRatio: "none", "aria-hidden": "true" });
  let at = 0;
  for (const [text, paint] of rollout.pieces) {
    if (paint !== PLAIN) strip.append(svg("rect", { class: DATA.paints[paint], x: at, width: text.length, height: 1 }));
    at += text.length;
  }
  return strip;
}

function response(rollout) {
  const kinds = new Map(rollout.spans.map((span) => [span.rank, span.kind]));
  const body = el("pre", { class: "response" });
  for (const [text, paint, rank, segment] of rollout.pieces) {
    if (segment !== null) body.append(el("sup", {}, String(segment)));
    const span = el("span", paint === PLAIN ? {} : { class: `p-${DATA.paints[paint]}` }, text);
    if (rank >= 0) span.title = `span ${rank} · ${kinds.get(rank)} · ${DATA.paints[paint]}`;
    else if (paint !== PLAIN) span.title = `outside spans · ${DATA.paints[paint]}`;
    body.append(span);
  }
  return body;
}

function facts(rollout) {
  const state = correctness(rollout);
  const word = { yes: "✓ right", no: "✗ wrong", unscored: "· unscored" }[state];
  const reward = rollout.reward === null ? "no reward" : `reward ${number(rollout.reward)}`;
  const side = el("aside", { class: "facts" }, el("div", { class: "verdict" }, el("b", { class: state }, word), el("span", {}, reward)));
  const rows = el("dl");
  const row = (name, value) => {
    if (value !== null && value !== "") rows.append(el("dt", {}, name), el("dd", {}, value));
  };
  if (rollout.type !== null) side.append(el("div", {}, el("span", { class: "type", title: "diagnostic type" }, rollout.type)));
  row("advantage", rollout.advantage === null ? null : signed(rollout.advantage));
  row("coverage", rollout.coverage === null ? null : percent(rollout.coverage));
  row("answer read", rollout.parsed);
  row("verdict", rollout.verdict === "ok" ? null : rollout.verdict);
  row("annotation", rollout.status === "ok" ? null : rollout.status);
  row("tokens", `${number(rollout.tokens)} (${rollout.finish})`);
  side.append(rows);
  if (rollout.spans.length) {
    side.append(el("ol", { class: "spans" }, ...rollout.spans.map((span) => {
      const [from, to] = [span.segments[0], span.segments[span.segments.length - 1]];
      const where = from === to ? `in ${from}` : `in ${from}–${to}`;
      const kept = span.kept_tokens === null ? "" : span.kept_tokens ? `${number(span.kept_tokens)} tokens` : "dropped";
      return el("li", {}, el("b", {}, `${span.kind} ${span.rank}`), el("span", {}, where), el("span", {}, kept));
    })));
  }
  for (const [name, text] of [["annotator's answer", rollout.raw], ["why invalid", rollout.error]])
    if (text) side.append(el("details", {}, el("summary", {}, name), el("pre", {}, text)));
  side.append(el("div", { class: "id" }, rollout.id));
  return side;
}

function select(index, scroll = true) {
  if (index >= made) makeMore();
  const cards = list.querySelectorAll(".card");
  if (!cards.length) return;
  current = Math.max(0, Math.min(index, cards.length - 1));
  list.querySelector("[aria-current]")?.removeAttribute("aria-current");
  cards[current].setAttribute("aria-current", "true");
  if (!scroll) return;
  cards[current].focus({ preventScroll: true });
  cards[current].scrollIntoView({ block: "start" });
}

// --- start ---

for (const rollout of DATA.rollouts) {
  if (!groups.has(rollout.group)) groups.set(rollout.group, []);
  groups.get(rollout.group).push(rollout);
}
buildFilters();
applyHash();
document.getElementById("filters").addEventListener("submit", (event) => event.preventDefault());
document.getElementById("q").addEventListener("input", (event) => setHash({ q: event.target.value }));
document.getElementById("selects").addEventListener("change", (event) => setHash({ [event.target.name]: event.target.value }));
addEventListener("hashchange", applyHash);
addEventListener("beforeprint", () => makeMore(shown.length));
new IntersectionObserver((entries) => entries[0].isIntersecting && made < shown.length && makeMore(), { rootMargin: "1200px" })
  .observe(document.getElementById("end"));
addEventListener("keydown", (event) => {
  if (event.target.matches("input, select") || event.ctrlKey || event.metaKey || event.altKey) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const action = {
    j: () => select(current + 1),
    k: () => select(current - 1),
    "/": () => document.getElementById("q").focus(),
  }[event.key];
  if (!action) return;
  event.preventDefault();
  action();
});
