// Before the page is painted, and so no module: the theme that was chosen here last. None: the system's.
(() => {
  let chosen = null;
  try {
    chosen = localStorage.getItem("theme");
  } catch {
    // storage is switched off
  }
  if (chosen) document.documentElement.dataset.theme = chosen;
})();
