"use strict";
// Light or dark: the reader's system decides until the button does.
const root = document.documentElement;
try { root.dataset.theme = localStorage.getItem("vqflow-theme") || ""; } catch { /* no storage from disk */ }
document.getElementById("theme").addEventListener("click", () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  try { localStorage.setItem("vqflow-theme", root.dataset.theme); } catch { /* no storage from disk */ }
});

// Sorting: numbers by value, highest first at the first click; names from A; cells without a value always last.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const first = column ? "descending" : "ascending";
    const other = first === "descending" ? "ascending" : "descending";
    const order = head.getAttribute("aria-sort") === first ? other : first;
    heads.forEach(h => h.setAttribute("aria-sort", h === head ? order : "none"));
    const value = row => row.cells[column].dataset.value;
    const sign = order === "ascending" ? 1 : -1;
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      return sign * (column ? Number(x) - Number(y) : x.localeCompare(y, "en", { numeric: true }));
    });
    body.append(...rows);
  }));
}

// A legend's entry brings its line out in all charts of the section: under the pointer, or for good by a click.
for (const section of document.querySelectorAll(".highlights")) {
  const entries = [...section.querySelectorAll(".legend button")];
  let held = null;
  const show = chosen => {
    section.classList.toggle("focused", chosen !== null);
    for (const line of section.querySelectorAll(".series")) line.classList.toggle("on", line.dataset.series === chosen);
  };
  for (const entry of entries) {
    entry.addEventListener("mouseenter", () => show(entry.dataset.series));
    entry.addEventListener("mouseleave", () => show(held));
    entry.addEventListener("click", () => {
      held = held === entry.dataset.series ? null : entry.dataset.series;
      entries.forEach(e => e.setAttribute("aria-pressed", String(e.dataset.series === held)));
      show(held);
    });
  }
}

// A table that is wider than the page says so.
const tellWide = () => document.querySelectorAll(".scroll").forEach(s => s.classList.toggle("wide", s.scrollWidth > s.clientWidth + 1));
addEventListener("resize", tellWide);
tellWide();

// Enlarging: the dialog element closes on Escape and gives the focus back by itself.
const box = document.getElementById("lightbox"), shots = [...document.querySelectorAll(".shot")];
const large = document.getElementById("large"), output = document.getElementById("value");
let current = 0;

// The value under the pointer: each byte is the highest value in a cell of the map.
const read = event => {
  const frame = event && event.target.closest(".frame");
  if (!frame) { output.textContent = "Point at the picture to read the map's value."; return; }
  const area = frame.getBoundingClientRect(), bytes = atob(large.querySelector(".heat").dataset.levels);
  const side = Math.round(Math.sqrt(bytes.length));
  const cell = share => Math.min(side - 1, Math.max(0, Math.floor(share * side)));
  const row = cell((event.clientY - area.top) / area.height), column = cell((event.clientX - area.left) / area.width);
  const byte = bytes.charCodeAt(row * side + column), value = (byte * large.dataset.step).toFixed(2);
  output.textContent = `${byte === 255 ? "at least " : ""}${value} here${value > 1 ? "" : ", as in normal images"}`;
};
large.addEventListener("pointermove", read);
large.addEventListener("pointerdown", read);
large.addEventListener("pointerleave", () => read(null));

const enlarge = index => {
  current = (index + shots.length) % shots.length;
  const shot = shots[current], kind = shot.closest(".kind"), title = kind.querySelector("h4").firstChild.textContent;
  large.replaceChildren(shot.querySelector(".pair").cloneNode(true));
  document.getElementById("place").textContent = `${shot.closest("article").querySelector("h3").textContent} · ${title.trim()}`;
  document.getElementById("about").textContent = [...shot.querySelectorAll(".caption > span")].map(s => s.textContent).join(" · ");
  read(null);
  if (!box.open) box.showModal();
};
shots.forEach((shot, index) => shot.addEventListener("click", () => enlarge(index)));
document.getElementById("close").addEventListener("click", () => box.close());
document.getElementById("previous").addEventListener("click", () => enlarge(current - 1));
document.getElementById("next").addEventListener("click", () => enlarge(current + 1));
box.addEventListener("click", event => { if (event.target === box) box.close(); });
box.addEventListener("keydown", event => {
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (step) { event.preventDefault(); enlarge(current + step); }
});
