"use strict";

// Texts of the marks: appear at once next to the pointer. Without scripts the browser shows them.
const tip = document.getElementById("tip");
const texts = new Map();
for (const title of document.querySelectorAll("svg title")) {
  texts.set(title.parentNode, title.textContent);
  title.remove();
}
for (const term of document.querySelectorAll("dfn")) {
  texts.set(term, term.title);
  term.removeAttribute("title");
  term.setAttribute("aria-label", texts.get(term));
}
const explain = (target, x, y) => {
  const content = texts.get(target);
  tip.hidden = content === undefined;
  if (tip.hidden) return;
  tip.textContent = content;
  const room = 14;
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.min(x + room, window.innerWidth - width - room);
  const fits = y + room + height < window.innerHeight;
  tip.style.left = `${Math.max(left, 0)}px`;
  tip.style.top = `${fits ? y + room : y - height - room}px`;
};
for (const name of ["pointermove", "pointerdown"]) {
  document.addEventListener(name, (event) => explain(event.target, event.clientX, event.clientY));
}
document.addEventListener("focusin", (event) => {
  const { left, bottom } = event.target.getBoundingClientRect();
  explain(event.target, left, bottom);
});
for (const name of ["pointerleave", "focusout"]) {
  document.addEventListener(name, () => { tip.hidden = true; });
}
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") tip.hidden = true;
});

// Pointing at a chunk in a legend brings its marks forward in the same section.
for (const key of document.querySelectorAll(".key[data-chunk]")) {
  const section = key.closest("section");
  const marks = section.querySelectorAll(`[data-chunk="${key.dataset.chunk}"]`);
  const choose = (isChosen) => {
    section.classList.toggle("faded", isChosen);
    for (const mark of marks) mark.classList.toggle("chosen", isChosen);
  };
  key.addEventListener("pointerenter", () => choose(true));
  key.addEventListener("pointerleave", () => choose(false));
}

// One guidance branch at a time; without scripts all are shown.
const radios = [...document.querySelectorAll("#branches input")];
const show = (branch) => {
  for (const figure of document.querySelectorAll("figure[data-branch]")) {
    figure.hidden = branch !== "" && figure.dataset.branch !== branch;
  }
};
for (const radio of radios) {
  radio.addEventListener("change", () => show(radio.value));
}
if (radios.length) {
  radios[0].checked = true;
  show(radios[0].value);
}
