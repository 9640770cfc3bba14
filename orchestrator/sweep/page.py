"""The sweep as one HTML file that needs nothing else: choose axes, point at a trial, read its setting."""

from __future__ import annotations

import html
import json
from typing import Any

from orchestrator.sweep.plot import cost_axis, described
from orchestrator.sweep.results import BASELINE, FASTEST, Point, Results, interval
from orchestrator.sweep.tables import UNITS, trials_line

_STYLE = """
body{font:14px/1.45 system-ui,sans-serif;margin:24px auto;max-width:1180px;padding:0 16px;color:#1b2733}
h1{font-size:20px} table{border-collapse:collapse;font-size:12.5px;width:100%} td,th{padding:3px 8px;text-align:right;
border-bottom:1px solid #e3e8ec} td:last-child,th:last-child{text-align:left} tr.on{background:#eaf2fa}
svg{width:100%;height:auto;background:#fff;border:1px solid #e3e8ec} .tip{position:fixed;pointer-events:none;
background:#1b2733;color:#fff;padding:8px 10px;border-radius:4px;font-size:12.5px;max-width:420px;display:none}
select{font:inherit;margin:0 12px 0 4px} .note{color:#5b6b7a;font-size:12.5px}
"""
_SCRIPT = """
const data = JSON.parse(document.getElementById("data").textContent);
const svg = document.getElementById("plot"), tip = document.getElementById("tip");
const across = document.getElementById("x"), up = document.getElementById("y");
const WIDTH = 1100, HEIGHT = 560, LEFT = 70, BOTTOM = 50, TOP = 16, RIGHT = 20;

for (const select of [across, up]) {
  for (const [name, [heading]] of Object.entries(data.units)) select.add(new Option(heading, name));
}
across.value = data.x;
up.value = "accuracy";

function add(kind, attributes, parent = svg) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", kind);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return parent.appendChild(element);
}

function label(text, attributes, parent = svg) {
  add("text", {"font-size": 12, fill: "#5b6b7a", stroke: "none", ...attributes}, parent).textContent = text;
}

function ticks(low, high) {
  const rough = (high - low) / 6, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(v => v * power).find(v => v >= rough);
  const found = [];
  for (let v = Math.ceil(low / step) * step; v <= high; v += step) found.push(+v.toPrecision(6));
  return found;
}

function scale(name, start, end) {
  const factor = data.units[name][1];
  let low = Math.min(...data.points.map(p => factor * p.low[name]));
  let high = Math.max(...data.points.map(p => factor * p.high[name]));
  const margin = ((high - low) || 1) * 0.05;
  low -= margin;
  high += margin;
  return {ticks: ticks(low, high), at: v => start + (v - low) / (high - low) * (end - start),
          place(v) { return this.at(factor * v); }};
}

function axes(x, y) {
  for (const t of x.ticks) {
    add("line", {x1: x.at(t), x2: x.at(t), y1: TOP, y2: HEIGHT - BOTTOM, stroke: "#eef1f4"});
    label(t, {x: x.at(t), y: HEIGHT - BOTTOM + 18, "text-anchor": "middle"});
  }
  for (const t of y.ticks) {
    add("line", {x1: LEFT, x2: WIDTH - RIGHT, y1: y.at(t), y2: y.at(t), stroke: "#eef1f4"});
    label(t, {x: LEFT - 8, y: y.at(t) + 4, "text-anchor": "end"});
  }
  label(data.units[across.value][0], {x: WIDTH / 2, y: HEIGHT - 10, "text-anchor": "middle"});
  label(data.units[up.value][0], {x: 0, y: 0, "text-anchor": "middle",
                                  transform: `translate(18 ${HEIGHT / 2}) rotate(-90)`});
}

function dot(p, x, y) {
  const plain = p.number < 0, large = plain || p.role;
  const colour = plain ? "#1b2733" : p.role ? "#d1603d" : p.front ? "#1f6fb4" : "#9aa7b2";
  const group = add("g", {stroke: colour, fill: colour});
  const cx = x.place(p.values[across.value]), cy = y.place(p.values[up.value]);
  const thin = {"stroke-opacity": 0.6};
  add("line", {x1: x.place(p.low[across.value]), x2: x.place(p.high[across.value]), y1: cy, y2: cy, ...thin}, group);
  add("line", {y1: y.place(p.low[up.value]), y2: y.place(p.high[up.value]), x1: cx, x2: cx, ...thin}, group);
  add("circle", {cx, cy, r: large ? 7 : p.front ? 5 : 4}, group);
  if (large) label(plain ? "unreduced" : p.role, {x: cx + 9, y: cy - 8, fill: colour}, group);
  group.onmousemove = event => {
    tip.style.display = "block";
    tip.style.left = Math.min(event.clientX + 14, innerWidth - 440) + "px";
    tip.style.top = event.clientY + 14 + "px";
    tip.textContent = p.text;
    mark(p.number);
  };
  group.onmouseleave = () => {
    tip.style.display = "none";
    mark(null);
  };
}

function mark(number) {
  for (const row of document.querySelectorAll("tr[data-n]")) row.classList.toggle("on", row.dataset.n == number);
}

function draw() {
  svg.replaceChildren();
  const x = scale(across.value, LEFT, WIDTH - RIGHT), y = scale(up.value, HEIGHT - BOTTOM, TOP);
  axes(x, y);
  if (across.value === data.x && up.value === "accuracy") {
    const front = data.points.filter(p => p.front).sort((a, b) => a.values[data.x] - b.values[data.x]);
    const places = front.map(p => `${x.place(p.values[data.x])},${y.place(p.values.accuracy)}`);
    add("polyline", {points: places.join(" "), fill: "none", stroke: "#1f6fb4", "stroke-opacity": 0.6});
  }
  for (const p of [...data.points].sort((a, b) => a.front - b.front)) dot(p, x, y);
}

across.onchange = up.onchange = draw;
draw();
"""


