// Draws training curves as inline SVG, with one crosshair over all of them. start.js calls it.

const FRONT_CHARTS = 6;
const BOX = { width: 360, height: 168, left: 38, right: 6, top: 14, bottom: 18 };
const cursors = [];

// A route's series has the route's colour in every chart; any other series the colour of its place.
function seriesStyle(name, index) {
  const route = DATA.routes.indexOf(name.split("_").pop());
  if (route >= 0) return `s${(route % 6) + 1}`;
  return `s${index < 4 ? index + 1 : 0}`;
}

function niceTicks(low, high, count) {
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => power * factor >= rough);
  const ticks = [];
  for (let i = Math.floor(low / step + 1e-9); i <= Math.ceil(high / step - 1e-9); i++) ticks.push(i * step);
  return ticks;
}

function phaseRuns() {
  const runs = [];
  DATA.phases.forEach((phase, index) => {
    const last = runs[runs.length - 1];
    if (last && last.phase === phase) last.end = index;
    else runs.push({ phase, start: index, end: index });
  });
  return runs;
}

// Where each series is drawn: at its values, or, in a stacked chart, on top of those before it.
function heights(chart) {
  if (!chart.stacked) return chart.series.map((series) => series.values);
  const top = DATA.steps.map(() => 0);
  return chart.series.map((series) => series.values.map((value, i) => (top[i] += value ?? 0)));
}

function drawChart(chart) {
  const steps = DATA.steps;
  const drawn = heights(chart);
  const values = drawn.flat().filter((value) => value !== null);
  const least = Math.min(...values), most = Math.max(...values);
  // Values near zero get an axis that starts at zero; others, such as 0.9 to 0.95, get their own range.
  const ticks = niceTicks(chart.stacked || (least >= 0 && least < most / 2) ? 0 : least, most, 4);
  const [low, high] = [ticks[0], ticks[ticks.length - 1]];
  const first = steps[0], span = steps[steps.length - 1] - first || 1;
  const { width, height, left, right, top, bottom } = BOX;
  const x = (step) => left + ((step - first) / span) * (width - left - right);
  const y = (value) => height - bottom - ((value - low) / (high - low)) * (height - top - bottom);

  const plot = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  plot.append(svg("title", {}, `${chart.title} over steps`));
  phaseRuns().forEach(({ phase, start, end }, index) => {
    const from = index ? (x(steps[start - 1]) + x(steps[start])) / 2 : left;
    const to = end + 1 < steps.length ? (x(steps[end]) + x(steps[end + 1])) / 2 : width - right;
    if (phase === "offline")
      plot.append(svg("rect", { class: "phase", x: from, y: top, width: to - from, height: height - top - bottom }));
    if (index) plot.append(svg("line", { class: "boundary", x1: from, x2: from, y1: top - 8, y2: height - bottom }));
    plot.append(svg("text", { x: from + 4, y: top - 4 }, phase));
  });
  for (const tick of ticks) {
    plot.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: y(tick), y2: y(tick) }));
    plot.append(svg("text", { x: left - 5, y: y(tick) + 3.5, "text-anchor": "end" }, number(tick)));
  }
  const stepTicks = niceTicks(first, first + span, 5)
    .filter((tick) => tick >= first && tick <= first + span && Number.isInteger(tick));
  for (const tick of stepTicks)
    plot.append(svg("text", { x: x(tick), y: height - 5, "text-anchor": "middle" }, number(tick)));

  const cursor = svg("line", { class: "cursor", y1: top, y2: height - bottom });
  plot.append(cursor);
  const readings = el("ul"), marks = [];
  chart.series.forEach((series, index) => {
    const style = chart.stacked ? `band s${(index % 6) + 1}` : seriesStyle(series.name, index);
    const point = (value, i) => `${x(steps[i]).toFixed(1)} ${y(value).toFixed(1)}`;
    let path = "", pen = false;
    drawn[index].forEach((value, i) => {
      if (value !== null) path += `${pen ? "L" : "M"}${point(value, i)}`;
      pen = value !== null;
    });
    if (chart.stacked) {
      const below = index ? drawn[index - 1] : steps.map(() => 0);
      path += `L${below.map(point).reverse().join("L")}Z`;
    }
    plot.append(svg("path", { class: style, d: path }));
    const mark = svg("circle", { class: style, r: 3 });
    const reading = el("b");
    marks.push({ mark, reading, values: series.values, at: drawn[index] });
    plot.append(mark);
    const key = svg("svg", { viewBox: "0 0 18 8" }, svg("path", { class: style, d: "M0 4H18" }));
    const name = chart.stacked ? series.name.replace("seconds_", "") : series.name;
    readings.append(el("li", {}, key, name.replaceAll("_", " "), reading));
  });
  const area = svg("rect", { class: "area", x: left, y: 0, width: width - left - right, height });
  plot.append(area);
  const at = el("output");

  cursors.push((index) => {
    const shown = index ?? steps.length - 1;
    at.textContent = `step ${number(steps[shown])}`;
    cursor.style.opacity = index === null ? 0 : 0.4;
    cursor.setAttribute("x1", x(steps[shown]));
    cursor.setAttribute("x2", x(steps[shown]));
    for (const { mark, reading, values: series, at: level } of marks) {
      reading.textContent = number(series[shown]);
      // A single step has no line, so its mark stays.
      const hidden = series[shown] === null || (index === null && steps.length > 1);
      mark.style.opacity = hidden ? 0 : 1;
      mark.setAttribute("cx", x(steps[shown]));
      mark.setAttribute("cy", y(level[shown] ?? low));
    }
  });
  area.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const step = first + ((((event.clientX - box.left) / box.width) * width - left) / (width - left - right)) * span;
    let nearest = 0;
    steps.forEach((value, i) => {
      if (Math.abs(value - step) < Math.abs(steps[nearest] - step)) nearest = i;
    });
    cursors.forEach((move) => move(nearest));
  });
  area.addEventListener("pointerleave", () => cursors.forEach((move) => move(null)));
  const unit = el("span", {}, chart.unit);
  return el("article", { class: "chart" }, el("header", {}, chart.title.replaceAll("_", " "), unit, at), readings, plot);
}

function drawCharts() {
  DATA.charts.forEach((chart, index) => {
    document.getElementById(index < FRONT_CHARTS ? "charts" : "more-charts").append(drawChart(chart));
  });
  document.getElementById("more-curves").hidden = DATA.charts.length <= FRONT_CHARTS;
  cursors.forEach((move) => move(null));
}

