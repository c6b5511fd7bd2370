"use strict";
// Shows the record of an explanation. Every text of the model's is set as text, never as markup.
//
// The address may say where to begin: #q=hash&open=all&select=node&theme=dark. `keys=ArrowDown,Enter` presses keys, for tests.
(() => {
  const ROW = 32;
  const record = JSON.parse(document.getElementById("data").textContent);
  const find = (id) => document.getElementById(id);
  const places = record.counts.lookup ? ["stage", "lookup", "step"] : ["stage", "step"];
  const titles = { stage: "Ahead, in the stage", lookup: "Lookups, gathered ahead", step: "In the step" };
  const words = { stage: "runs ahead", lookup: "gathered ahead", step: "stays in the step" };

  // ------------------------------------------------------------------ small helpers

  function make(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes || {})) {
      if (value === undefined || value === null || value === false) continue;
      if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
      else element.setAttribute(key, value === true ? "" : value);
    }
    element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== ""));
    return element;
  }

  function time(seconds) {
    if (seconds === null || seconds === undefined) return "";
    if (seconds >= 1) return `${seconds.toFixed(2)} s`;
    return seconds >= 1e-4 ? `${(seconds * 1e3).toFixed(2)} ms` : `${(seconds * 1e6).toFixed(0)} µs`;
  }

  function size(bytes) {
    const units = ["B", "KB", "MB", "GB"];
    let unit = 0;
    while (bytes >= 1000 && unit < 3) { bytes /= 1000; unit += 1; }
    return `${unit ? bytes.toFixed(1) : bytes} ${units[unit]}`;
  }

  const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;

  function counted(names, most) {
    const counts = new Map();
    for (const name of names) counts.set(name, (counts.get(name) || 0) + 1);
    const shown = [...counts].map(([name, number]) => (number === 1 ? name : `${name} ×${number}`));
    return shown.slice(0, most).join(", ") + (shown.length > most ? ` and ${shown.length - most} more` : "");
  }

  // Text with its `code` parts as code.
  function prose(text) {
    return text.split("`").map((part, position) => (position % 2 ? make("code", null, part) : part));
  }

  // ------------------------------------------------------------------ the tree: modules, source lines, operations

  const classes = new Map(record.modules.map((module) => [module.path, module.class]));
  const items = new Map(); // name of an operation or leaf -> its tree node
  const all = [];

  function treeNode(kind, parent, label, extra) {
    const node = { kind, parent, label, children: [], open: false, depth: parent ? parent.depth + 1 : 0, work: [], ...extra };
    node.id = all.length;
    all.push(node);
    if (parent) parent.children.push(node);
    return node;
  }

  function build() {
    const roots = [];
    if (record.inputs.length) {
      const batch = treeNode("module", null, "batch", { note: count(record.inputs.length, "leaf").replace("leafs", "leaves") });
      roots.push(batch);
      for (const leaf of record.inputs) {
        const lane = leaf.read_by_stage || !leaf.read_by_step ? "stage" : "step";
        const node = treeNode("leaf", batch, leaf.label, { leaf, lane, inputs: [], users: [] });
        batch.work.push(node);
        items.set(leaf.name, node);
      }
    }
    const modules = new Map();
    function moduleOf(path) {
      if (!modules.has(path)) {
        const cut = path.lastIndexOf(".");
        const parent = path === "" ? null : moduleOf(cut < 0 ? "" : path.slice(0, cut));
        const name = path === "" ? record.model : path.slice(cut + 1);
        const note = path === "" ? record.mode : classes.get(path) || "";
        modules.set(path, treeNode("module", parent, name, { path, note, lines: new Map() }));
        if (path === "") roots.push(modules.get(path));
      }
      return modules.get(path);
    }
    const byLine = new Map();
    for (const op of record.operations) {
      const key = `${op.module}\n${op.source}`;
      byLine.set(key, (byLine.get(key) || 0) + 1);
    }
    for (const op of record.operations) {
      const module = moduleOf(op.module);
      let parent = module;
      if (op.source && byLine.get(`${op.module}\n${op.source}`) > 1) {
        if (!module.lines.has(op.source)) module.lines.set(op.source, treeNode("line", module, op.source, {}));
        parent = module.lines.get(op.source);
      }
      const node = treeNode("op", parent, op.name, { op, lane: op.place, inputs: [], users: [] });
      node.text = `${op.name} ${op.calls} ${op.layer} ${op.module} ${op.source} ${op.why}`.toLowerCase();
      items.set(op.name, node);
      for (let up = node; up; up = up.parent) up.work.push(node);
    }
    if (record.outputs.length) {
      const out = treeNode("leaf", null, "returned", { lane: "step", inputs: [], users: [], returned: true });
      out.work.push(out);
      roots.push(out);
      link(record.outputs, out);
    }
    for (const op of record.operations) link(op.inputs, items.get(op.name));
    return roots;
  }

  function link(names, user) {
    for (const name of new Set(names)) {
      const source = items.get(name);
      if (!source) continue;
      user.inputs.push(source);
      source.users.push(user);
    }
  }

  const roots = build();

  function openSome() {
    let shown = roots.length;
    const waiting = [...roots];
    while (waiting.length) {
      const node = waiting.shift();
      if (node.kind !== "module" || !node.children.length || shown + node.children.length > 48) continue;
      node.open = true;
      shown += node.children.length;
      waiting.push(...node.children);
    }
    for (const root of roots) root.open = root.children.length > 0 && (root.open || root.label !== "batch");
  }

  // ------------------------------------------------------------------ what is shown

  const shownPlaces = new Set(places);
  let causesOnly = false;
  let query = "";
  let rows = [];
  let rowOf = new Map(); // tree node -> its position in rows
  let current = null;

  const filtering = () => query !== "" || causesOnly || shownPlaces.size < places.length;

  function matches(node) {
    if (node.kind !== "op") return false;
    if (!shownPlaces.has(node.lane) || (causesOnly && !node.op.own_reason)) return false;
    return query.split(/\s+/).every((word) => node.text.includes(word));
  }

  function collect() {
    rows = [];
    const keep = filtering() ? new Set() : null;
    if (keep) {
      for (const node of all) {
        if (!matches(node)) continue;
        for (let up = node; up && !keep.has(up); up = up.parent) keep.add(up);
      }
    }
    const visit = (node) => {
      if (keep && !keep.has(node)) return;
      rows.push(node);
      if (node.open) node.children.forEach(visit);
    };
    roots.forEach(visit);
    rowOf = new Map(rows.map((node, position) => [node, position]));
    const found = keep ? all.filter((node) => node.kind === "op" && keep.has(node)).length : 0;
    find("found").textContent = keep ? `${found} of ${count(record.counts.operations, "operation")}` : "";
    find("nothing").hidden = rows.length > 0;
    find("sheet").hidden = rows.length === 0;
  }

  function openMatches() {
    if (!filtering()) return;
    let left = 400; // rows: more are found under modules that stay folded
    for (const node of all) {
      if (left <= 0) break;
      if (!matches(node)) continue;
      left -= 1;
      for (let up = node.parent; up; up = up.parent) up.open = true;
    }
  }

  const visibleOf = (node) => {
    let shown = null;
    for (let up = node; up; up = up.parent) if (rowOf.has(up)) { shown = up; break; }
    return shown;
  };

  // ------------------------------------------------------------------ rows

  function marked(text) {
    const word = query.split(/\s+/)[0];
    const at = word ? text.toLowerCase().indexOf(word) : -1;
    if (at < 0) return [text];
    return [text.slice(0, at), make("mark", null, text.slice(at, at + word.length)), text.slice(at + word.length)];
  }

  function called(op) {
    return op.layer ? `${op.layer} ${op.calls}` : op.calls;
  }

  function box(node, place) {
    if (node.kind === "leaf") {
      if (node.lane !== place) return null;
      const form = node.returned ? "" : node.leaf.value.form;
      return make("div", { class: "box leaf" }, make("span", { class: "what" }, ...marked(node.label)), make("span", { class: "aside" }, form));
    }
    const members = node.work.filter((member) => member.lane === place);
    if (!members.length) return null;
    const kind = node.kind === "op" ? "" : node.open ? " open" : " group";
    const cause = members.some((member) => member.op && member.op.own_reason) && !node.open ? " cause" : "";
    let what = count(members.length, "operation");
    let asideClass = "aside time";
    let aside = time(members.reduce((sum, member) => sum + ((member.op && member.op.seconds) || 0), 0) || null);
    if (node.kind === "op") {
      what = node.op.layer || node.op.calls;
      aside = node.op.value ? node.op.value.form : "";
      asideClass = "aside";
    } else if (node.kind === "line" && !node.open) {
      what = counted(members.map((member) => (member.op.layer ? member.op.layer : member.op.calls)), 6);
    } else if (members[0].kind === "leaf") {
      what = members.map((member) => member.label).join(", ");
    }
    const colour = members[0].kind === "leaf" ? "leaf" : place;
    return make("div", { class: `box ${colour}${kind}${cause}` }, make("span", { class: "what" }, ...marked(what)), make("span", { class: asideClass }, aside));
  }

  function rowElement(node, position) {
    const folds = node.children.length > 0;
    const name = node.kind === "op" ? node.op.name : node.label;
    const caret = make("span", { class: "caret", "aria-hidden": "true" }, folds ? (node.open ? "▾" : "▸") : "");
    const note = node.kind === "op" && node.parent.kind !== "line" ? node.op.source : node.note;
    const label = make(
      "div", { class: "label", role: "gridcell", style: `padding-left:${4 + node.depth * 16}px` },
      caret, make("span", { class: node.kind === "module" ? "name" : "name code" }, ...marked(name)),
      note ? make("span", { class: "quiet" }, ...marked(note)) : null,
    );
    const lanes = places.map((place) => make("div", { class: "lane", role: "gridcell" }, box(node, place)));
    return make(
      "div",
      {
        class: `row ${node.kind}${node === current ? " current" : ""}`, role: "row", id: `row-${node.id}`, "data-name": name,
        tabindex: node === current || (current === null && position === 0) ? 0 : -1, "aria-level": node.depth + 1,
        "aria-expanded": folds ? String(node.open) : null, "aria-selected": String(node === current),
      },
      label, ...lanes,
    );
  }

  function render() {
    collect();
    if (current && !rowOf.has(current)) current = visibleOf(current);
    const had = find("rows").contains(document.activeElement);
    find("rows").replaceChildren(...rows.map(rowElement));
    find("rows").setAttribute("aria-rowcount", rows.length);
    document.documentElement.dataset.rows = rows.length;
    drawEdges();
    if (had) focusRow(current || rows[0]);
  }

  // ------------------------------------------------------------------ edges

  let lanes = {};

  function measureLanes() {
    lanes = {};
    const first = find("rows").firstElementChild;
    if (!first) return;
    places.forEach((place, position) => {
      const cell = first.children[position + 1];
      lanes[place] = { left: cell.offsetLeft, inner: cell.offsetLeft + 26, right: cell.offsetLeft + cell.offsetWidth - 10 };
    });
  }

  // From one box to another: short ways straight down, others along the gutter at the left of the target's lane.
  function way(from, to) {
    const [a, b] = [rowOf.get(from.row), rowOf.get(to.row)];
    const start = lanes[from.lane], end = lanes[to.lane];
    const [y, z] = [a * ROW + ROW / 2, b * ROW + ROW / 2];
    if (from.lane === to.lane && b === a + 1) return `M${start.inner + 14} ${y + 12}V${z - 12}`;
    const track = end.left + 5 + (a % 4) * 4;
    const turn = z > y ? 5 : -5;
    const out = from.lane === to.lane || end.left < start.left ? start.inner : start.right;
    const first = track < out ? -5 : 5;
    return `M${out} ${y + 4}H${track - first}q${first} 0 ${first} ${turn}V${z - 4 - turn}q0 ${turn} 5 ${turn}H${end.inner}`;
  }

  function* links(nodes) {
    const seen = new Set();
    for (const node of nodes) {
      const to = visibleOf(node);
      if (!to) continue;
      for (const source of node.inputs) {
        const from = visibleOf(source);
        if (!from || from.open || to.open) continue; // an end that the search hides
        if (from === to && source.lane === node.lane) continue;
        const key = `${from.id} ${source.lane} ${to.id} ${node.lane}`;
        if (seen.has(key)) continue;
        seen.add(key);
        yield [{ row: from, lane: source.lane }, { row: to, lane: node.lane }, source.kind === "op" && source.lane === "stage" && node.lane !== "stage"];
      }
    }
  }

  function drawEdges() {
    measureLanes();
    const flow = [], cut = [];
    const nodes = [...items.values(), ...roots.filter((node) => node.returned)];
    for (const [from, to, crosses] of links(nodes)) (crosses ? cut : flow).push(way(from, to));
    find("edges").querySelector(".flow").setAttribute("d", flow.join(""));
    find("edges").querySelector(".cut").setAttribute("d", cut.join(""));
    highlight(current);
  }

  function highlight(node) {
    const hot = find("edges").querySelector(".hot");
    if (!node || !rowOf.has(node)) { hot.setAttribute("d", ""); return; }
    const inside = new Set(node.kind === "leaf" ? [node] : node.work);
    const users = new Set();
    for (const member of inside) for (const user of member.users) if (!inside.has(user)) users.add(user);
    const paths = [];
    for (const [from, to] of links(inside)) paths.push(way(from, to));
    for (const [from, to] of links(users)) if (from.row === node) paths.push(way(from, to));
    hot.setAttribute("d", paths.join(""));
    hot.setAttribute("marker-end", "url(#tip)");
  }

  // ------------------------------------------------------------------ details

  function jump(name) {
    const node = items.get(name);
    const label = node ? (node.leaf ? node.leaf.label : name) : name;
    return node ? make("button", { type: "button", class: "link code", onclick: () => reveal(node, true) }, label) : make("code", null, label);
  }

  function some(nodes) {
    const buttons = nodes.slice(0, 12).map((node) => (node.returned ? make("span", null, "returned") : jump(node.leaf ? node.leaf.name : node.op.name)));
    return [...buttons, nodes.length > 12 ? `and ${nodes.length - 12} more` : ""];
  }

  function pairs(entries) {
    return make("dl", null, entries.filter(([, value]) => value && value.length !== 0).map(([key, value]) => [make("dt", null, key), make("dd", null, value)]));
  }

  function reasonLine(op) {
    return make("p", { class: `why ${op.own_reason ? "cause" : op.place}` }, `${words[op.place][0].toUpperCase()}${words[op.place].slice(1)}: it `, ...prose(op.why), ".");
  }

  function showDetail(node) {
    const panel = find("detail");
    if (!node) {
      panel.replaceChildren(
        make("h2", null, "Details"), make("p", { class: "quiet" }, "Choose a row. Lines show which values an operation takes and who takes its own; green ones cross to the step."),
        make("p", { class: "quiet" }, make("kbd", null, "↑"), " ", make("kbd", null, "↓"), " move, ", make("kbd", null, "→"), " ", make("kbd", null, "←"), " unfold and fold, ", make("kbd", null, "/"), " search, ", make("kbd", null, "Esc"), " clear."),
      );
    } else if (node.kind === "op") panel.replaceChildren(...operationDetail(node));
    else if (node.kind === "leaf") panel.replaceChildren(...leafDetail(node));
    else panel.replaceChildren(...groupDetail(node));
  }

  function operationDetail(node) {
    const op = node.op;
    const cause = op.cause ? [make("p", null, "Because of ", jump(op.cause), ":"), items.get(op.cause) && items.get(op.cause).op ? reasonLine(items.get(op.cause).op) : ""] : [];
    return [
      make("h2", { class: "code" }, op.name), reasonLine(op), ...cause,
      pairs([
        ["calls", make("code", null, called(op))], ["module", op.module ? make("code", null, op.module) : record.model],
        ["source", op.source ? make("code", null, op.source) : ""], ["gives", op.value ? [op.value.form, op.value.bytes ? `, ${size(op.value.bytes)}` : ""] : "not run"],
        ["takes time", time(op.seconds)], ["crosses", record.cut.includes(op.name) ? "yes, from the stage to the step" : ""],
        ["takes", some(node.inputs)], ["used by", some(node.users)],
      ]),
    ];
  }

  function leafDetail(node) {
    if (node.returned) return [make("h2", null, "Returned by the forward"), pairs([["values", some(node.inputs)]])];
    const readers = [node.leaf.read_by_stage ? "the stage" : "", node.leaf.read_by_step ? "the step" : ""].filter(Boolean).join(" and ");
    return [make("h2", { class: "code" }, node.label), pairs([["batch leaf", node.leaf.value.form], ["bytes", size(node.leaf.value.bytes)], ["read by", readers || "nothing"], ["used by", some(node.users)]])];
  }

  function groupDetail(node) {
    const ops = node.work.filter((member) => member.op).map((member) => member.op);
    const parts = [make("h2", { class: node.kind === "line" ? "code" : "" }, node.path || node.label)];
    for (const place of places) {
      const members = ops.filter((op) => op.place === place);
      if (!members.length) continue;
      const reasons = new Map();
      for (const op of members) {
        const key = op.own_reason || place !== "step" ? op.why : "depends on work of the step, or costs nothing";
        if (!reasons.has(key)) reasons.set(key, []);
        reasons.get(key).push(op);
      }
      const seconds = members.reduce((sum, op) => sum + (op.seconds || 0), 0);
      parts.push(make("p", null, make("b", null, `${count(members.length, "operation")} ${place === "step" ? (members.length === 1 ? "stays in the step" : "stay in the step") : titles[place].toLowerCase()}`), seconds ? `, ${time(seconds)}` : ""));
      for (const [why, those] of [...reasons].slice(0, 8)) {
        const cause = those[0].own_reason ? "cause" : place;
        parts.push(make("p", { class: `why ${cause}` }, counted(those.map((op) => op.layer || op.calls), 4), ": ", ...prose(why)));
      }
      if (reasons.size > 8) parts.push(make("p", { class: "quiet" }, `and ${reasons.size - 8} more reasons below it`));
    }
    return parts;
  }

  // ------------------------------------------------------------------ moving about

  function select(node) {
    const before = current && document.getElementById(`row-${current.id}`);
    if (before) { before.classList.remove("current"); before.tabIndex = -1; before.setAttribute("aria-selected", "false"); }
    current = node;
    const after = node && document.getElementById(`row-${node.id}`);
    if (after) { after.classList.add("current"); after.tabIndex = 0; after.setAttribute("aria-selected", "true"); }
    highlight(node);
    showDetail(node);
  }

  function focusRow(node) {
    const element = node && document.getElementById(`row-${node.id}`);
    if (!element) return;
    element.focus({ preventScroll: true });
    const place = element.getBoundingClientRect();
    if (place.top < 60 || place.bottom > innerHeight - 10) element.scrollIntoView({ block: "center" });
  }

  function toggle(node, open) {
    if (!node.children.length || node.open === open) return;
    node.open = open;
    render();
    select(visibleOf(node));
  }

  function reveal(node, focus) {
    if (filtering() && !matches(node)) clearFilters();
    for (let up = node.parent; up; up = up.parent) up.open = true;
    render();
    select(node);
    if (focus) focusRow(node);
  }

  function setAll(open) {
    for (const node of all) node.open = open && node.children.length > 0;
    if (!open) for (const root of roots) root.open = root.children.length > 0;
    render();
  }

  function clearFilters() {
    query = "";
    causesOnly = false;
    for (const place of places) shownPlaces.add(place);
    find("search").value = "";
    showFilters();
  }

  function search(text) {
    query = text.trim().toLowerCase();
    openMatches();
    render();
  }

  function onTreeKey(event) {
    const position = current && rowOf.has(current) ? rowOf.get(current) : 0;
    const node = rows[position];
    const moves = { ArrowDown: position + 1, ArrowUp: position - 1, Home: 0, End: rows.length - 1, PageDown: position + 15, PageUp: position - 15 };
    if (event.key in moves) {
      const next = rows[Math.max(0, Math.min(rows.length - 1, current === null && event.key === "ArrowDown" ? 0 : moves[event.key]))];
      select(next);
      focusRow(next);
    } else if (event.key === "ArrowRight") {
      if (node.open && node.children.length) { select(rows[Math.min(position + 1, rows.length - 1)]); focusRow(current); } else { toggle(node, true); focusRow(current); }
    } else if (event.key === "ArrowLeft") {
      if (node.open) toggle(node, false);
      else if (node.parent) select(node.parent);
      focusRow(current);
    } else if (event.key === "Enter" || event.key === " ") {
      toggle(node, !node.open);
      select(visibleOf(node));
      focusRow(current);
    } else return;
    event.preventDefault();
  }

  function onKey(event) {
    if (event.key === "/" && document.activeElement !== find("search")) {
      find("search").focus();
      event.preventDefault();
    } else if (event.key === "Escape") {
      clearFilters();
      render();
    } else if (event.key === "ArrowDown" && document.activeElement === find("search") && rows.length) {
      select(rows[0]);
      focusRow(rows[0]);
      event.preventDefault();
    } else if (event.key === "Enter" && document.activeElement === find("search")) {
      const next = rows.find((node) => matches(node));
      if (next) { select(next); focusRow(next); }
    }
  }

  const nodeAt = (target) => {
    const row = target.closest && target.closest(".row");
    return row ? all[Number(row.id.slice(4))] : null;
  };

  function tip(event) {
    const tooltip = find("tooltip");
    const node = event && nodeAt(event.target);
    const cell = node && event.target.closest(".lane");
    const place = cell && places[[...cell.parentElement.children].indexOf(cell) - 1];
    const text = node ? tipText(node, place) : "";
    tooltip.hidden = !text;
    if (!text) return;
    tooltip.textContent = text;
    const wide = tooltip.offsetWidth, high = tooltip.offsetHeight;
    tooltip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - wide - 8))}px`;
    tooltip.style.top = `${event.clientY + 18 + high > innerHeight ? event.clientY - high - 10 : event.clientY + 18}px`;
  }

  function tipText(node, place) {
    const ops = node.work.filter((member) => member.op && (!place || member.lane === place)).map((member) => member.op);
    if (node.kind === "leaf" || !ops.length) return "";
    if (node.kind === "op") return `${called(node.op)}: ${words[node.op.place]}\n${node.op.why}`;
    const reasons = counted(ops.filter((op) => op.own_reason || op.place !== "step").map((op) => op.why), 4);
    return `${count(ops.length, "operation")}\n${reasons || "depends on work of the step"}`;
  }

  // ------------------------------------------------------------------ the frame: summary, filters, tables

  function tile(kind, value, text) {
    return make("div", { class: `tile ${kind}` }, make("b", null, value), text);
  }

  function showSummary() {
    const counts = record.counts;
    const one = record.measured[0];
    const tiles = [tile("stage", `${counts.stage.toLocaleString("en")} of ${counts.operations.toLocaleString("en")}`, "operations run ahead")];
    const lookups = record.tables.reduce((sum, table) => sum + table.gathered_ahead.length + table.gathered_in_the_step.length, 0);
    if (lookups) tiles.push(tile("lookup", `${counts.lookup} of ${lookups}`, "lookups gathered ahead"));
    if (one && one.stage_seconds !== null) {
      if (one.forward_seconds !== null) {
        const share = Math.round((1 - one.step_seconds / one.forward_seconds) * 100);
        tiles.push(tile("step", `${time(one.forward_seconds)} → ${time(one.step_seconds)}`, `forward, in the step (${share > 0 ? "−" : "+"}${Math.abs(share)}%)`));
      }
      tiles.push(tile("stage", time(one.stage_seconds) || "0", "stage, beside the step"));
      tiles.push(tile("cut", size(one.cut_bytes), `in ${count(record.cut.length, "value")} cross per batch`));
    }
    const parts = [make("h1", null, record.model, " ", make("small", null, `${record.mode} mode, captured: ${record.rung}`)), make("div", { class: "tiles" }, tiles)];
    if (record.obstacle) parts.push(make("p", { class: "notice" }, ...prose(record.way)));
    for (const line of record.timing) parts.push(make("p", null, line));
    if (record.nothing_staged) parts.push(make("p", { class: "notice" }, "Nothing is staged: ", ...prose(record.nothing_staged)));
    if (one && one.problem) parts.push(make("p", { class: "notice" }, "The forward was not run: ", ...prose(one.problem)));
    if (record.measured.length > 1) parts.push(measurements());
    if (record.advice.length) {
      parts.push(make("h2", null, "What you could change"));
      parts.push(make("ul", { class: "advice" }, record.advice.map((advice) => make("li", null, ...prose(advice.text), " ", advice.node && items.has(advice.node) ? make("button", { type: "button", class: "link", onclick: () => reveal(items.get(advice.node), true) }, "show") : ""))));
    }
    find("summary").replaceChildren(...parts);
  }

  function table(head, lines, numeric) {
    const cell = (tag) => (text, position) => make(tag, { class: numeric.includes(position) ? "number" : null, scope: tag === "th" ? "col" : null }, text);
    return make("table", null, make("thead", null, make("tr", null, head.map(cell("th")))), make("tbody", null, lines.map((line) => make("tr", null, line.map(cell("td"))))));
  }

  function measurements() {
    const lines = record.measured.map((one) => [one.rows === null ? "–" : one.rows.toLocaleString("en"), time(one.forward_seconds) || "–", time(one.step_seconds) || "–", time(one.stage_seconds) || "–", one.stage_seconds === null ? one.problem : size(one.cut_bytes)]);
    return table(["rows", "forward", "left in the step", "stage", "crosses"], lines, [0, 1, 2, 3, 4]);
  }

  function showMore() {
    const parts = [];
    const byName = new Map(record.operations.map((op) => [op.name, op]));
    const values = record.cut.map((name) => byName.get(name)).filter(Boolean).sort((a, b) => ((b.value || {}).bytes || 0) - ((a.value || {}).bytes || 0));
    if (values.length) {
      const lines = values.slice(0, 200).map((op) => [jump(op.name), op.value ? op.value.form : "not run", op.value ? size(op.value.bytes) : "", make("code", null, op.source)]);
      parts.push(make("h2", null, "What crosses to the step"), table(["value", "form", "bytes", "source"], lines, [2]), make("p", { class: "quiet" }, values.length > 200 ? `and ${values.length - 200} smaller values` : ""));
    }
    if (record.tables.length) {
      const lines = record.tables.map((one) => [make("code", null, one.name), one.rows.toLocaleString("en"), one.columns.toLocaleString("en"), one.gathered_ahead.map(jump).flatMap((button) => [button, " "]), one.gathered_in_the_step.flatMap((kept) => [jump(kept.node), `: ${kept.why} `])]);
      parts.push(make("h2", null, "Trained tables"), table(["table", "rows", "columns", "gathered ahead", "gathered in the step"], lines, [1, 2]));
    }
    if (record.called_as_a_whole.length) parts.push(make("h2", null, "Called as a whole"), make("ul", { class: "advice" }, record.called_as_a_whole.map((one) => make("li", null, make("code", null, one.module), ": ", ...prose(one.why)))));
    if (record.decisions.length) parts.push(make("h2", null, "Holds for batches with which Python decides the same"), make("ul", { class: "advice" }, record.decisions.map((text) => make("li", null, ...prose(text)))));
    parts.push(make("p", { class: "quiet" }, `Times are of each part by itself, in one thread of Python, without backward and optimizer. Captured in ${time(record.seconds.capture)}, planned in ${time(record.seconds.plan)}; torch ${record.torch}.`));
    find("more").replaceChildren(...parts);
  }

  function showFilters() {
    const one = (kind, text, pressed, change) => make("button", { type: "button", class: kind, "aria-pressed": String(pressed), onclick: () => { change(); showFilters(); openMatches(); render(); } }, text);
    const flip = (place) => () => (shownPlaces.has(place) ? shownPlaces.delete(place) : shownPlaces.add(place));
    find("filters").replaceChildren(
      ...places.map((place) => one(place, { stage: "stage", lookup: "lookups", step: "step" }[place], shownPlaces.has(place), flip(place))),
      one("cause", "reasons only", causesOnly, () => { causesOnly = !causesOnly; }),
    );
  }

  function switchTheme(name) {
    document.documentElement.dataset.theme = name;
  }

  function start() {
    const wish = new URLSearchParams(location.hash.slice(1));
    if (wish.get("theme")) switchTheme(wish.get("theme"));
    document.documentElement.style.setProperty("--lanes", places.length);
    find("head").replaceChildren(make("span", null, "module, source line, operation"), ...places.map((place) => make("span", null, titles[place])));
    showSummary();
    showMore();
    showFilters();
    for (const id of ["summary", "more"]) find(id).hidden = false;
    find("main").hidden = record.operations.length === 0;
    if (wish.get("open") === "all") for (const node of all) node.open = node.children.length > 0;
    else if (wish.get("open") === "none") for (const root of roots) root.open = false;
    else openSome();
    find("search").value = wish.get("q") || "";
    search(find("search").value);
    showDetail(null);
    if (items.has(wish.get("select"))) reveal(items.get(wish.get("select")), true);

    find("search").addEventListener("input", (event) => search(event.target.value));
    find("nothing").querySelector("button").addEventListener("click", () => { clearFilters(); render(); find("search").focus(); });
    find("open-all").addEventListener("click", () => setAll(true));
    find("close-all").addEventListener("click", () => setAll(false));
    find("theme").addEventListener("click", () => {
      const dark = matchMedia("(prefers-color-scheme: dark)").matches;
      const now = document.documentElement.dataset.theme || (dark ? "dark" : "light");
      switchTheme(now === "dark" ? "light" : "dark");
    });
    const tree = find("rows");
    tree.addEventListener("keydown", onTreeKey);
    tree.addEventListener("click", (event) => {
      const node = nodeAt(event.target);
      if (!node) return;
      const caret = event.target.closest(".caret") || (node === current && node.children.length);
      select(node);
      if (caret) toggle(node, !node.open);
      focusRow(current);
    });
    tree.addEventListener("mousemove", (event) => { tip(event); });
    tree.addEventListener("mouseover", (event) => highlight(nodeAt(event.target) || current));
    tree.addEventListener("mouseleave", () => { tip(null); highlight(current); });
    document.addEventListener("keydown", onKey);
    new ResizeObserver(drawEdges).observe(find("sheet"));
    for (const key of (wish.get("keys") || "").split(",").filter(Boolean)) {
      (document.activeElement || document.body).dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
    }
    document.documentElement.dataset.ready = "yes";
  }

  addEventListener("error", (event) => { document.documentElement.dataset.error = event.message; });
  start();
})();