def page(results: Results, title: str, facts: list[tuple[str, str]]) -> str:
    """The file's text.

    Args:
        results: of the sweep.
        title: heading.
        facts: what was measured on what, in lines.
    """
    front = {point.number for point in results.front}
    points = [_point(point, front, results.roles, results.names) for point in (*results.beside, *results.points)]
    data = {"points": points, "units": {name: UNITS[name] for name in results.names}, "x": cost_axis(results)}
    # "</" would end the script element
    body = json.dumps(data).replace("</", "<\\/")
    lines = "".join(
        f"<tr><td style='text-align:left'>{html.escape(n)}</td><td>{html.escape(v)}</td></tr>" for n, v in facts
    )
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1><table>{lines}</table>"
        f"<p>{html.escape(trials_line(results))}. Front: {len(results.front)} points,"
        f" {len(results.distinct)} settings can be told apart by their intervals.</p>"
        "<p><label>across<select id='x'></select></label><label>up<select id='y'></select></label>"
        f"<span class='note'>blue: front; orange: recommended (fastest: the {described(FASTEST, results)}); black: the"
        " unreduced model; bars: 95% interval of the paired difference (accuracy), quartiles or the noise of the"
        " machine (speed)</span></p>"
        "<svg id='plot' viewBox='0 0 1100 560'></svg><div class='tip' id='tip'></div>"
        f"<h2 style='font-size:16px'>Front, then the other settings</h2>{_table(points, results.names)}"
        f"<script type='application/json' id='data'>{body}</script><script>{_SCRIPT}</script></body></html>\n"
    )


def _point(point: Point, front: set[int], roles: dict[int, str], names: list[str]) -> dict[str, Any]:
    ends = {name: interval(point, name) for name in names}
    name = "unreduced model" if point.number == BASELINE else f"trial {point.number}"
    values = ", ".join(f"{UNITS[key][0]} {UNITS[key][1] * point.values[key]:.4g}" for key in names)
    return {
        "number": point.number,
        "front": point.number in front,
        "role": roles.get(point.number, ""),
        "values": dict(point.values),
        "low": {key: low for key, (low, _) in ends.items()},
        "high": {key: high for key, (_, high) in ends.items()},
        "text": f"{name}: {point.label}. {values}",
        "label": point.label,
    }


def _table(points: list[dict[str, Any]], names: list[str]) -> str:
    heads = "".join(f"<th>{html.escape(UNITS[name][0])}</th>" for name in names)
    rows = []
    for point in sorted(points, key=lambda p: (not p["front"], -p["values"]["accuracy"])):
        cells = "".join(f"<td>{UNITS[name][1] * point['values'][name]:.4g}</td>" for name in names)
        number = "unreduced" if point["number"] == BASELINE else point["number"]
        mark = " (front)" if point["front"] else ""
        role = f" <b>{point['role']}</b>" if point["role"] else ""
        label = html.escape(point["label"])
        rows.append(f"<tr data-n='{point['number']}'><td>{number}{mark}{role}</td>{cells}<td>{label}</td></tr>")
    return f"<table><tr><th>trial</th>{heads}<th>setting</th></tr>{''.join(rows)}</table>"
