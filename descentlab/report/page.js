"use strict";
// Click (or Enter on) a table head: sort by it, again: the other way. Numbers by value, empty cells always last.
function compare(a, b) {
  const x = Number(a), y = Number(b);
  return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, "en", { numeric: true }) : x - y;
}
function number(text) {
  return text === "inf" ? "Infinity" : text === "-inf" ? "-Infinity" : text;
}
document.querySelectorAll("table.sortable").forEach((table) => {
  const heads = Array.from(table.tHead.rows[0].cells);
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const body = table.tBodies[0];
      Array.from(body.rows)
        .map((row) => [number(row.cells[column].dataset.sort), row])
        .sort(([a], [b]) => {
          if (a === "" || b === "") return (a === "") - (b === "");
          return down ? compare(b, a) : compare(a, b);
        })
        .forEach(([, row]) => body.append(row));
    });
  });
});
window.addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => { d.open = true; }));
