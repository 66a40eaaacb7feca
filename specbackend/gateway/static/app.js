// The page: tabs, theme, and the three views.

import { startCache } from "./cache.js";
import { $ } from "./dom.js";
import { startLive } from "./live.js";
import { startPlayground } from "./playground.js";

const tabs = [...document.querySelectorAll("[role=tab]")];

function show(name) {
  for (const tab of tabs) {
    const chosen = tab.getAttribute("aria-controls") === name;
    tab.setAttribute("aria-selected", String(chosen));
    tab.tabIndex = chosen ? 0 : -1;
    $(tab.getAttribute("aria-controls")).hidden = !chosen;
  }
  document.dispatchEvent(new CustomEvent("shown", { detail: name }));
}

function startTabs() {
  const names = tabs.map((tab) => tab.getAttribute("aria-controls"));
  const fromAddress = () => show(names.includes(location.hash.slice(1)) ? location.hash.slice(1) : names[0]);
  const turns = { ArrowRight: 1, ArrowLeft: tabs.length - 1 };
  tabs.forEach((tab, index) => {
    tab.addEventListener("click", () => {
      history.replaceState(null, "", `#${names[index]}`);
      show(names[index]);
    });
    tab.addEventListener("keydown", (event) => {
      if (!(event.key in turns)) return;
      const next = tabs[(index + turns[event.key]) % tabs.length];
      next.click();
      next.focus();
    });
  });
  addEventListener("hashchange", fromAddress);
  fromAddress();
}

function startTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  $("theme").addEventListener("click", () => {
    const { dataset } = document.documentElement;
    const now = dataset.theme ?? (dark.matches ? "dark" : "light");
    dataset.theme = now === "dark" ? "light" : "dark";
    try {
      localStorage.setItem("theme", dataset.theme);
    } catch {
      // storage is switched off: the choice lasts as long as the page
    }
  });
}

startTheme();
startLive();
startCache();
startPlayground();
startTabs();
