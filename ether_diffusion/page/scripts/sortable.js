// Every table.sortable sorts by a click on a heading; data-kind="text" sorts by letters, else by data-value.
for (const table of document.querySelectorAll("table.sortable")) {
  table.querySelectorAll("thead th").forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const descending = head.ariaSort !== "descending";
      const text = head.dataset.kind === "text";
      const value = row => {
        const cell = row.cells[column];
        return text ? cell.textContent.trim() : cell.dataset.value === "" ? NaN : Number(cell.dataset.value);
      };
      const order = (a, b) => text ? value(a).localeCompare(value(b))
        : Number.isNaN(value(a)) - Number.isNaN(value(b)) || (descending ? value(b) - value(a) : value(a) - value(b));
      const rows = [...table.tBodies[0].rows].sort(order);
      if (text && descending) rows.reverse();
      for (const other of table.querySelectorAll("thead th")) other.ariaSort = "none";
      head.ariaSort = descending ? "descending" : "ascending";
      table.tBodies[0].append(...rows);
    });
  });
}
