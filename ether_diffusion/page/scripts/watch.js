// Loads the page again when the server has newer files, but not under the hands of a reader who is using it.
{
  const notice = document.getElementById("newer");
  const busy = () => document.querySelector(".enlarge :checked")
    || document.activeElement.matches("select, [type=range], [type=search]");
  setInterval(async () => {
    const answer = await fetch("state").catch(() => null);
    if (!answer || !answer.ok || await answer.text() === notice.dataset.shown) return;
    if (busy()) notice.hidden = false;
    else location.reload();
  }, 2000);
}
