"use strict";
const steps = JSON.parse(document.getElementById("steps").textContent);
const told = document.getElementById("told");

function choose(name) {
  for (const drawn of document.querySelectorAll(".step")) {
    drawn.classList.toggle("chosen", drawn.dataset.step === name);
  }
  const title = document.createElement("b");
  title.textContent = name;
  const lines = Object.entries(steps[name]).map(([what, value]) => {
    const line = document.createElement("div");
    const label = document.createElement("span");
    label.textContent = `${what}: `;
    line.append(label, value);
    return line;
  });
  told.replaceChildren(title, ...lines);
  told.hidden = false;
}

for (const drawn of document.querySelectorAll(".step")) {
  drawn.addEventListener("click", () => choose(drawn.dataset.step));
  drawn.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      choose(drawn.dataset.step);
    }
  });
}

document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
