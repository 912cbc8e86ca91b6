// A blind comparison: names are hidden, columns change places in every row, a reader chooses, and the choices are kept.
{
  const panel = document.getElementById("blind");
  const table = document.getElementById(panel.dataset.of);
  const slider = document.querySelector(`.slider[data-of="${panel.dataset.of}"]`);
  const [toggle, save, forget] = panel.querySelectorAll("button");
  const [status, details] = [panel.querySelector("[role=status]"), panel.querySelector("details")];
  const key = `ether compare ${panel.dataset.comparison}`;
  const heads = [...table.tHead.rows[0].cells].slice(1); // without the base
  const names = heads.map(head => head.textContent);
  const plain = names.map((_, place) => place);
  const letter = place => String.fromCharCode(65 + place);
  let blind = false, votes = {};

  // Of a row's number the order in which its columns stood, and the column that was chosen; null is no preference.
  const sound = vote => Array.isArray(vote?.order) && vote.order.toSorted((a, b) => a - b).join() === plain.join()
    && (vote.choice === null || plain.includes(vote.choice));
  const load = () => {
    try {
      const kept = Object.entries(JSON.parse(localStorage.getItem(key)) ?? {});
      votes = Object.fromEntries(kept.filter(([number, vote]) => table.tBodies[number] && sound(vote)));
    } catch {
      votes = {}; // damaged, or this browser keeps nothing for files
    }
  };
  const keep = () => {
    try {
      localStorage.setItem(key, JSON.stringify(votes));
    } catch {
      panel.dataset.lost = "This browser keeps no choices: save them before you close the page.";
    }
  };
  const shuffled = () => {
    const order = [...plain];
    for (let last = order.length - 1; last > 0; last--) {
      const other = Math.floor(Math.random() * (last + 1));
      [order[last], order[other]] = [order[other], order[last]];
    }
    return order;
  };

  const rows = [...table.tBodies].map((body, number) => {
    const [base, ...cells] = body.rows[1].cells;
    const what = `${body.dataset.prompt}, seed ${body.dataset.seed}`;
    const pictures = cells.map(cell => {
      const [image, box] = [cell.querySelector("img"), cell.querySelector("input")];
      return { image, box, alt: image.alt };
    });
    const buttons = [base, ...cells].map((cell, place) => {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "choose";
      button.addEventListener("click", () => {
        votes[number] = { order: row.order, choice: place ? place - 1 : null };
        keep();
        show();
      });
      cell.append(button);
      return button;
    });
    const row = { number, line: body.rows[1], cells, what, pictures, buttons, order: plain };
    return row;
  });

  const arrange = () => {
    for (const row of rows) {
      row.order = blind ? votes[row.number]?.order ?? shuffled() : plain;
      row.line.append(...row.order.map(column => row.cells[column]));
    }
    heads.forEach((head, place) => { head.textContent = blind ? letter(place) : names[place]; });
    if (slider) slider.hidden = blind;
    show();
  };
  const show = () => {
    for (const { number, cells, what, pictures, buttons, order } of rows) {
      const vote = votes[number];
      cells.forEach((cell, column) => {
        const { image, box, alt } = pictures[column];
        const text = blind ? `Picture ${letter(order.indexOf(column))}: ${what}` : alt;
        image.alt = text;
        box.ariaLabel = `Enlarge ${text}`;
        cell.classList.toggle("chosen", vote?.choice === column);
      });
      buttons.forEach((button, place) => {
        const text = place ? `Choose ${letter(order.indexOf(place - 1))}` : "No preference";
        button.textContent = text;
        button.ariaLabel = `${text}: ${what}`;
        button.hidden = !blind;
        button.ariaPressed = String(vote !== undefined && vote.choice === (place ? place - 1 : null));
      });
    }
    const given = Object.values(votes);
    const wins = names.map((name, column) => `${name} ${given.filter(vote => vote.choice === column).length}`);
    const counts = [...wins, `no preference ${given.filter(vote => vote.choice === null).length}`].join(", ");
    status.textContent = `${given.length} of ${rows.length} rows judged${blind || !given.length ? "." : `: ${counts}.`} ${panel.dataset.lost ?? ""}`;
    toggle.textContent = blind ? "Show the names" : "Compare blind";
    toggle.ariaPressed = String(blind);
    save.hidden = details.hidden = !given.length;
  };

  toggle.addEventListener("click", () => { blind = !blind; arrange(); });
  forget.addEventListener("click", () => { votes = {}; keep(); details.open = false; arrange(); toggle.focus(); });
  save.addEventListener("click", () => {
    const told = Object.entries(votes).map(([number, { order, choice }]) => {
      const { prompt, seed } = table.tBodies[number].dataset;
      return { prompt, seed: Number(seed), order, choice };
    });
    const file = { format: 1, comparison: panel.dataset.comparison, columns: names, rows: rows.length, votes: told };
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify(file, null, 1)], { type: "application/json" }));
    link.download = `votes-${panel.dataset.comparison}.json`;
    link.click();
    URL.revokeObjectURL(link.href);
  });

  load();
  blind = location.hash === "#blind";
  panel.hidden = false;
  arrange();
}
