"use strict";
// Data enters the page only through textContent, so it can never become markup.
const DATA = JSON.parse(document.getElementById("data").textContent);
const COMPARED = DATA.labels !== null;

const byId = (id) => document.getElementById(id);

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
const percent = (value, digits = 1) => (100 * value).toFixed(digits) + " %";
const many = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;

// The value of a list row's facet; undefined if the dataset has no such facet.
const FACET_AT = new Map(DATA.facets.map((facet, index) => [facet.name, index]));
function facet(row, name) {
  const at = FACET_AT.get(name);
  return at === undefined ? undefined : DATA.facets[at].values[row.facets[at]][0];
}
