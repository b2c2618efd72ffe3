// The list: filters, order, pages, keys.
const PAGE = 50; // rows
const ORDERS = {
  margin: ["least margin first", 1], share: ["least share first", 1],
  loss: ["highest loss first", -1], log_pi: ["highest π first", -1], row: ["by row", 1],
};
const COLUMNS = [
  ["Row", (i) => [sourceRow(i)]],
  ["Decision", (i) => [WORDS[decisions[i]], `left ${WORDS[decisions[i]]}`]],
  ["Given", (i) => [className(column.old[i]), "left class"]],
  ["New", (i) => [className(column.new[i]), "left class"]],
  ["Share", (i) => [percent(column.share[i])], "share"],
  ["Margin", (i) => [percent(column.margin[i])], "margin"],
  ["Loss", (i) => [fixed(column.loss[i])]],
  ["log π", (i) => [fixed(column.log_pi[i])], "log_pi"],
  ["True", (i) => [className(column.true[i]), "left class"], "true"],
].filter(([, , needs]) => !needs || column[needs]);

const form = byId("filters");
let shown = []; // positions that pass the filters, in order
let current = 0; // place in `shown`

function filtered() {
  const value = Object.fromEntries(new FormData(form));
  const low = value.low === "" ? -Infinity : Number(value.low) / 100;
  const high = value.high === "" ? Infinity : Number(value.high) / 100;
  const find = value.find.trim().toLowerCase();
  const truth = {
    right: (i) => column.true[i] === column.new[i],
    kept: (i) => column.true[i] === column.old[i],
    neither: (i) => column.true[i] !== column.new[i] && column.true[i] !== column.old[i],
  }[value.truth];
  const passes = (i) =>
    (value.old === "" || column.old[i] === Number(value.old)) &&
    (value.new === "" || column.new[i] === Number(value.new)) &&
    (value.decision === "" || decisions[i] === Number(value.decision)) &&
    (!column.share || (column.share[i] >= low - 5e-7 && column.share[i] <= high + 5e-7)) &&
    (!truth || truth(i)) &&
    (!find || `${sourceRow(i)}` === find || (page.files.length > 0 && page.files[i].toLowerCase().includes(find)));
  const found = [];
  for (let i = 0; i < count; i++) if (passes(i)) found.push(i);
  const keys = column[value.sort];
  const sign = ORDERS[value.sort][1];
  if (value.sort !== "row") found.sort((a, b) => sign * (keys[a] - keys[b]) || a - b);
  return found;
}

function refilter(message = "") {
  shown = filtered();
  current = 0;
  render();
  say(message);
}

function clearFilters() {
  for (const field of form.elements) if (field.name && field.name !== "sort") field.value = "";
}

function say(message = "") {
  const number = (value) => value.toLocaleString("en");
  byId("status").textContent =
    `${message}${message && " "}${number(shown.length)} of ${number(count)} relabels shown. ` +
    `${number(tally[ACCEPTED])} accepted, ${number(tally[REJECTED])} rejected, ${number(tally[OPEN])} open.`;
}

const pageOf = (at) => Math.floor(at / PAGE);
const lastPage = () => Math.max(0, pageOf(shown.length - 1));

function render() {
  const from = pageOf(current) * PAGE;
  const rows = shown.slice(from, from + PAGE).map((i, k) => {
    const row = element("tr", { tabindex: from + k === current ? 0 : -1 });
    if (sheets.length) row.append(element("td", {}, picture(column.row[i], 36) ?? ""));
    for (const [, cell] of COLUMNS) {
      const [text, className] = cell(i);
      const made = element("td", { text, className });
      if (className?.endsWith("class")) made.title = text; // where it is cut off
      row.append(made);
    }
    row.addEventListener("click", () => go(from + k));
    return row;
  });
  byId("rows").replaceChildren(...rows);
  byId("page").value = pageOf(current) + 1;
  byId("page").max = byId("pages").textContent = lastPage() + 1;
  // Not disabled: the focus would be lost with the last page.
  for (const id of ["first", "previous"]) byId(id).ariaDisabled = pageOf(current) === 0;
  for (const id of ["next", "last"]) byId(id).ariaDisabled = pageOf(current) === lastPage();
  byId("undo").ariaDisabled = past.length === 0;
  mark();
}

