// Draws one rollout: its problem, its facts, and its response as one or two annotators marked it.

const PLAIN = 0;
const textOf = (pieces) => pieces.map((piece) => piece[0]).join("");

function drawRollout(rollout) {
  const body = rollout.sides.length ? comparison(rollout) : single(rollout);
  return [problemHead(rollout), ...body, el("p", { class: "id" }, rollout.id)];
}

function problemHead(rollout) {
  const { problem, answer, source } = rollout.problem;
  const right = rollout.members.filter((member) => member.correct === "yes").length;
  const dots = rollout.members.map((member, index) =>
    el("button", {
      type: "button", class: member.correct, "data-id": member.id,
      "aria-label": `response ${index + 1} of the group, ${MARK[member.correct][1]}`,
      ...(member.id === rollout.id ? { "aria-current": "true" } : {}),
    }, { yes: "●", no: "○", unscored: "·" }[member.correct]));
  return el("header", { class: "head" },
    el("h3", { class: "problem", dir: "auto" }, problem),
    el("div", { class: "dots", role: "group", "aria-label": "Responses to this problem" }, ...dots),
    el("p", { class: "about" }, "answer ", el("b", {}, answer), ` · ${source} · ${rollout.policy}, step ${rollout.step}`),
    el("p", { class: "about right" }, `${right} of ${rollout.members.length} right`));
}

// --- one annotator ---

function single(rollout) {
  const title = (paint, rank, kind) => (rank >= 0 ? `span ${rank} · ${kind} · ${paint}` : `outside spans · ${paint}`);
  return [
    el("div", { class: "card" },
      ribbon(rollout.pieces, DATA.paints),
      response(rollout.pieces, DATA.paints, rollout.spans, title),
      el("aside", { class: "facts" },
        verdict(rollout),
        rollout.type === null ? null : typeChip(rollout.type),
        facts([
          ["advantage", rollout.advantage === null ? null : signed(rollout.advantage)],
          ["coverage", rollout.coverage === null ? null : percent(rollout.coverage)],
          ["annotator", rollout.annotator],
          ["annotation", rollout.status === "ok" ? null : rollout.status],
          ["selection", rollout.selection],
          ...rollout.parts.map(({ name, value, status }) => [name, value === null ? `none (${status})` : number(value)]),
          ...ofResponse(rollout),
        ]),
        spanList(rollout.spans),
        ...onRewards(rollout),
        ...onDemand(rollout))),
  ];
}

// --- two annotators ---

function comparison(rollout) {
  const chars = Object.fromEntries(DATA.agreements.map((name) => [name, 0]));
  for (const [text, agreement] of rollout.sides[0].pieces) chars[DATA.agreements[agreement]] += text.length;
  const either = chars.both + chars.only_a + chars.only_b;
  const [a, b] = rollout.sides;
  const differ = a.type !== null && b.type !== null && a.type !== b.type;
  return [
    el("div", { class: "summary" },
      verdict(rollout),
      facts([
        ["overlap (IoU)", either ? percent(chars.both / either, 0) : "nothing marked"],
        ["types", differ ? "differ" : a.type !== null && b.type !== null ? "same" : null],
        ...ofResponse(rollout),
      ]),
      ...onRewards(rollout)),
    el("div", { class: "sides" }, ...rollout.sides.map((side, index) => sideCard(side, index, chars))),
  ];
}

function sideCard(side, index, chars) {
  const other = DATA.labels[1 - index];
  const own = ["only_a", "only_b"][index];
  const title = (agreement, rank, kind) =>
    rank < 0 ? `only ${other}` : `span ${rank} · ${kind} · ${agreement === "both" ? "marked by both" : "marked here alone"}`;
  const marked = chars.both + chars[own];
  return el("section", { class: `side-${"ab"[index]}`, "aria-label": `Annotator ${DATA.labels[index]}` },
    el("header", {},
      el("h4", {}, el("b", { class: "letter" }, "AB"[index]), DATA.labels[index]),
      side.type === null ? null : typeChip(side.type),
      el("span", { class: side.status === "ok" ? "status" : "status odd" }, side.status ?? "not annotated"),
      el("span", { class: "share" }, marked ? `${many(marked, "character")} marked, ${number(chars[own])} here alone` : "nothing marked")),
    ribbon(side.pieces, DATA.agreements),
    response(side.pieces, DATA.agreements, side.spans, title),
    el("footer", { class: "facts" }, spanList(side.spans), ...onDemand(side)));
}

