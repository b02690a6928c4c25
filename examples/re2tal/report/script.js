"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

function drawn(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function picture(figure, width, height, parts) {
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  svg.append(...parts);
  figure.replaceChildren(svg);
}

function options(select, names) {
  select.replaceChildren(...names.map((name, i) => new Option(name, i)));
}

const mean = (values) => values.reduce((a, b) => a + b, 0) / Math.max(1, values.length);

function table() {
  const rows = data.classes.map((name, i) => [name, ...data.ap[i], mean(data.ap[i])]);
  const overall = data.tiou.map((_, t) => mean(data.ap.map((row) => row[t])));
  rows.push(["mAP", ...overall, mean(overall)]);
  const head = ["class", ...data.tiou.map((t) => t.toFixed(2)), "average"];
  const cells = (row, make) => {
    const line = document.createElement("tr");
    line.append(...row.map(make));
    return line;
  };
  const cell = (value, i) => {
    const made = document.createElement(i && typeof value === "number" ? "td" : "th");
    made.textContent = typeof value === "number" ? value.toFixed(3) : value;
    if (typeof value === "number") made.style.setProperty("--part", value);
    return made;
  };
  byId("ap").replaceChildren(cells(head, cell), ...rows.map((row) => cells(row, cell)));
}

function axes(left, top, width, height, x, y) {
  const parts = [drawn("path", { class: "axis", fill: "none", d: `M${left},${top}v${height}h${width}` })];
  for (const tick of [0, 0.25, 0.5, 0.75, 1]) {
    const low = top + height * (1 - tick);
    parts.push(drawn("text", { class: "faint", x: left - 6, y: low + 4, "text-anchor": "end" }, y(tick)));
    parts.push(
      drawn("text", { class: "faint", x: left + width * tick, y: top + height + 18, "text-anchor": "middle" }, x(tick)),
    );
  }
  return parts;
}

function curve() {
  const points = data.curves[byId("class").value][byId("tiou").value];
  // the precision of a corner holds from the recall of the corner before
  const at = ([recall, precision]) => `V${10 + 200 * (1 - precision)}H${40 + 440 * recall}`;
  const parts = axes(40, 10, 440, 200, (t) => t.toFixed(2), (t) => t.toFixed(2));
  if (points.length) {
    const line = `M40,${10 + 200 * (1 - points[0][1])}${points.map(at).join("")}V210`;
    parts.push(drawn("path", { class: "under", d: `${line}H40Z` }));
    parts.push(drawn("path", { class: "curve", d: line }));
  }
  const ap = data.ap[byId("class").value][byId("tiou").value];
  parts.push(drawn("text", { x: 50, y: 200 }, `average precision ${ap.toFixed(3)}`));
  picture(byId("curve"), 500, 240, parts);
}

function profile() {
  byId("profile-tiou").textContent = data.profile_tiou.toFixed(2);
  const parts = [];
  data.profile.forEach((row, rank) => {
    let top = 10;
    row.forEach((part, kind) => {
      const rect = { class: `kind${kind}`, x: 10 + 48 * rank, y: top, width: 40, height: 180 * part };
      const made = drawn("rect", rect);
      made.append(drawn("title", {}, `${data.kinds[kind]}: ${(100 * part).toFixed(1)} %`));
      parts.push(made);
      top += 180 * part;
    });
    parts.push(drawn("text", { class: "faint", x: 30 + 48 * rank, y: 208, "text-anchor": "middle" }, `${rank + 1}G`));
  });
  picture(byId("profile"), 500, 216, parts);
  const keys = data.kinds.map((name, kind) => {
    const key = document.createElement("span");
    key.className = "key";
    const colour = document.createElement("i");
    colour.className = `kind${kind}`;
    key.append(colour, name);
    return key;
  });
  byId("profile").append(...keys);
}

function timeline() {
  const video = data.videos[byId("video").value];
  const least = Number(byId("least").value);
  byId("least-told").textContent = least.toFixed(2);
  const found = video.found.filter((row) => row[3] >= least);
  const names = [...new Set([...video.actions, ...found].map((row) => row[2]))].sort();
  const left = 90, width = 600, parts = [];
  const x = (seconds) => left + (width * seconds) / video.duration;
  let top = 0;
  if (video.pictures.length) {
    const each = width / video.pictures.length;
    video.pictures.forEach((href, i) => {
      parts.push(drawn("image", { href, x: left + each * i, y: 0, width: each - 2, height: 72 }));
    });
    top = 80;
  }
  for (const name of names) {
    parts.push(drawn("text", { x: 0, y: top + 24 }, name.length > 13 ? `${name.slice(0, 12)}…` : name));
    const bar = (row, y, kind, opacity, told) => {
      const rect = { class: kind, x: x(row[0]), y, width: Math.max(1, x(row[1]) - x(row[0])), height: 14, opacity };
      const made = drawn("rect", rect);
      made.append(drawn("title", {}, `${told} ${row[0].toFixed(1)} to ${row[1].toFixed(1)} s`));
      parts.push(made);
    };
    for (const row of video.actions) if (row[2] === name) bar(row, top + 4, "kind0 action", 1, `${name},`);
    for (const row of found) {
      if (row[2] === name) bar(row, top + 21, "kind4 found", row[3], `${name}, score ${row[3].toFixed(2)},`);
    }
    top += 44;
  }
  for (let tick = 0; tick <= 4; tick += 1) {
    const seconds = (video.duration * tick) / 4;
    const anchor = tick ? (tick < 4 ? "middle" : "end") : "start";
    parts.push(drawn("text", { class: "faint", x: x(seconds), y: top + 14, "text-anchor": anchor }, `${seconds.toFixed(0)} s`));
  }
  parts.push(drawn("rect", { class: "kind0", x: left, y: top + 24, width: 12, height: 12 }));
  parts.push(drawn("text", { class: "faint", x: left + 18, y: top + 34 }, "annotated"));
  parts.push(drawn("rect", { class: "kind4", x: left + 90, y: top + 24, width: 12, height: 12 }));
  parts.push(drawn("text", { class: "faint", x: left + 108, y: top + 34 }, "detected, the surer the stronger"));
  picture(byId("timeline"), left + width, top + 40, parts);
}

function loss() {
  const largest = Math.max(...data.history.map(([, value]) => value));
  const unit = 10 ** Math.floor(Math.log10(largest)) / 2;
  const most = unit * Math.ceil(largest / unit);
  const steps = data.history[data.history.length - 1][0];
  const at = ([step, value]) => `${40 + (440 * step) / steps},${10 + 160 * (1 - value / most)}`;
  const parts = axes(40, 10, 440, 160, (t) => Math.round(steps * t), (t) => (most * t).toFixed(2));
  parts.push(drawn("path", { class: "curve", d: `M${data.history.map(at).join("L")}` }));
  picture(byId("loss"), 500, 200, parts);
}

table();
profile();
if (data.classes.length) {
  options(byId("class"), data.classes);
  options(byId("tiou"), data.tiou.map((t) => t.toFixed(2)));
  byId("class").addEventListener("change", curve);
  byId("tiou").addEventListener("change", curve);
  curve();
}
if (data.videos.length) {
  options(byId("video"), data.videos.map((video) => video.id));
  byId("video").addEventListener("change", timeline);
  byId("least").addEventListener("input", timeline);
  timeline();
} else {
  byId("samples").hidden = true;
}
if (data.history.length > 1) loss();
else byId("training").hidden = true;

byId("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
