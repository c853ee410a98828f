// Sliders for several values at once: weights of token guidance, and of selection.

import { byId, make } from "./dom.js";
import { slider } from "./controls.js";

/** The weights of one level. */
export class Mix {
  /**
   * @param {string} level `weight` (of token guidance) or `select` (of selection): how the ids of the sliders begin
   * @param {string} single, several: fields of a method, for one value and for several with weights
   * @param {HTMLElement} box the fieldset
   * @param {string[]} names of the values
   */
  constructor({ level, single, several, box, names }) {
    Object.assign(this, { level, single, several, box, names });
    const ends = () => make("div", { class: "ends", "aria-hidden": "true" }, make("span", {}, "less"), make("span", {}, "more"));
    const sliders = names.map((name) => slider({ id: this.id(name), label: name, min: -2, max: 2, step: 0.1 }));
    for (const one of sliders) one.append(ends());
    box.querySelector(".weights").replaceChildren(...sliders);
  }

  id(name) {
    return `${this.level}-${name}`;
  }

  /** The method's own weight of a value. */
  own(method, name) {
    const weights = method[this.several];
    if (weights && Object.keys(weights).length) return weights[name] ?? 0;
    return method[this.single] === name ? 1 : 0;
  }

  reset(method) {
    for (const name of this.names) byId(this.id(name)).value = this.own(method, name);
  }

  /** The weights as they are set, those that are 0 included; null where they are the method's. */
  changed(method) {
    const set = Object.fromEntries(this.names.map((name) => [name, Number(byId(this.id(name)).value)]));
    if (this.names.every((name) => set[name] === this.own(method, name))) return null;
    const others = Object.entries({ ...(method[this.single] ? { [method[this.single]]: 1 } : {}), ...method[this.several] });
    return { ...Object.fromEntries(others.filter(([name]) => !this.names.includes(name))), ...set };
  }

  /** For a link. */
  write(method) {
    const set = this.changed(method);
    return set && this.names.map((name) => `${name}:${set[name]}`).join(",");
  }

  read(text) {
    for (const pair of (text ?? "").split(",")) {
      const at = pair.lastIndexOf(":"), input = at > 0 ? byId(this.id(pair.slice(0, at))) : null;
      if (input) input.value = pair.slice(at + 1);
    }
  }
}

/** Weights without those that are 0. */
export function nonzero(weights) {
  return Object.fromEntries(Object.entries(weights).filter(([, w]) => w));
}
