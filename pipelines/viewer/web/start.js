// Handles the reader's input. The address's hash holds the query, the rollout and the theme.

const browser = byId("browser");
const SEARCH_PAUSE = 250; // ms without typing before a search begins
let hash = new URLSearchParams();
const bars = document.querySelectorAll(".bars a");
let typing = 0;

function setHash(change) {
  for (const [name, value] of Object.entries(change)) value ? hash.set(name, value) : hash.delete(name);
  history.replaceState(null, "", `#${hash}`);
}

// --- filters ---

function buildFilters() {
  for (const { name, label, values } of DATA.facets) {
    const options = values.filter(([, count]) => count)
      .map(([value, count]) => el("option", { value }, `${value} (${count.toLocaleString("en")})`));
    const select = el("select", { name, "aria-label": label }, el("option", { value: "" }, label), ...options);
    select.hidden = options.length < 2;
    byId("selects").append(select);
  }
}

function queryOfHash() {
  const filters = {};
  for (const { name } of DATA.facets) if (hash.get(name)) filters[name] = hash.get(name);
  return { filters, q: hash.get("q") ?? "", sort: hash.get("sort") ?? (COMPARED ? "disagreement" : "order") };
}

async function applyHash() {
  hash = new URLSearchParams(location.hash.slice(1));
  document.documentElement.style.colorScheme = hash.get("theme") ?? "";
  const next = queryOfHash();
  if (byId("q") !== document.activeElement) byId("q").value = next.q;
  for (const select of document.querySelectorAll("#selects select")) {
    select.value = hash.get(select.name) ?? "";
    select.classList.toggle("set", Boolean(select.value));
    if (select.value) select.hidden = false;
  }
  if (byId("sort")) byId("sort").value = next.sort;
  if (!(await showQuery(next))) return;
  for (const bar of bars) {
    if (hash.get(bar.dataset.facet) === bar.dataset.value) bar.setAttribute("aria-current", "true");
    else bar.removeAttribute("aria-current");
  }
  byId("count").textContent = countText();
  const id = hash.get("id");
  const place = id ? await SOURCE.placeOf(query, id) : 0;
  if (place === null) await show(id); // filtered out: shown, but not in the list
  else await go(place);
}

// A page may hold a sample of the dataset's rollouts; then every count says so.
function countText() {
  const [found, here, all] = [total, DATA.total, DATA.all].map((count) => count.toLocaleString("en"));
  const sample = DATA.total < DATA.all ? `, sampled from ${all}` : "";
  if (total === DATA.total) return sample ? `${here} rollouts${sample}` : many(total, "rollout");
  return `${found} of ${here}${sample}`;
}

// Lists the rollouts of a bar of the overview, without any other filter.
async function showBar({ facet, value }) {
  const filters = Object.fromEntries(DATA.facets.map(({ name }) => [name, ""]));
  await changeQuery({ ...filters, q: "", [facet]: value });
  browser.scrollIntoView({ block: "start" });
  list.focus({ preventScroll: true });
}

function changeQuery(change) {
  setHash({ ...change, id: "" });
  return applyHash();
}

// --- the rollout shown ---

async function go(place, byReader = false) {
  const row = await choose(place);
  if (!row) {
    if (!total) byId("detail").replaceChildren();
    return;
  }
  if (byReader) setHash({ id: row.id });
  await show(row.id);
  if (byReader) browser.scrollIntoView({ block: "start" });
}

let wanted = null;
async function show(id) {
  wanted = id;
  const rollout = await SOURCE.rollout(id);
  if (wanted !== id) return; // the reader has selected another rollout
  byId("detail").replaceChildren(...(rollout ? drawRollout(rollout) : [el("p", { class: "empty" }, "This rollout is not here.")]));
  byId("place").textContent = current < 0 ? "" : `${(current + 1).toLocaleString("en")} of ${total.toLocaleString("en")}`;
}

async function goToId(id) {
  const place = await SOURCE.placeOf(query, id);
  if (place !== null) return go(place, true);
  setHash({ id });
  return show(id);
}

async function goToDisagreement() {
  const place = await SOURCE.nextDisagreement(query, current);
  byId("place").textContent = place === null ? "no further disagreement" : "";
  if (place !== null) await go(place, true);
}

function toggleTheme() {
  const systems = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  setHash({ theme: (hash.get("theme") ?? systems) === "dark" ? "light" : "dark" });
  document.documentElement.style.colorScheme = hash.get("theme");
}

// --- events ---

const visibleRows = () => Math.max(1, Math.floor(list.clientHeight / ROW_HEIGHT) - 1);
const ANYWHERE = {
  j: () => go(current + 1, true),
  k: () => go(current - 1, true),
  n: () => COMPARED && goToDisagreement(),
  t: toggleTheme,
  "/": () => byId("q").focus(),
  "?": () => byId("help").showModal(),
};
const IN_LIST = {
  ArrowDown: ANYWHERE.j,
  ArrowUp: ANYWHERE.k,
  PageDown: () => go(current + visibleRows(), true),
  PageUp: () => go(current - visibleRows(), true),
  Home: () => go(0, true),
  End: () => go(total - 1, true),
  Enter: () => byId("detail").focus(),
};

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open) return;
  if (event.target.matches("input, select")) {
    if (event.key === "Escape" || (event.key === "Enter" && event.target === byId("q"))) list.focus();
    return;
  }
  const action = (event.target === list && IN_LIST[event.key]) || ANYWHERE[event.key];
  if (!action) return;
  event.preventDefault();
  action();
});
list.addEventListener("click", (event) => {
  const row = event.target.closest(".row");
  if (row) go(Number(row.dataset.place), true);
});
byId("detail").addEventListener("click", (event) => {
  const dot = event.target.closest(".dots button");
  if (dot) goToId(dot.dataset.id);
});
for (const bar of bars) {
  bar.addEventListener("click", (event) => {
    event.preventDefault();
    showBar(bar.dataset);
  });
}
byId("filters").addEventListener("submit", (event) => event.preventDefault());
byId("q").addEventListener("input", (event) => {
  clearTimeout(typing);
  typing = setTimeout(() => changeQuery({ q: event.target.value }), SEARCH_PAUSE);
});
byId("selects").addEventListener("change", (event) => changeQuery({ [event.target.name]: event.target.value }));
byId("sort")?.addEventListener("change", (event) => changeQuery({ sort: event.target.value }));
byId("previous").addEventListener("click", ANYWHERE.k);
byId("next").addEventListener("click", ANYWHERE.j);
byId("disagreement")?.addEventListener("click", goToDisagreement);
byId("theme").addEventListener("click", toggleTheme);
byId("ask").addEventListener("click", ANYWHERE["?"]);
addEventListener("hashchange", applyHash);
addEventListener("unhandledrejection", (event) => {
  byId("place").textContent = DATA.rollouts ? String(event.reason) : "no answer: does trace-opd view still run?";
});

// --- start ---

if (DATA.charts?.length) drawCharts();
buildFilters();
applyHash();
