(() => {
  const report = document.currentScript && document.currentScript.previousElementSibling;
  const tables = (report || document).querySelectorAll("table.sortable");
  const key = (row, column) => {
    const cell = row.cells[column];
    if (cell.dataset.v !== undefined) return cell.dataset.v === "" ? "" : Number(cell.dataset.v);
    return cell.textContent.trim();
  };
  const compare = (a, b) =>
    typeof a === "number" && typeof b === "number"
      ? (a < b ? -1 : a > b ? 1 : 0)
      : String(a).localeCompare(String(b), undefined, { numeric: true });
  const sort = (table, head) => {
    const heads = [...head.parentNode.cells];
    const column = heads.indexOf(head);
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach((h) => h.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const rows = [...table.tBodies[0].rows].map((row) => ({ row, key: key(row, column) }));
    rows.sort((a, b) => {
      const empty = (a.key === "") - (b.key === "");
      return empty || (a.key === "" ? 0 : sign * compare(a.key, b.key));
    });
    table.tBodies[0].append(...rows.map((r) => r.row));
  };
  for (const table of tables) {
    if (table.dataset.ready) continue;
    table.dataset.ready = "1";
    for (const head of table.tHead.rows[0].cells) {
      head.addEventListener("click", () => sort(table, head));
      head.addEventListener("keydown", (e) => {
        if (e.key === "Enter" || e.key === " ") { e.preventDefault(); sort(table, head); }
      });
    }
  }
})();
