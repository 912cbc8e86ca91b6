// A form.methods shows only the cells of the methods that are checked and contain all words of its field; a link to a
// place inside closed details opens them.
for (const form of document.querySelectorAll("form.methods")) {
  const boxes = [...form.querySelectorAll("input[type=checkbox]")];
  const field = form.querySelector("input[type=search]");
  const cells = document.querySelectorAll(`[data-of="${form.dataset.of}"][data-method]`);
  form.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = box => box.checked && words.every(word => box.dataset.words.toLowerCase().includes(word));
    const shown = new Set(boxes.filter(wanted).map(box => box.value));
    for (const cell of cells) cell.classList.toggle("off", !shown.has(cell.dataset.method));
    form.querySelector("[role=status]").textContent = `${shown.size} of ${boxes.length} methods`;
  });
  form.addEventListener("submit", event => event.preventDefault());
  form.hidden = false;
}
for (const link of document.querySelectorAll('a[href^="#"]')) {
  link.addEventListener("click", () => {
    const details = document.getElementById(link.hash.slice(1))?.closest("details");
    if (details) details.open = true;
  });
}
