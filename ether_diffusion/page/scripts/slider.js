// Two pictures of a row of table.grid over one another: the slider moves the border between them.
for (const section of document.querySelectorAll("section.slider")) {
  const table = document.getElementById(section.dataset.of);
  const columns = [...table.tHead.rows[0].cells].map((head, place) => ({ place, head }))
    .filter(({ head }) => head.dataset.column !== undefined);
  const rows = [...table.tBodies];
  if (columns.length < 2 || !rows.length) continue;
  const [left, right, row] = section.querySelectorAll("select");
  const [pair, range] = [section.querySelector(".pair"), section.querySelector("[type=range]")];
  const images = [document.createElement("img"), document.createElement("img")];
  const option = (text, value) => Object.assign(document.createElement("option"), { textContent: text, value });
  for (const select of [left, right]) {
    select.append(...columns.map(({ place, head }) => option(head.textContent, place)));
  }
  row.append(...rows.map((body, place) => option(body.querySelector("th").innerText.replace(/\s+/g, " "), place)));
  right.selectedIndex = columns.length - 1;
  const picture = select => rows[row.value].rows[1].cells[select.value].querySelector("img");
  const show = () => {
    [left, right].forEach((select, side) => {
      const shown = picture(select);
      images[side].hidden = !shown;
      images[side].src = shown ? shown.src : "";
      images[side].alt = shown ? shown.alt : "";
    });
    move();
  };
  const move = () => {
    pair.style.setProperty("--cut", `${range.value}%`);
    const name = left.selectedOptions[0].textContent;
    range.setAttribute("aria-valuetext", `${range.value} % of the picture: ${name}`);
  };
  for (const select of [left, right, row]) select.addEventListener("change", show);
  range.addEventListener("input", move);
  pair.prepend(...images);
  section.hidden = false;
  show();
}
