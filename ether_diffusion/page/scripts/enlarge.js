// Extras of pictures that enlarge: Enter opens one, Escape closes it, arrows go to the next and the previous one.
document.addEventListener("keydown", event => {
  const focused = event.target.closest?.(".enlarge input");
  const open = document.querySelector(".enlarge :checked");
  if (event.key === "Enter" && focused) {
    focused.checked = !focused.checked;
  } else if (event.key === "Escape" && open) {
    open.checked = false;
  } else if (event.key === "Tab" && open) {
    open.checked = false;
    return; // the focus moves on
  } else if (["ArrowRight", "ArrowLeft"].includes(event.key) && open) {
    const shown = [...document.querySelectorAll(".enlarge input")].filter(box => box.parentElement.getClientRects().length);
    const next = shown[shown.indexOf(open) + (event.key === "ArrowRight" ? 1 : -1)];
    if (next) {
      open.checked = false;
      next.checked = true;
      next.focus();
    }
  } else {
    return;
  }
  event.preventDefault();
});
