// Light, dark, or as the system says; and storage that may be disabled.

import { byId } from "./dom.js";

const NAMES = { auto: "system", light: "light", dark: "dark" };

export function store(name, value, where = "localStorage") {
  try {
    window[where].setItem(name, value);
  } catch {
    // storage is disabled
  }
}

export function load(name, where = "localStorage") {
  try {
    return window[where].getItem(name);
  } catch {
    return null;
  }
}

function show(name) {
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  byId("theme").textContent = `Theme: ${NAMES[name]}`;
  byId("theme").dataset.now = name;
}

/** Show the stored theme, and let the button change it. */
export function startTheme() {
  const stored = load("ivg.theme");
  show(stored in NAMES ? stored : "auto");
  byId("theme").addEventListener("click", () => {
    const names = Object.keys(NAMES), name = names[(names.indexOf(byId("theme").dataset.now) + 1) % names.length];
    show(name);
    store("ivg.theme", name);
  });
}
