"use strict";
// Theme, sorting and filtering: what the page does without its plots.
(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const themes = ["auto", "light", "dark"];

  const stored = () => {
    try { return localStorage.getItem("dfmpc-theme"); } catch { return null; } // files of some browsers have no storage
  };
  const keep = (name) => {
    try { localStorage.setItem("dfmpc-theme", name); } catch { /* it then holds until the page is left */ }
  };
  const show = (name) => {
    if (name === "auto") delete root.dataset.theme;
    else root.dataset.theme = name;
    button.textContent = `Theme: ${name}`;
    button.dataset.name = name;
    document.dispatchEvent(new Event("themechange"));
  };
  button.addEventListener("click", () => {
    const name = themes[(themes.indexOf(button.dataset.name) + 1) % themes.length];
    keep(name);
    show(name);
  });
  show(themes.includes(stored()) ? stored() : "auto");

  const table = document.getElementById("tasks");
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const lines = [...body.rows];

  // Unknown values stay at the end whichever way it goes; equal ones keep the order of the page: the worst first.
  const compare = (index, number, sign) => (one, other) => {
    const [a, b] = [one.cells[index].dataset.v, other.cells[index].dataset.v];
    if (a === "" || b === "") return (a === "") - (b === "");
    return sign * (number ? a - b : a.localeCompare(b, undefined, { numeric: true }));
  };
  heads.forEach((head, index) => head.firstElementChild.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((other) => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...[...lines].sort(compare(index, head.classList.contains("num"), down ? -1 : 1)));
  }));

  const find = document.getElementById("find");
  const chips = [...document.querySelectorAll(".filters .chip")];
  const shown = document.getElementById("shown");
  const filter = () => {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    const chosen = { status: [], gate: [] };
    for (const chip of chips) if (chip.getAttribute("aria-pressed") === "true") chosen[chip.dataset.kind].push(chip.dataset.name);
    let count = 0;
    for (const line of lines) {
      const kinds = ["status", "gate"].every((kind) => !chosen[kind].length || chosen[kind].includes(line.dataset[kind]));
      line.hidden = !(kinds && words.every((word) => line.dataset.text.includes(word)));
      count += !line.hidden;
    }
    const noun = lines.length === 1 ? "task" : "tasks";
    shown.textContent = count === lines.length ? `${count} ${noun}, worst first until sorted` : `${count} of ${lines.length} ${noun}`;
  };
  find.addEventListener("input", filter);
  for (const chip of chips) chip.addEventListener("click", () => {
    chip.setAttribute("aria-pressed", String(chip.getAttribute("aria-pressed") !== "true"));
    filter();
  });
  filter();
})();
