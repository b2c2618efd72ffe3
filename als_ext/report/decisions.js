// Accepted and rejected relabels: kept in this browser, undone, exported and imported.
const OPEN = 0, ACCEPTED = 1, REJECTED = 2;
const WORDS = ["open", "accepted", "rejected"];
const ENTRIES = { accept: ACCEPTED, reject: REJECTED };
const decisions = new Uint8Array(count);
const tally = [count, 0, 0];
const past = []; // what undo takes back: {at: positions, was: decisions}
const KEPT = `als_ext ${page.method} ${page.digest} ${page.proposal}`;

function decide(positions, decision) {
  const at = positions.filter((i) => decisions[i] !== decision);
  if (!at.length) return 0;
  past.push({ at, was: at.map((i) => decisions[i]) });
  for (const i of at) set(i, decision);
  keep();
  return at.length;
}

function set(i, decision) {
  tally[decisions[i]]--;
  tally[decision]++;
  decisions[i] = decision;
}

function undo() {
  const step = past.pop();
  if (!step) return 0;
  step.at.forEach((i, k) => set(i, step.was[k]));
  keep();
  return step.at.length;
}

// Decisions survive a closed tab where the browser allows it; the export is what counts.
let waiting;
function keep() {
  clearTimeout(waiting);
  waiting = setTimeout(keepNow, 300);
}
function keepNow() {
  try {
    localStorage.setItem(KEPT, decisions.join(""));
  } catch { /* no storage, or full */ }
}
addEventListener("pagehide", keepNow);

function restore() {
  let text = null;
  try {
    text = localStorage.getItem(KEPT);
  } catch { /* no storage */ }
  if (text === null || text.length !== count || /[^012]/.test(text)) return;
  for (let i = 0; i < count; i++) set(i, Number(text[i]));
}

function exported() {
  const lines = [];
  for (let i = 0; i < count; i++) {
    if (decisions[i] === OPEN) continue;
    lines.push(JSON.stringify({
      row: column.row[i],
      index: sourceRow(i),
      old: column.old[i],
      new: column.new[i],
      decision: decisions[i] === ACCEPTED ? "accept" : "reject",
    }));
  }
  const head = {
    format: page.format,
    version: page.version,
    method: page.method,
    samples: page.samples,
    num_classes: page.classes.length,
    labels_sha256: page.digest,
  };
  const open = JSON.stringify(head, null, 1).slice(0, -2);
  return `${open},\n "decisions": [\n${lines.join(",\n")}\n ]\n}\n`;
}

// Takes a file that was exported here or by another report about the same labels.
function imported(text) {
  const file = JSON.parse(text);
  if (file?.format !== page.format || file.version !== page.version) {
    throw new Error("it is no file of decisions");
  }
  if (file.labels_sha256 !== page.digest) throw new Error("it is about other labels");
  if (!Array.isArray(file.decisions)) throw new Error("it has no list of decisions");
  const place = new Map();
  column.row.forEach((row, i) => place.set(row, i));
  const found = { at: [], decision: [] };
  let other = 0;
  for (const entry of file.decisions) {
    const i = place.get(entry?.row);
    const decision = Object.hasOwn(ENTRIES, entry?.decision) ? ENTRIES[entry.decision] : OPEN;
    if (i === undefined || decision === OPEN || entry.new !== column.new[i]) {
      other++;
      continue;
    }
    found.at.push(i);
    found.decision.push(decision);
  }
  if (found.at.length) past.push({ at: found.at, was: found.at.map((i) => decisions[i]) });
  found.at.forEach((i, k) => set(i, found.decision[k]));
  keep();
  return { taken: found.at.length, other };
}
