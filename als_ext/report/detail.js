// Samples as pictures or numbers, and the panel about one relabel.
const pictures = page.pictures;
const tileOf = new Map(); // position of a sample -> its place among the embedded ones
const sheets = [];
let numbers = null;
if (pictures.kind !== "none") unpack(pictures.rows).forEach((row, i) => tileOf.set(row, i));
if (pictures.kind === "rows") numbers = unpack(pictures.values);
if (pictures.kind === "images") {
  for (const sheet of pictures.sheets) {
    const [head, data] = sheet.split(",");
    const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
    const type = head.slice("data:".length, head.indexOf(";"));
    sheets.push(URL.createObjectURL(new Blob([bytes], { type })));
  }
}

// The picture of a sample, its longer side `side` CSS pixels; null where it is not embedded.
function picture(row, side) {
  const tile = tileOf.get(row);
  if (tile === undefined || pictures.kind !== "images") return null;
  const [width, height] = pictures.size;
  const [across, down] = pictures.pitch;
  const scale = side / Math.max(width, height);
  const place = tile % pictures.perSheet;
  const sheetTiles = pictures.perRow;
  const x = (place % sheetTiles) * across * scale;
  const y = Math.floor(place / sheetTiles) * down * scale;
  const made = element("span", { className: "picture", role: "img", "aria-label": `sample ${row}` });
  made.classList.toggle("pixels", scale >= 2);
  made.style.width = `${width * scale}px`;
  made.style.height = `${height * scale}px`;
  made.style.backgroundImage = `url(${sheets[Math.floor(tile / pictures.perSheet)]})`;
  made.style.backgroundPosition = `${-x}px ${-y}px`;
  made.style.backgroundSize = `${sheetTiles * across * scale}px auto`;
  return made;
}

function valuesOf(row) {
  const tile = tileOf.get(row);
  if (tile === undefined || !numbers) return null;
  return numbers.subarray(tile * pictures.features, (tile + 1) * pictures.features);
}

const percent = (value) => `${(100 * value).toFixed(1)} %`;
const fixed = (value) => value.toFixed(3);

// What is known about a relabel: [heading, text].
function facts(i) {
  const found = [];
  if (page.files.length) found.push(["File", page.files[i]]);
  found.push(["Row", `${sourceRow(i)}`]);
  if (column.share) found.push(["Share of votes", percent(column.share[i])]);
  if (column.margin) found.push(["Margin", percent(column.margin[i])]);
  found.push(["Loss", `${fixed(column.loss[i])} nats`]);
  if (column.log_pi) found.push(["log π", `${fixed(column.log_pi[i])} nats`]);
  if (column.true) found.push(["True label", className(column.true[i])]);
  return found;
}

// The neighbours of a relabel: [position, label or given → new label], nearest first.
function neighbours(i) {
  const found = [];
  for (let k = i * page.near; k < (i + 1) * page.near; k++) {
    const [old, now] = [className(column.near_old[k]), className(column.near_new[k])];
    const same = column.near_old[k] === column.near_new[k];
    found.push([column.near[k], same ? now : `${old} → ${now}`]);
  }
  return found;
}

function neighbourList(i) {
  const list = element("ol", { className: "near" });
  for (const [row, text] of neighbours(i)) {
    list.append(element("li", {}, picture(row, 72) ?? "", text));
  }
  return list;
}

// Numbers of the sample beside those of its neighbours, a line each.
function valueTable(i) {
  const rows = [[column.row[i], "sample"], ...neighbours(i)];
  const head = element("tr", {}, element("td"));
  for (let f = 0; f < pictures.features; f++) head.append(element("th", { text: f, scope: "col" }));
  const body = element("tbody");
  for (const [row, name] of rows) {
    const values = valuesOf(row);
    if (!values) continue;
    const line = element("tr", {}, element("th", { text: name, scope: "row" }));
    for (const value of values) line.append(element("td", { text: Number(value.toPrecision(4)) }));
    body.append(line);
  }
  const label = "Numbers of the sample and its neighbours";
  const table = element("table", { className: "values", "aria-label": label }, element("thead", {}, head), body);
  return element("div", { className: "scroll", tabindex: 0, role: "region", "aria-label": label }, table);
}

// Fills the panel; `act` is called with the decision of its buttons.
function showDetail(i, act) {
  const panel = byId("detail");
  if (i === undefined) {
    panel.replaceChildren();
    return;
  }
  const change = element("p", { className: "change" }, className(column.old[i]), " → ",
    element("strong", { text: className(column.new[i]) }));
  const list = element("dl");
  for (const [name, text] of facts(i)) {
    list.append(element("dt", { text: name }), element("dd", { text }));
  }
  const state = WORDS[decisions[i]];
  list.append(element("dt", { text: "Decision" }), element("dd", { className: state, text: state }));
  const buttons = element("div", { className: "buttons" });
  for (const [text, decision] of [["Accept", ACCEPTED], ["Reject", REJECTED], ["Reopen", OPEN]]) {
    const button = element("button", { type: "button", text });
    if (decision !== OPEN) button.ariaPressed = decisions[i] === decision;
    button.addEventListener("click", () => act(decision));
    buttons.append(button);
  }
  const large = element("div", { className: "large" }, picture(column.row[i], 150) ?? "", list);
  const parts = [element("h3", { text: nameOf(i) }), change, large, buttons];
  if (page.near) parts.push(element("h4", { text: "Nearest neighbours" }));
  if (numbers && tileOf.has(column.row[i])) parts.push(valueTable(i));
  else if (page.near) parts.push(neighbourList(i));
  panel.replaceChildren(...parts);
}
