// Two sources of rows and rollouts: the page's own data, or the server that sent the page.
// Both have the same four functions of a query { filters: { facet: value }, q, sort }:
//   rows(query, from, count) → { total, rows }      rollout(id) → the rollout
//   placeOf(query, id) → place in the list or null   nextDisagreement(query, after) → the same

function pageSource() {
  const rollouts = new Map(DATA.rollouts.map((rollout) => [rollout.id, rollout]));
  const texts = new Map();
  let last = { key: null, found: [] };

  function haystack(row) {
    if (!texts.has(row.id)) {
      const rollout = rollouts.get(row.id);
      const pieces = COMPARED ? rollout.sides[0].pieces : rollout.pieces;
      const { problem } = DATA.problems[rollout.problem_id];
      texts.set(row.id, [problem, row.id, textOf(pieces)].join("\n").toLowerCase());
    }
    return texts.get(row.id);
  }

  function find(query) {
    const key = JSON.stringify(query);
    if (last.key === key) return last.found;
    const text = query.q.toLowerCase();
    const wanted = Object.entries(query.filters);
    const found = DATA.rows.filter(
      (row) => wanted.every(([name, value]) => facet(row, name) === value) && (!text || haystack(row).includes(text)),
    );
    // Rows that cannot be compared are last. The sort is stable, so ties keep the list's order.
    if (query.sort === "disagreement") found.sort((a, b) => (b.disagreement ?? -1) - (a.disagreement ?? -1));
    last = { key, found };
    return found;
  }

  const orNull = (place) => (place < 0 ? null : place);
  return {
    rows: async (query, from, count) => {
      const found = find(query);
      return { total: found.length, rows: found.slice(from, from + count) };
    },
    rollout: async (id) => {
      const rollout = rollouts.get(id);
      if (!rollout) return null;
      const { group } = DATA.rows.find((row) => row.id === id);
      const members = DATA.rows.filter((row) => row.group === group);
      return {
        ...rollout,
        problem: DATA.problems[rollout.problem_id],
        members: members.map((row) => ({ id: row.id, correct: facet(row, "correct") })),
      };
    },
    placeOf: async (query, id) => orNull(find(query).findIndex((row) => row.id === id)),
    nextDisagreement: async (query, after) =>
      orNull(find(query).findIndex((row, place) => place > after && row.disagreement > 0)),
  };
}

function serverSource() {
  async function ask(path, parameters) {
    const answer = await fetch(`${path}?${new URLSearchParams(parameters)}`);
    if (answer.status === 404) return null;
    if (!answer.ok) throw new Error(await answer.text());
    return answer.json();
  }
  const flat = (query) => ({ ...query.filters, q: query.q, sort: query.sort });
  return {
    rows: (query, from, count) => ask("/rows", { ...flat(query), from, count }),
    rollout: (id) => ask("/rollout", { id }),
    placeOf: async (query, id) => (await ask("/place", { ...flat(query), id }))?.place ?? null,
    nextDisagreement: async (query, after) => (await ask("/place", { ...flat(query), after })).place,
  };
}

const SOURCE = DATA.rollouts ? pageSource() : serverSource();
