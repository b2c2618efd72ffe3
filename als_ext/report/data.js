// What the page is about: columns of numbers, one entry a relabel.
const ARRAYS = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, f4: Float32Array };

function unpack(column) {
  const text = atob(column.data);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return new ARRAYS[column.type](bytes.buffer); // little-endian, as every browser's machine
}

const page = JSON.parse(document.getElementById("data").textContent);
const column = Object.fromEntries(
  Object.entries(page.columns).map(([name, packed]) => [name, unpack(packed)]),
);
const count = page.count;
const className = (label) => page.classes[label];
const sourceRow = (i) => (column.index ? column.index[i] : column.row[i]);
const nameOf = (i) => (page.files.length ? page.files[i] : `row ${sourceRow(i)}`);
const byId = (id) => document.getElementById(id);

// Text goes in as text, never as markup.
function element(tag, { className, text, ...attributes } = {}, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}