// Shows which row is current, and the panel about it.
function mark() {
  [...byId("rows").children].forEach((row, k) => {
    const here = k === current % PAGE;
    row.tabIndex = here ? 0 : -1;
    row.ariaCurrent = here ? "true" : null;
  });
  showDetail(shown[current], (decision) => act([shown[current]], decision));
}

function go(at, focus = true) {
  if (!shown.length) return;
  const before = pageOf(current);
  current = Math.min(Math.max(at, 0), shown.length - 1);
  if (pageOf(current) === before) mark();
  else render();
  if (focus) byId("rows").children[current % PAGE].focus();
}

// Decides and says so; from the panel the focus stays on the button that was pressed.
function act(positions, decision) {
  const buttons = byId("detail").querySelector(".buttons");
  const pressed = [...(buttons?.children ?? [])].indexOf(document.activeElement);
  const changed = decide(positions, decision);
  render();
  const one = positions.length === 1 ? `${nameOf(positions[0])}: ` : `${changed} relabels: `;
  say(`${one}${WORDS[decision]}.`);
  if (pressed >= 0) byId("detail").querySelector(".buttons").children[pressed].focus();
}

function takeBack() {
  const changed = undo();
  render();
  say(changed ? `${changed} undone.` : "Nothing to undo.");
}

const KEYS = {
  ArrowDown: () => go(current + 1), j: () => go(current + 1),
  ArrowUp: () => go(current - 1), k: () => go(current - 1),
  PageDown: () => go(current + PAGE), PageUp: () => go(current - PAGE),
  Home: () => go(0), End: () => go(shown.length - 1),
  a: () => decideHere(ACCEPTED), r: () => decideHere(REJECTED), o: () => decideHere(OPEN),
  z: () => { takeBack(); go(current); },
};

// Decides about the current row and goes on to the next.
function decideHere(decision) {
  act([shown[current]], decision);
  go(current + 1);
}

function start() {
  if (!form) return; // nothing was relabelled
  for (const [name, [text]] of Object.entries(ORDERS)) {
    if (column[name]) form.elements.sort.append(element("option", { value: name, text }));
  }
  if (sheets.length) byId("head").append(element("th", { scope: "col", text: "Sample" }));
  for (const [text] of COLUMNS) {
    const className = ["Decision", "Given", "New", "True"].includes(text) ? "left" : "";
    byId("head").append(element("th", { scope: "col", text, className }));
  }
  form.addEventListener("input", () => refilter());
  byId("reset").addEventListener("click", () => { clearFilters(); refilter(); });
  form.addEventListener("submit", (event) => event.preventDefault());
  byId("rows").addEventListener("keydown", (event) => {
    const action = KEYS[event.key];
    if (!action || event.ctrlKey || event.metaKey || event.altKey || !shown.length) return;
    event.preventDefault();
    action();
  });
  byId("first").addEventListener("click", () => go(0, false));
  byId("previous").addEventListener("click", () => go((pageOf(current) - 1) * PAGE, false));
  byId("next").addEventListener("click", () => go((pageOf(current) + 1) * PAGE, false));
  byId("last").addEventListener("click", () => go(lastPage() * PAGE, false));
  byId("page").addEventListener("change", (event) => go((Number(event.target.value) - 1) * PAGE || 0, false));
  for (const [id, decision] of [["accept-all", ACCEPTED], ["reject-all", REJECTED], ["clear-all", OPEN]]) {
    byId(id).addEventListener("click", () => act(shown, decision));
  }
  byId("undo").addEventListener("click", takeBack);
  byId("export").addEventListener("click", () => {
    const url = URL.createObjectURL(new Blob([exported()], { type: "application/json" }));
    const link = element("a", { href: url, download: `decisions-${page.method}.json` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
    say("Exported.");
  });
  byId("import").addEventListener("change", async (event) => {
    const [file] = event.target.files;
    event.target.value = ""; // the same file may be chosen again
    if (!file) return;
    try {
      const { taken, other } = imported(await file.text());
      refilter(`${taken} decisions taken${other ? `, ${other} about other relabels left out` : ""}.`);
    } catch (error) {
      say(`Not imported: ${error.message}.`);
    }
  });
  for (const button of document.querySelectorAll(".pair")) {
    button.addEventListener("click", () => {
      clearFilters();
      form.elements.old.value = button.dataset.old;
      form.elements.new.value = button.dataset.new;
      refilter();
      byId("review").scrollIntoView();
      go(0);
    });
  }
  restore();
  refilter();
}

start();
