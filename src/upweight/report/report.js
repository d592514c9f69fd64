"use strict";
// The issue table. All rows stay in arrays; only those of one page become elements, and every text goes in as text.
(() => {
  const holder = document.getElementById("issue-data");
  if (!holder) return;
  const data = JSON.parse(holder.textContent);
  const columns = data.columns, texts = data.texts, flagged = data.flagged, count = flagged.length;
  const PAGE = 25;
  const names = { id: "example", issue: "issue", score: "severity", given_label: "given", predicted_label: "suggested",
    influence: "effect", related_id: "like", detector: "found by" };
  const shown = Object.keys(names).filter((name) => columns[name]);
  const isText = (name) => name !== "score" && name !== "influence";
  const state = { sort: "score", up: true, page: 0, kind: "", only: flagged.some((flag) => flag), label: "", words: "" };

  const element = (tag, text, className) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  };
  const textOf = (name, row) => (columns[name] && columns[name][row] >= 0 ? texts[columns[name][row]] : "");
  const number = (value) => {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    const written = value === 0 ? "0" : size >= 1000 ? value.toFixed(0) : Number(value.toPrecision(2)).toString();
    return (value > 0 ? "+" : "") + written.replaceAll("-", "−");
  };

  // Texts are compared by their place in the sorted list of distinct texts: 100,000 comparisons of numbers are quick.
  const collator = new Intl.Collator(undefined, { numeric: true });
  const places = new Int32Array(texts.length);
  texts.map((_, k) => k).sort((a, b) => collator.compare(texts[a], texts[b])).forEach((k, place) => { places[k] = place; });
  const lower = texts.map((text) => text.toLowerCase());

  const keysOf = (name) => {
    const keys = new Float64Array(count);
    for (let row = 0; row < count; row++) {
      const value = columns[name][row];
      keys[row] = isText(name) ? (value >= 0 ? places[value] : NaN) : value === null ? NaN : value;
    }
    return keys;
  };

  // All rows in the order of one column, worked out once: searching and filtering then only walk along it.
  const orders = new Map();
  const ordered = () => {
    const name = `${state.sort} ${state.up}`;
    if (!orders.has(name)) {
      const keys = keysOf(state.sort), sign = state.up ? 1 : -1;
      const order = Int32Array.from({ length: count }, (_, row) => row).sort((a, b) => {
        const x = keys[a], y = keys[b];
        if (x !== x || y !== y) return (x !== x) - (y !== y) || a - b; // what is not known comes last
        return sign * (x - y) || a - b;
      });
      orders.set(name, order);
    }
    return orders.get(name);
  };

  let rows = [];
  const choose = () => {
    const wanted = state.words.trim().toLowerCase();
    const hit = wanted ? lower.map((text) => text.includes(wanted)) : null;
    const searched = ["id", "given_label", "predicted_label", "related_id"].filter((name) => columns[name]);
    const kind = state.kind ? texts.indexOf(state.kind) : -1, label = state.label ? texts.indexOf(state.label) : -1;
    const kept = [];
    for (const row of ordered()) {
      if (state.only && !flagged[row]) continue;
      if (kind >= 0 && columns.issue[row] !== kind) continue;
      if (label >= 0 && columns.given_label[row] !== label) continue;
      if (hit && !searched.some((name) => columns[name][row] >= 0 && hit[columns[name][row]])) continue;
      kept.push(row);
    }
    rows = kept;
  };

  const table = document.getElementById("issue-table"), body = table.tBodies[0], head = table.tHead.rows[0];
  const cell = (name, row) => {
    const made = element("td");
    made.dataset.name = names[name];
    if (name === "id") {
      const who = element("div", undefined, "who"), look = data.looks[data.positions[row]];
      if (look && look[0].startsWith("data:image/png;base64,")) {
        const image = element("img");
        image.src = look[0];
        image.alt = "";
        if (look[2]) image.className = "small";
        who.append(image);
      }
      const words = element("span");
      words.append(element("bdi", textOf("id", row)));
      if (look && look[1]) words.append(element("small", look[1]));
      who.append(words);
      made.append(who);
    } else if (name === "issue") {
      const kind = textOf("issue", row);
      made.append(element("span", data.kinds[kind] || kind, flagged[row] ? "flag" : ""));
    } else if (name === "score") {
      const score = columns.score[row];
      if (score === null) return made;
      made.append(score > 0 && score < 0.0005 ? "<0.001" : score.toFixed(3));
    } else if (name === "influence") {
      made.className = columns.influence[row] === null ? "num none" : "num";
      made.append(number(columns.influence[row]));
    } else {
      const text = textOf(name, row);
      if (!text) return made;
      made.append(element("bdi", text));
      const chance = name === "predicted_label" && columns.suggested_probability ? columns.suggested_probability[row] : null;
      if (chance !== null) made.append(element("small", ` ${Math.round(100 * chance)} %`, "soft"));
      if (name === "detector") made.className = "faint";
    }
    return made;
  };

  const draw = () => {
    const pages = Math.max(1, Math.ceil(rows.length / PAGE));
    state.page = Math.min(state.page, pages - 1);
    const first = state.page * PAGE, part = rows.slice(first, first + PAGE);
    body.replaceChildren(...part.map((row) => {
      const line = element("tr");
      line.append(...shown.map((name) => cell(name, row)));
      return line;
    }));
    const from = rows.length ? first + 1 : 0;
    document.getElementById("issue-count").textContent =
      `${from.toLocaleString("en")}–${(first + part.length).toLocaleString("en")} of ${rows.length.toLocaleString("en")}`;
    for (const [id, off] of [["first", state.page === 0], ["before", state.page === 0], ["after", state.page >= pages - 1], ["last", state.page >= pages - 1]])
      document.getElementById(`issue-${id}`).disabled = off;
    for (const one of head.cells) {
      if (one.dataset.sort === state.sort) one.setAttribute("aria-sort", state.up ? "ascending" : "descending");
      else one.removeAttribute("aria-sort");
    }
    for (const chip of document.querySelectorAll("#issue-kinds button")) chip.setAttribute("aria-pressed", String(chip.dataset.kind === state.kind));
  };
  const again = (changes) => {
    Object.assign(state, { page: 0 }, changes);
    choose();
    draw();
  };

  head.replaceChildren(...shown.map((name) => {
    const made = element("th"), button = element("button", names[name]);
    made.dataset.sort = name;
    made.scope = "col";
    if (name === "influence") { made.className = "num"; if (data.unit) button.title = `in ${data.unit}`; }
    button.type = "button";
    button.addEventListener("click", () => again({ sort: name, up: state.sort === name ? !state.up : true }));
    made.append(button);
    return made;
  }));
  const sorter = document.getElementById("issue-sort");
  for (const name of shown) sorter.append(new Option(`by ${names[name]}`, name));
  sorter.value = "score";
  sorter.addEventListener("change", () => again({ sort: sorter.value, up: true }));
  for (const chip of document.querySelectorAll("#issue-kinds button")) chip.addEventListener("click", () => again({ kind: chip.dataset.kind }));
  const only = document.getElementById("issue-only");
  only.checked = state.only;
  only.addEventListener("change", () => again({ only: only.checked }));
  const labels = document.getElementById("issue-label");
  if (columns.given_label) {
    const distinct = [...new Set(columns.given_label)].filter((k) => k >= 0).sort((a, b) => places[a] - places[b]);
    if (distinct.length > 1 && distinct.length <= 1000) {
      for (const k of distinct) labels.append(new Option(texts[k].slice(0, 40), texts[k]));
      labels.addEventListener("change", () => again({ label: labels.value }));
      labels.hidden = false;
    }
  }
  const search = document.getElementById("issue-search");
  search.addEventListener("input", () => again({ words: search.value }));
  const turn = (id, to) => document.getElementById(`issue-${id}`).addEventListener("click", () => { state.page = to(); draw(); });
  turn("first", () => 0);
  turn("before", () => state.page - 1);
  turn("after", () => state.page + 1);
  turn("last", () => Math.ceil(rows.length / PAGE) - 1);
  for (const hidden of document.querySelectorAll(".needs-script")) hidden.hidden = false;
  choose();
  draw();
})();
