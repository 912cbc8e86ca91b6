// A table with many rows gets a field: only rows that have all of its words are shown. In table.grid a row is a tbody.
{
  const MANY = 6;
  for (const table of document.querySelectorAll("table.sortable, table.grid")) {
    const rows = table.matches(".grid") ? [...table.tBodies] : [...table.tBodies[0].rows];
    if (rows.length < MANY) continue;
    const region = table.closest(".scroll");
    const field = document.createElement("input");
    field.type = "search";
    field.ariaLabel = `Filter: ${region.ariaLabel}`;
    field.placeholder = "Filter rows";
    const count = document.createElement("span");
    count.role = "status";
    field.addEventListener("input", () => {
      const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
      for (const row of rows) row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));
      count.textContent = words.length ? `${rows.filter(row => !row.hidden).length} of ${rows.length} rows` : "";
    });
    const line = document.createElement("p");
    line.className = "filter";
    line.append(field, count);
    region.before(line);
  }
}
