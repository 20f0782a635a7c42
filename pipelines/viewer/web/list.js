// The list of rollouts: it scrolls over all matches, but the document holds only the visible rows.

const ROW_HEIGHT = 52; // pixels, as in the style
const MARGIN = 8; // rows drawn above and below the visible ones
const FETCHED = 100; // rows per request
const KEPT = 40; // requests whose rows stay in memory

const list = byId("list");
const spacer = el("div", { class: "spacer", role: "presentation" });
list.append(spacer);
let query = { filters: {}, q: "", sort: "" };
let total = 0, current = -1, generation = 0;
let fetched = new Map(); // index of a request → promise of its rows

// The rows of one request, from a place on; null if another query has replaced this one.
async function rowAt(place) {
  const piece = Math.floor(place / FETCHED), mine = generation;
  if (!fetched.has(piece)) {
    fetched.set(piece, SOURCE.rows(query, piece * FETCHED, FETCHED));
    if (fetched.size > KEPT) fetched.delete(fetched.keys().next().value);
  }
  const { rows } = await fetched.get(piece);
  return mine === generation ? rows[place - piece * FETCHED] : null;
}

async function showQuery(next) {
  const mine = ++generation;
  query = next;
  [fetched, current] = [new Map(), -1];
  list.setAttribute("aria-busy", "true");
  const first = SOURCE.rows(query, 0, FETCHED);
  const answer = await first;
  if (mine !== generation) return false;
  fetched.set(0, first);
  total = answer.total;
  spacer.style.height = `${total * ROW_HEIGHT}px`;
  spacer.replaceChildren();
  list.scrollTop = 0;
  list.removeAttribute("aria-activedescendant");
  list.removeAttribute("aria-busy");
  byId("none").hidden = total > 0;
  draw();
  return true;
}

function draw() {
  const first = Math.max(0, Math.floor(list.scrollTop / ROW_HEIGHT) - MARGIN);
  const last = Math.min(total, Math.ceil((list.scrollTop + list.clientHeight) / ROW_HEIGHT) + MARGIN);
  for (const node of [...spacer.children]) {
    const place = Number(node.dataset.place);
    if (place < first || place >= last) node.remove();
  }
  const made = new Set([...spacer.children].map((node) => Number(node.dataset.place)));
  for (let place = first; place < last; place++) if (!made.has(place)) spacer.append(option(place));
}

function option(place) {
  const node = el("div", {
    class: "row", role: "option", id: `row-${place}`, "data-place": place,
    "aria-posinset": place + 1, "aria-setsize": total, "aria-selected": String(place === current),
  });
  node.style.top = `${place * ROW_HEIGHT}px`;
  rowAt(place).then((row) => row && node.append(...rowContent(row)));
  return node;
}

const MARK = { yes: ["✓", "right"], no: ["✗", "wrong"], unscored: ["·", "unscored"] };

function mark(correct) {
  const [sign, word] = MARK[correct];
  return el("span", { class: `mark ${correct}`, role: "img", "aria-label": word, title: word }, sign);
}

function rowContent(row) {
  const details = [`sample ${row.sample}`];
  if (row.step) details.unshift(`step ${row.step}`);
  if (!COMPARED) details.push(facet(row, "type"), facet(row, "route"));
  else if (row.disagreement === null) details.push("not comparable");
  else details.push(facet(row, "types") === "differ" ? "types differ" : facet(row, facet(row, "type") === "no type" ? "type_b" : "type"));
  return [
    mark(facet(row, "correct")),
    el("span", { class: "what" }, row.problem),
    el("span", { class: "how" }, details.filter(Boolean).join(" · ")),
    COMPARED ? meter(row) : null,
  ].filter(Boolean);
}

// The share of all marked characters that only one annotator marks.
function meter(row) {
  if (row.disagreement === null) return el("span", { class: "meter none", title: "not comparable" }, "–");
  const apart = row.disagreement - (facet(row, "types") === "differ" ? 1 : 0);
  const bar = svg("svg", { viewBox: "0 0 100 1", preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("rect", { width: Math.max(0, 100 * apart), height: 1 }));
  return el("span", { class: "meter", title: "marked by one annotator alone, of all that is marked" }, bar, percent(Math.max(0, apart), 0));
}

// Selects a place of the list; returns its row, or null if it has none.
async function choose(place) {
  if (!total) return null;
  place = Math.max(0, Math.min(place, total - 1));
  current = place;
  const [top, bottom] = [place * ROW_HEIGHT, (place + 1) * ROW_HEIGHT];
  if (top < list.scrollTop) list.scrollTop = top;
  if (bottom > list.scrollTop + list.clientHeight) list.scrollTop = bottom - list.clientHeight;
  draw();
  for (const node of spacer.children) node.setAttribute("aria-selected", String(Number(node.dataset.place) === place));
  list.setAttribute("aria-activedescendant", `row-${place}`);
  return rowAt(place);
}

list.addEventListener("scroll", draw, { passive: true });
new ResizeObserver(draw).observe(list);