// --- parts ---

function ribbon(pieces, names) {
  const total = textOf(pieces).length || 1;
  const strip = svg("svg", { class: "ribbon", viewBox: `0 0 ${total} 1`, preserveAspectRatio: "none", "aria-hidden": "true" });
  let at = 0;
  for (const [text, paint] of pieces) {
    if (paint !== PLAIN) strip.append(svg("rect", { class: `r-${names[paint]}`, x: at, width: text.length, height: 1 }));
    at += text.length;
  }
  return strip;
}

// A slot of fixed width before each segment, so that both columns break their lines alike:
// it holds the segment's number, or the rank of the span that begins there.
function response(pieces, names, spans, title) {
  const kinds = new Map(spans.map((span) => [span.rank, span.kind]));
  const ranked = new Set();
  const body = el("pre", { class: "response" });
  for (const [text, paint, rank, segment] of pieces) {
    if (rank >= 0 && !ranked.has(rank)) {
      ranked.add(rank);
      const where = segment === null ? "" : `segment ${segment} · `;
      body.append(el("i", { class: "slot", title: `${where}${kinds.get(rank)} span, rank ${rank}` }, el("b", { class: "rank" }, String(rank))));
    } else if (segment !== null) {
      body.append(el("i", { class: "slot", title: `segment ${segment}` }, String(segment)));
    }
    const name = names[paint];
    const marked = paint === PLAIN && rank < 0 ? {} : { class: `p-${name}`, title: title(name, rank, kinds.get(rank)) };
    body.append(el("span", marked, text));
  }
  return body;
}

function verdict(rollout) {
  const correct = rollout.correct === null ? "unscored" : rollout.correct ? "yes" : "no";
  const [sign, word] = MARK[correct];
  const reward = rollout.reward === null ? "no reward" : `reward ${number(rollout.reward)}`;
  return el("p", { class: "verdict" }, el("b", { class: correct }, `${sign} ${word}`), el("span", {}, reward));
}

const ofResponse = (rollout) => [
  ["answer read", rollout.parsed],
  ["verdict", rollout.verdict === "ok" ? null : rollout.verdict],
  ["tokens", `${number(rollout.tokens)} (${rollout.finish})`],
];

const typeChip = (type) => el("span", { class: "type", title: "diagnostic type" }, type.replaceAll("_", " "));

function facts(rows) {
  const known = rows.filter(([, value]) => value !== null && value !== "");
  return el("dl", {}, ...known.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
}

function spanList(spans) {
  if (!spans.length) return null;
  return el("ol", { class: "spans", "aria-label": "Spans in order of importance" }, ...spans.map((span) => {
    const [from, to] = [span.segments[0], span.segments[span.segments.length - 1]];
    const where = from === to ? `segment ${from}` : `segments ${from}–${to}`;
    const kept = span.kept_tokens === null ? "" : span.kept_tokens ? many(span.kept_tokens, "token") : "dropped";
    return el("li", {}, el("b", { class: "rank" }, String(span.rank)), el("span", {}, `${span.kind}, ${where}`), el("span", {}, kept));
  }));
}

const onRewards = (rollout) => texts([["feedback", rollout.feedback], ["grades", rollout.grades]]);

const onDemand = (side) =>
  texts([["corrective idea", side.reflection], ["annotator's answer", side.raw], ["why invalid", side.error]]);

function texts(named) {
  return named
    .filter(([, text]) => text)
    .map(([name, text]) => el("details", {}, el("summary", {}, name), el("pre", {}, text)));
}
