"use strict";
// The page of a run. Everything from the data is set as text (textContent, setAttribute on known
// names) or, inside plots, escaped by `plain`: plotly reads a little HTML in its texts.
(() => {
const D = JSON.parse(document.getElementById("data").textContent);
const RUNS = D.runs, A = RUNS[0], TWO = RUNS.length > 1;
const PALETTE = ["#2b7bba", "#d9622b", "#2a9d72", "#c2569b", "#b8860b", "#7a63c7", "#4fb3d9",
  "#8a5a44", "#7c8792", "#94a51f"];
const SYMBOLS = ["circle", "diamond", "square", "triangle-up", "cross", "star"];
const PAGE = 40;

// -- small tools -----------------------------------------------------------------------------

function h(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(node.style, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(3)) {
    if (child === null || child === undefined || child === false) continue;
    node.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return node;
}
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const cut = (text, length) => {
  const characters = [...String(text)];
  return characters.length > length ? characters.slice(0, length - 1).join("") + "…" : String(text);
};
function number(value) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  if (size >= 100) return Math.round(value).toLocaleString("en");
  if (size >= 10) return value.toFixed(1);
  return size >= 0.001 ? value.toFixed(3) : value.toPrecision(2);
}
const score = (value) => (Number.isInteger(value) && Math.abs(value) <= 1 ? value.toFixed(3) : number(value));
const percent = (value) => `${Math.round(100 * value)} %`;
const words = (name) => name.replaceAll("_", " ");
const interval = (row) => { const f = row && /rank/.test(row.metric) ? number : score; return row && row.lo !== null ? `${f(row.lo)} to ${f(row.hi)}` : ""; };
const badge = (i) => TWO ? h("span", { class: `run run${i}` }, "AB"[i]) : null;
const note = (...children) => h("p", { class: "note" }, ...children);
const section = (title, ...children) => h("section", {}, title ? h("h2", {}, title) : null, ...children);
const panel = (...children) => h("div", { class: "panel" }, ...children);
const code = (text) => h("code", { class: "command" }, text);

function table(header, rows, options = {}) {
  const cell = (tag, value) => {
    const numeric = typeof value === "number" || (value && value.numeric !== undefined);
    const shown = value && value.numeric !== undefined ? value.numeric
      : typeof value === "number" ? number(value) : value;
    return h(tag, { class: numeric ? "number" : null, dir: tag === "td" ? "auto" : null }, shown);
  };
  const rightward = header.map((_, i) => rows.length && rows.every((r) => typeof r[i] === "number"
    || (r[i] && r[i].numeric !== undefined) || r[i] === null));
  return h("div", { class: `scroll ${options.class || ""}` }, h("table", {},
    h("thead", {}, h("tr", {}, header.map((name, i) =>
      h("th", { scope: "col", class: rightward[i] ? "number" : null }, name)))),
    h("tbody", {}, rows.map((row) => h("tr", { class: row.class || null },
      row.map((value, i) => i === 0 && options.heads ? h("th", { scope: "row" }, value)
        : cell("td", value)))))));
}
const numeric = (text) => ({ numeric: text });

function choice(label, entries, chosen, onchange) {
  const select = h("select", { onchange: () => onchange(select.value) },
    entries.map(([value, text]) => h("option", { value, selected: value === chosen }, text)));
  return h("label", { class: "field" }, h("span", {}, label), select);
}

// -- what the numbers mean -------------------------------------------------------------------

const MEANING = {
  "R@1": "share of queries whose own match comes first",
  "R@5": "share of queries whose own match is among the first 5",
  "R@10": "share of queries whose own match is among the first 10",
  mean_rank: "mean place of the match; 1 is best",
  median_rank: "half of the queries find their match at this place or before; 1 is best",
  MRR: "mean of 1 / place of the match; 1 is best",
  accuracy: "share of specimens given their true class",
  balanced_accuracy: "mean over classes of the share found; rare classes count as much as common ones",
  f1_macro: "mean over classes of F1 (precision and recall in one)",
  f1_weighted: "F1, classes weighted by how often they occur",
  auroc_ovr: "chance that a specimen of a class is scored above one of another class; 0.5 is guessing",
  auroc_ovo: "the same between each two classes",
  auroc_macro: "mean over labels of the area under the ROC curve; 0.5 is guessing",
  average_precision_macro: "mean over labels of the average precision",
  cohen_kappa: "agreement beyond chance; 0 is chance, 1 is perfect",
  top_3_accuracy: "true class among the 3 most likely",
  top_5_accuracy: "true class among the 5 most likely",
  precision: "share of those called positive that are",
  recall: "share of the positive that are found (sensitivity)",
  specificity: "share of the negative that are left alone",
  average_precision: "area under precision by recall",
  contrastive: "loss of matching slides and reports; lower is better",
  caption: "loss of each next token of the report; lower is better",
  bleu_1: "words shared with the true report", bleu_2: "word pairs shared",
  bleu_3: "runs of 3 words shared", bleu_4: "runs of 4 words shared with the true report",
  rouge_l: "longest common sequence of words", cider: "shared word runs, rare ones count more",
  cider_plain: "CIDEr without penalty for length", meteor_exact_stem: "matched words and word stems",
  repetition_4: "share of 4-word runs that occur again in the same report; lower is better",
  length_ratio: "generated length divided by true length", exact_match: "reports equal word by word",
  keyword_jaccard: "overlap of key terms", distinct_1: "different words among all generated words",
  distinct_2: "different word pairs among all generated ones",
  most_frequent_share: "share of specimens given the most frequent report; lower is better",
  "Acc@1": "nearest other slide is of the class", "Acc@3": "one of the 3 nearest is of the class",
  "Acc@5": "one of the 5 nearest is of the class",
  "majority_vote@3": "most of the 3 nearest are of the class",
  "majority_vote@5": "most of the 5 nearest are of the class",
  "mAP@5": "precision at each hit among the 5 nearest", "mAP@10": "the same of the 10 nearest",
  concordance: "share of pairs of patients put in the right order of survival; 0.5 is guessing",
};
const NAMES = {
  auroc_ovr: "AUROC, one versus rest", auroc_ovo: "AUROC, one versus one", auroc_macro: "AUROC, macro",
  f1: "F1", f1_macro: "F1, macro", f1_weighted: "F1, weighted", cohen_kappa: "Cohen's kappa",
  rouge_l: "ROUGE-L", cider: "CIDEr-D", cider_plain: "CIDEr", meteor_exact_stem: "METEOR (exact, stem)",
  bleu_1: "BLEU-1", bleu_2: "BLEU-2", bleu_3: "BLEU-3", bleu_4: "BLEU-4", average_precision_macro: "average precision, macro",
  repetition_4: "repeated 4-grams", distinct_1: "distinct words", distinct_2: "distinct word pairs",
  contrastive: "contrastive loss", caption: "caption loss",
};
const metricTitle = (name) => NAMES[name] || words(name);
const LOWER = new Set(["mean_rank", "median_rank", "contrastive", "caption", "repetition_4",
  "most_frequent_share"]);
const TASKS = {
  loss: "Losses", image_to_text: "Slide to report", text_to_image: "Report to slide",
  captions: "Generated reports", zero_shot: "Zero-shot", few_shot: "Few-shot", probe: "Probe",
  slide_retrieval: "Slide to slide",
};
function taskTitle(task) {
  const [kind, ...rest] = task.split("/");
  return [TASKS[kind] || words(kind), ...rest.map(words)].join(" · ");
}
const TASK_MEANING = {
  zero_shot: "The class whose described prompt lies nearest to the slide; no slide of a class was shown as an example.",
  few_shot: "Learnt from a few example slides of each class.",
  probe: "Learnt from the embeddings of the training split, which is an upper view of what they hold.",
  slide_retrieval: "Slides as queries for other slides of their class; slides of the same patient left out.",
  image_to_text: "Each slide looks for its own report among all reports of the split.",
  text_to_image: "Each report looks for its own slide among all slides of the split.",
  captions: "Generated reports compared with the true ones, word by word and by extracted findings.",
};
function chance(row, run) {
  const at = /^R@(\d+)$/.exec(row.metric);
  if (at) return Math.min(1, Number(at[1]) / row.n);
  if (row.metric.startsWith("auroc")) return 0.5;
  if (row.metric === "balanced_accuracy") {
    const base = row.task.replace(/\/(single_prompt|ensemble)$/, "");
    const found = run.evaluation.tasks.find((t) => t.split === row.split && t.task === base);
    return found && found.details.classes ? 1 / found.details.classes.length : null;
  }
  return row.metric === "cohen_kappa" ? 0 : null;
}

// -- theme and plots -------------------------------------------------------------------------

const root = document.documentElement;
const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
const THEMES = ["auto", "light", "dark"];
let theme = "auto";
try { theme = localStorage.getItem("slidevlm-theme") || "auto"; } catch { /* no storage here */ }
if (!THEMES.includes(theme)) theme = "auto";
function applyTheme() {
  if (theme === "auto") root.removeAttribute("data-theme");
  else root.dataset.theme = theme;
  document.getElementById("theme").textContent = { auto: "◐ Auto", light: "☀ Light", dark: "☾ Dark" }[theme];
  for (const node of drawn) refresh(node);
}
document.getElementById("theme").addEventListener("click", () => {
  theme = THEMES[(THEMES.indexOf(theme) + 1) % 3];
  try { localStorage.setItem("slidevlm-theme", theme); } catch { /* no storage here */ }
  applyTheme();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => applyTheme());

const makers = new WeakMap(), drawn = new Set();
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting || !entry.target.clientWidth) continue;
    seen.unobserve(entry.target);
    draw(entry.target);
  }
}, { rootMargin: "300px" });
const sized = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    const width = target.clientWidth;
    if (width && drawn.has(target) && target.drawnWidth !== width) draw(target);
  }
});
function themed(layout, node) {
  const axis = { gridcolor: css("--grid"), linecolor: css("--line"), zerolinecolor: css("--line"),
    tickcolor: css("--line"), automargin: true };
  const full = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", colorway: PALETTE,
    font: { family: css("--sans"), size: 12, color: css("--text") },
    margin: { l: 48, r: 14, t: 10, b: 44 }, showlegend: false, dragmode: "pan",
    hoverlabel: { bgcolor: css("--panel"), bordercolor: css("--line"), font: { color: css("--text") } },
    legend: { orientation: "h", y: -52 / Math.max(80, node.clientHeight - 90), yanchor: "top", x: 0, font: { size: 11.5 } },
    ...layout, width: node.clientWidth, height: node.clientHeight,
  };
  for (const key of ["xaxis", "yaxis"]) {
    full[key] = { ...axis, ...layout[key] };
    if (typeof full[key].title === "string") full[key].title = { text: full[key].title, standoff: 8 };
  }
  return full;
}
function draw(node) {
  const figure = makers.get(node)();
  node.drawnWidth = node.clientWidth;
  drawn.add(node);
  Plotly.react(node, figure.data, themed(figure.layout || {}, node), {
    displaylogo: false, responsive: false, displayModeBar: figure.bar ? "hover" : false,
    scrollZoom: false, doubleClick: "reset",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
  }).then(() => { if (figure.then && !node.bound) { node.bound = true; figure.then(node); } });
}
function refresh(node) {
  if (!node.isConnected) { drawn.delete(node); return; }
  if (node.clientWidth) draw(node);
  else seen.observe(node);
}
function plot(make, height, label) {
  const node = h("div", { class: "plot", style: { height: `${height}px` }, "aria-label": label });
  makers.set(node, make);
  seen.observe(node);
  sized.observe(node);
  return node;
}
const figure = (title, node, caption) => h("figure", {},
  title ? h("h3", {}, title) : null, node, h("figcaption", {}, caption));

// Of a large split the page has a part; what is drawn from specimens then says so.
const total = (s) => s.of.reduce((a, b) => a + b, 0);
function thinned() {
  return RUNS.filter((run) => run.specimens && total(run.specimens) > run.specimens.id.length).map((run) => {
    const s = run.specimens;
    return h("p", { class: "note thinned" }, `${TWO ? `${run.name}: ` : ""}${s.id.length} of ${total(s)} specimens are on this page, at equal distances; `,
      "maps, neighbours and recall by k are of these, metrics and ROC curves of all. predictions.csv has the others.");
  });
}

// -- tooltip of specimens --------------------------------------------------------------------

const tip = document.getElementById("tip");
function showTip(run, i, event) {
  const s = run.specimens;
  const lines = [h("strong", {}, s.id[i]), h("span", { class: "dim" }, ` ${s.splits[s.split[i]]}`)];
  const classes = s.tasks.filter((t) => t.label[i] >= 0).slice(0, 4).map((t) =>
    h("div", {}, h("span", { class: "dim" }, `${taskTitle(t.name)}: `), t.classes[t.label[i]],
      t.predicted[i] !== t.label[i] && t.predicted[i] >= 0
        ? h("span", { class: "wrong" }, ` predicted ${t.classes[t.predicted[i]]}`) : null));
  const report = s.report[i] ? h("p", { dir: "auto" }, cut(s.report[i], 320)) : h("p", { class: "dim" }, "no report");
  const written = s.generated && s.generated[i]
    ? h("p", { dir: "auto" }, h("span", { class: "dim" }, "generated: "), cut(s.generated[i], 240)) : null;
  tip.replaceChildren(...lines, ...classes, report, ...(written ? [written] : []));
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const x = Math.min(event.clientX + 14, innerWidth - box.width - 8);
  const y = event.clientY + 14 + box.height > innerHeight ? event.clientY - box.height - 14 : event.clientY + 14;
  tip.style.left = `${Math.max(8, x)}px`;
  tip.style.top = `${Math.max(8, y)}px`;
}
const hideTip = () => { tip.hidden = true; };

// -- overview --------------------------------------------------------------------------------

const rowsOf = (run) => (run.evaluation ? run.evaluation.metrics : []);
const keyOf = (row) => `${row.split}/${row.task}/${row.metric}`;
function headline(run) {
  const wanted = [/^image_to_text$/, /^text_to_image$/, /^zero_shot\/[^/]+$/, /^probe\/[^/]+\/linear$/, /^captions$/];
  const metric = ["R@10", "R@10", /^(balanced_accuracy|auroc_macro)$/, "balanced_accuracy", "rouge_l"];
  const split = rowsOf(run).some((r) => r.split === "test") ? "test" : (rowsOf(run)[0] || {}).split;
  const found = [];
  wanted.forEach((pattern, i) => {
    for (const row of rowsOf(run)) {
      const fits = metric[i] instanceof RegExp ? metric[i].test(row.metric) : row.metric === metric[i];
      if (row.split === split && pattern.test(row.task) && fits) found.push(row);
    }
  });
  return found.slice(0, 8);
}
function card(row) {
  const others = RUNS.map((run) => rowsOf(run).find((r) => keyOf(r) === keyOf(row)));
  const base = chance(row, A);
  return h("div", { class: "card" },
    h("div", { class: "card-title" }, taskTitle(row.task)),
    others.map((r, i) => h("div", { class: "value" }, badge(i), score(r && r.value),
      r && r.lo !== null ? h("span", { class: "dim small" }, ` ${interval(r)}`) : null)),
    h("div", { class: "dim small" }, metricTitle(row.metric), ": ", MEANING[row.metric] || "",
      base !== null && base > 0 ? ` · by chance ${number(base)}` : "", ` · ${row.split}, n = ${row.n}`));
}
function facts(run) {
  const about = (run.evaluation && run.evaluation.about) || {}, machine = run.environment || {};
  const train = run.curves && run.curves.train;
  const s = run.specimens;
  const rows = [["Folder", run.folder]];
  if (about.model) rows.push(["Model", about.model]);
  if (run.model) {
    const m = run.model;
    rows.push(["Slide encoder", m.slide ? `${m.slide.type}, tiles ${m.tile_width} wide → embedding ${m.embed_dim}` : "none"]);
    if (m.text) rows.push(["Text", `${m.text.type}, context ${m.text.context_length} tokens`]);
  }
  if (train) {
    const last = train.step.length - 1, v = train.values;
    rows.push(["Trained", `${number(train.step[last])} steps, ${number(train.epoch[last])} epochs`]);
    if (v.samples_per_second) {
      const speed = v.samples_per_second.filter((x) => x !== null).sort((a, b) => a - b);
      if (speed.length) rows.push(["Speed", `${number(speed[speed.length >> 1])} specimens a second (median)`]);
    }
  }
  if (s) s.splits.forEach((name, j) => {
    const mine = s.split.map((x, i) => (x === j ? i : -1)).filter((i) => i >= 0);
    const few = mine.length < s.of[j];
    rows.push([`Split ${name}`, (few ? `${s.of[j]} specimens, of which ${mine.length} are shown` : `${mine.length} specimens of ${new Set(mine.map((i) => s.patient[i])).size} patients`)
      + (mine[0] < s.judged ? "" : " (learnt from, not judged)")]);
  });
  if (about.bootstrap) rows.push(["Intervals", about.bootstrap.resamples > 1
    ? `${about.bootstrap.confidence * 100} % from ${about.bootstrap.resamples} resamples of ${about.bootstrap.unit}s` : "not computed"]);
  if (machine.started) rows.push(["Started", machine.started]);
  const versions = about.versions || (machine.packages && { python: machine.python, ...machine.packages });
  if (versions) rows.push(["Versions", Object.entries(versions).map(([k, v]) => `${k} ${v}`).join(", ")]);
  if (about.model_hash) rows.push(["Weights", h("span", { class: "mono" }, about.model_hash.slice(0, 16), "…")]);
  if (run.dropped.length) rows.push(["Dropped", `${run.dropped.length} bad specimens (bad_specimens.txt)`]);
  for (const [split, lines] of Object.entries(run.missing)) rows.push([`Missing in ${split}`, `${lines.length} identifiers without features`]);
  return rows;
}
function overview() {
  const cards = headline(A);
  const parts = [...thinned()];
  if (TWO) parts.push(panel(h("p", { class: "legend" }, RUNS.map((run, i) => h("span", {}, badge(i), ` ${run.name} `)))));
  parts.push(cards.length ? h("div", { class: "cards" }, cards.map(card))
    : panel(note("This run has not been evaluated: ", code(`slidevlm evaluate ${A.folder}`))));
  RUNS.forEach((run, i) => parts.push(section(TWO ? h("span", {}, badge(i), ` ${run.name}`) : "This run",
    panel(table(["", ""], facts(run), { heads: true, class: "facts" })))));
  const lacking = RUNS.flatMap((run, i) => run.lacking.map((l) => [i, l]));
  if (lacking.length) parts.push(section("What this page can show too",
    panel(h("ul", { class: "lacking" }, lacking.map(([i, l]) => h("li", {}, badge(i), ` ${l.part}: `, code(l.command)))))));
  parts.push(note("Research software, not a medical device. Generated reports are the output of a model: "
    + "they can be fluent and wrong."));
  return parts;
}

// -- metrics tables --------------------------------------------------------------------------

function track(row) {
  if (!row || row.value === null || row.value < 0 || row.value > 1 || LOWER.has(row.metric)) return "";
  return h("div", { class: "track", "aria-hidden": "true" },
    row.lo === null ? null : h("div", { class: "band", style: { left: `${100 * row.lo}%`, width: `${100 * (row.hi - row.lo)}%` } }),
    h("div", { class: "dot", style: { left: `${100 * row.value}%` } }));
}
function metricName(row) {
  return h("span", {}, h("span", { class: "metric" }, row.shown ? `${words(row.shown)}: ` : "", metricTitle(row.metric)),
    MEANING[row.metric] ? h("span", { class: "meaning" }, MEANING[row.metric]) : null);
}
function metricTable(rows) {
  const other = new Map(TWO ? rowsOf(RUNS[1]).map((r) => [keyOf(r), r]) : []);
  const spread = rows.some((r) => r.lo !== null) || [...other.values()].some((r) => r.lo !== null);
  const anyChance = !TWO && rows.some((r) => chance(r, A) !== null);
  const paired = new Map(TWO && D.comparison ? D.comparison.differences.map((d) => [`${d.split}/${d.metric}`, d]) : []);
  const said = (r) => (r && /rank/.test(r.metric) ? number : score)(r && r.value);
  const cell = (r) => numeric(h("span", {}, said(r), r && r.lo !== null ? h("span", { class: "meaning" }, interval(r)) : null));
  const header = ["metric", TWO ? badge(0) : spread ? "value, interval" : "value",
    ...(TWO ? [badge(1), "B − A", ...(paired.size ? ["p (Holm)"] : [])] : [""]),
    ...(anyChance ? ["chance"] : []), "n"];
  return table(header, rows.map((row) => {
    const b = other.get(keyOf(row));
    const d = paired.get(keyOf(row));
    return [metricName(row), cell(row),
      ...(TWO ? [cell(b), numeric(b && b.value !== null && row.value !== null ? signed(b.value - row.value, /rank/.test(row.metric) ? number : score) : "–"),
        ...(paired.size ? [numeric(d ? number(d.p_holm) : "–")] : [])] : [track(row)]),
      ...(anyChance ? [numeric(chance(row, A) === null ? "" : number(chance(row, A)))] : []), numeric(number(row.n))];
  }), { class: "metrics" });
}
const signed = (v, f) => `${v > 0 ? "+" : v < 0 ? "−" : ""}${f(Math.abs(v))}`;
const splitsOf = (run) => [...new Set(rowsOf(run).map((r) => r.split))];

function bySplit(draw) {
  const splits = splitsOf(A), host = h("div", {});
  if (!splits.length) return [panel(note("No evaluation is stored in this run: ", code(`slidevlm evaluate ${A.folder}`)))];
  let shown = splits.includes("test") ? "test" : splits[0];
  const fill = () => host.replaceChildren(...draw(shown));
  fill();
  return [splits.length > 1 ? h("div", { class: "controls" },
    choice("Split", splits.map((s) => [s, s]), shown, (value) => { shown = value; fill(); })) : null, host];
}

// -- training --------------------------------------------------------------------------------

function curve(kind, names, options = {}) {
  const data = [];
  RUNS.forEach((run, i) => {
    const found = run.curves && run.curves[kind];
    if (!found) return;
    names.forEach(([name, title, color], j) => {
      const y = found.values[name];
      if (!y || y.every((v) => v === null)) return;
      data.push({ type: "scatter", mode: found.step.length > 60 ? "lines" : "lines+markers",
        x: found.epoch, y, name: plain(TWO ? `${"AB"[i]} ${title}` : title), connectgaps: true,
        line: { color: PALETTE[(color ?? j) % PALETTE.length], dash: i ? "dash" : options.dash || "solid", width: 2 },
        marker: { size: 5 } });
    });
  });
  return data;
}
function training() {
  if (!RUNS.some((run) => run.curves && run.curves.train)) {
    return [panel(note("metrics.jsonl of this folder has no training steps: it is the folder of an evaluation."))];
  }
  const evaluated = [...new Set(RUNS.flatMap((run) => (run.curves && run.curves.evaluation
    ? Object.keys(run.curves.evaluation.values) : [])))].filter((n) => !/\/(lo|hi)$/.test(n));
  const ending = (end) => evaluated.filter((n) => n.endsWith(end));
  const line = (title, data, caption, y) => data().length ? figure(title, plot(() => ({ data: data(), layout: {
    showlegend: data().length > 1, xaxis: { title: "epoch" }, yaxis: { title: y, rangemode: "tozero" } }, bar: true }), 320, title), caption) : null;
  const losses = (term, color) => () => [...curve("train", [[`${term}_loss`, "training", color]]),
    ...curve("evaluation", ending(`/loss/${term}`).map((n, j) => [n, n.split("/")[0], color + 1 + j]), { dash: "dot" })];
  const figures = [
    line("Contrastive loss", losses("contrastive", 0), "How well slides and their reports are matched within a batch (training) and over the whole split (others); the two are not on one scale. Lower is better.", "loss"),
    line("Caption loss", losses("caption", 0), "Cross entropy of each next token of the report. A validation curve that rises while training falls is overfitting.", "loss per token"),
    line("Retrieval", () => curve("evaluation", [...ending("/image_to_text/R@10"), ...ending("/text_to_image/R@10")].map((n) => [n, n.replace("/", ": ").replace("_to_", " to ").replace("/", " ")])), "Share of queries whose own match is among the first 10.", "R@10"),
    line("Zero-shot classification", () => curve("evaluation", evaluated.filter((n) => /zero_shot\/[^/]+\/balanced_accuracy$/.test(n)).map((n) => [n, words(n.split("/").filter((_, i) => i !== 1).slice(0, 2).join(": "))])), "Balanced accuracy after each evaluated epoch.", "balanced accuracy"),
    line("Learning rate", () => curve("train", [["learning_rate", "learning rate"]]), "As the schedule set it.", "rate"),
    line("Gradient norm", () => curve("train", [["gradient_norm", "norm before clipping"]]), "Of all weights, before clipping.", "norm"),
    line("Speed", () => curve("train", [["samples_per_second", "specimens a second"]]), "Specimens a second, all processes together.", "specimens / s"),
  ].filter(Boolean);
  const parts = [h("div", { class: "grid" }, figures)];
  if (evaluated.length) {
    let name = evaluated[0];
    const node = plot(() => ({ data: curve("evaluation", [[name, name]]), layout: { showlegend: TWO, xaxis: { title: "epoch" } }, bar: true }), 320, "any metric");
    parts.push(section("Any metric over the epochs", panel(h("div", { class: "controls" },
      choice("Metric", evaluated.map((n) => [n, n]), name, (value) => { name = value; refresh(node); })),
      node, h("p", { class: "caption" }, "Every number that was computed after an epoch."))));
  }
  return parts;
}

// -- retrieval -------------------------------------------------------------------------------

function recallCurve(split) {
  const data = [];
  RUNS.forEach((run, r) => {
    const s = run.specimens;
    if (!s) return;
    const all = s.of[s.splits.indexOf(split)] || 0;
    [["image_to_text", "slide → report"], ["text_to_image", "report → slide"]].forEach(([way, title], j) => {
      const ranks = (s.numbers[`${way}/rank`] || []).filter((v, i) => v !== null && s.splits[s.split[i]] === split).sort((a, b) => a - b);
      if (!ranks.length) return;
      const x = [], y = [];
      ranks.forEach((k, i) => { if (i + 1 === ranks.length || ranks[i + 1] !== k) { x.push(k); y.push((i + 1) / ranks.length); } });
      if (x[x.length - 1] < all) { x.push(all); y.push(1); }
      data.push({ type: "scatter", mode: "lines", line: { shape: "hv", color: PALETTE[j], dash: r ? "dash" : "solid", width: 2 }, x, y, name: TWO ? `${"AB"[r]} ${title}` : title });
    });
    if (r === 0) {
      const x = [], n = all;
      for (let k = 1; k < n; k = Math.max(k + 1, Math.round(k * 1.15))) x.push(k);
      x.push(n);
      data.push({ type: "scatter", mode: "lines", x, y: x.map((k) => k / n), name: "by chance", line: { color: "#8a919b", dash: "dot", width: 1.5 } });
    }
  });
  return { data, layout: { showlegend: true, xaxis: { title: "k (places looked at)", type: "log", dtick: "D2" }, yaxis: { title: "found among the first k", range: [0, 1.02] } }, bar: true };
}
function retrieval() {
  return bySplit((split) => {
    const rows = rowsOf(A).filter((r) => r.split === split);
    const tasks = [...new Set(rows.map((r) => r.task))].filter((t) => /^(image_to_text|text_to_image|slide_retrieval)/.test(t));
    const main = tasks.filter((t) => !t.startsWith("slide"));
    return [...thinned(),
      h("div", { class: "grid wide" },
        figure("How soon the match is found", plot(() => recallCurve(split), 380, "recall by k"),
          "Share of queries whose own match is among the first k. Reports that read the same count as one match; ties count against the model."),
        ...main.map((t) => panel(h("h3", {}, taskTitle(t)), note(TASK_MEANING[t]), metricTable(rows.filter((r) => r.task === t))))),
      ...tasks.filter((t) => t.startsWith("slide")).map((t) => panel(h("h3", {}, taskTitle(t)),
        note(TASK_MEANING.slide_retrieval), metricTable(rows.filter((r) => r.task === t)))),
    ];
  });
}

// -- tasks -----------------------------------------------------------------------------------

const tick = (text) => plain(cut(text, 22));
function confusion(details) {
  const n = details.classes.length, m = details.confusion_matrix;
  const share = m.map((row) => { const total = row.reduce((a, b) => a + b, 0); return row.map((v) => (total ? v / total : 0)); });
  const names = details.classes.map(tick), where = details.classes.map((_, i) => i);
  return { data: [{ type: "heatmap", z: share, x: where, y: where, text: m, texttemplate: n <= 25 ? "%{text}" : "",
    customdata: m.map((row, i) => row.map((v, j) => [names[i], names[j]])), zmin: 0, zmax: 1, showscale: false, xgap: 2, ygap: 2,
    colorscale: [[0, css("--cell")], [1, css("--heat")]],
    hovertemplate: "true %{customdata[0]}<br>predicted %{customdata[1]}<br>%{text} (%{z:.0%} of the class)<extra></extra>" }],
  layout: { dragmode: false, margin: { l: 60, r: 10, t: 10, b: 60 },
    xaxis: { title: "predicted class", tickvals: where, ticktext: names, showgrid: false, zeroline: false, tickangle: n > 4 ? -40 : 0 },
    yaxis: { title: "true class", tickvals: where, ticktext: names, autorange: "reversed", showgrid: false, zeroline: false } } };
}
function rocFigure(task, split) {
  const data = [{ type: "scatter", mode: "lines", x: [0, 1], y: [0, 1], line: { color: "#8a919b", dash: "dot", width: 1.5 }, hoverinfo: "skip", showlegend: false }];
  RUNS.forEach((run, r) => {
    const mine = run.specimens && run.specimens.tasks.find((t) => t.name === task);
    if (!mine || !mine.roc[split]) return;
    mine.roc[split].forEach((c, j) => c && data.push({ type: "scatter", mode: "lines", x: c.x, y: c.y,
      name: `${TWO ? "AB"[r] + " " : ""}${tick(mine.classes[j])} (${c.auc.toFixed(3)})`,
      line: { color: PALETTE[j % PALETTE.length], dash: r ? "dash" : "solid", width: 2 },
      hovertemplate: `${tick(mine.classes[j])}: %{y:.2f} found at %{x:.2f} false alarms<extra></extra>` }));
  });
  return { data, layout: { showlegend: true, xaxis: { title: "false positive rate", range: [-0.01, 1.01] },
    yaxis: { title: "true positive rate", range: [-0.01, 1.02] }, }, bar: true };
}
const hasRoc = (task, split) => RUNS.some((run) => run.specimens && run.specimens.tasks.some((t) => t.name === task && (t.roc[split] || []).some(Boolean)));
function perClass(details) {
  const names = Object.keys(details.per_class);
  const columns = Object.keys(details.per_class[names[0]] || {});
  return table(["class", ...columns.map(metricTitle)], names.map((n) => [n, ...columns.map((c) => numeric(/^(specimens|predicted)$/.test(c) ? number(details.per_class[n][c]) : score(details.per_class[n][c])))]));
}
const isClinical = (row) => row.task.startsWith("captions/clinical/");
function clinicalTable(rows) {
  const fields = [...new Set(rows.map((r) => r.task.split("/")[2]))], columns = ["precision", "recall", "f1"];
  const maps = RUNS.map((run) => new Map(rowsOf(run).map((r) => [keyOf(r), r])));
  const cell = (row) => (row ? h("span", {}, score(row.value), row.lo !== null ? h("span", { class: "meaning" }, interval(row)) : null) : "–");
  return table(["finding", ...columns.flatMap((c) => maps.map((_, i) => h("span", {}, badge(i), metricTitle(c))))],
    fields.map((f) => [words(f), ...columns.flatMap((c) => maps.map((m) => numeric(cell(m.get(`${rows[0].split}/captions/clinical/${f}/${c}`)))))]));
}
function taskBlock(split, task, rows) {
  const details = RUNS.map((run) => {
    const found = run.evaluation && run.evaluation.tasks.find((t) => t.split === split && t.task === task);
    return found ? found.details : null;
  });
  const kind = task.split("/")[0], figures = [];
  details.forEach((d, i) => {
    if (!d || !d.confusion_matrix) return;
    const n = d.classes.length;
    figures.push(figure(h("span", {}, badge(i), " Confusion matrix"), plot(() => confusion(d), Math.min(720, 190 + 34 * n), "confusion matrix"),
      "Specimens by true class (row) and predicted class (column); colour is the share of the row."));
  });
  if (hasRoc(task, split)) {
    const n = details[0] && details[0].classes ? details[0].classes.length : 4;
    figures.push(figure("ROC curves", plot(() => rocFigure(task, split), 400 + 14 * n, "ROC curves"),
      "One class against all others; in brackets the area under the curve. The dotted line is guessing."));
  }
  return section(taskTitle(task),
    TASK_MEANING[kind] ? note(TASK_MEANING[kind]) : null,
    panel(metricTable(rows.filter((r) => !isClinical(r)))),
    rows.some(isClinical) ? panel(h("h3", {}, "Findings named in the reports"), note("Site, procedure, type, grade and the like, extracted from both texts by rules and compared: precision is the share of what the model wrote that the true report says too, recall the share of what the true report says that the model wrote."), clinicalTable(rows.filter(isClinical))) : null,
    figures.length ? h("div", { class: "grid" }, figures) : null,
    ...details.map((d, i) => d && d.per_class ? h("details", { class: "panel" },
      h("summary", {}, badge(i), " Each class"), perClass(d)) : null));
}
function tasks() {
  return bySplit((split) => {
    const rows = rowsOf(A).filter((r) => r.split === split && !/^(image_to_text|text_to_image|slide_retrieval)/.test(r.task));
    const own = (t) => t.replace(/\/(single_prompt|ensemble)$/, "").replace(/^captions\/.*/, "captions");
    const names = [...new Set(rows.map((r) => own(r.task)))];
    const order = ["zero_shot", "few_shot", "probe", "captions", "loss"];
    const place = (t) => { const at = order.indexOf(t.split("/")[0]); return at < 0 ? 9 : at; };
    names.sort((a, b) => place(a) - place(b));
    const blocks = names.map((t) => taskBlock(split, t, rows.filter((r) => own(r.task) === t).map((r) =>
      (r.task === t ? r : { ...r, shown: r.task.slice(t.length + 1) }))));
    return blocks.length ? [h("nav", { class: "jump", "aria-label": "Tasks" }, names.map((t, i) =>
      h("button", { type: "button", onclick: () => blocks[i].scrollIntoView({ behavior: "smooth" }) }, taskTitle(t)))), ...blocks]
      : [panel(note("No tasks in this evaluation."))];
  });
}

// -- map -------------------------------------------------------------------------------------

function mapTab() {
  const withMap = RUNS.filter((run) => run.specimens && run.specimens.maps.length);
  if (!withMap.length) return [panel(note("No embeddings are stored: ", code(`slidevlm evaluate ${A.folder}`)))];
  const state = { run: RUNS.indexOf(withMap[0]), map: 0, by: "split", find: "" };
  const host = h("div", {}), holder = h("div", {});
  const ways = () => {
    const s = RUNS[state.run].specimens, found = [["split", "split"]];
    for (const t of s.tasks) {
      found.push([`label/${t.name}`, `true class: ${taskTitle(t.name)}`]);
      if (t.predicted.some((v) => v >= 0)) found.push([`predicted/${t.name}`, `predicted class: ${taskTitle(t.name)}`], [`right/${t.name}`, `right or wrong: ${taskTitle(t.name)}`]);
    }
    for (const name of Object.keys(s.numbers)) found.push([`number/${name}`, scoreName(name)]);
    return found;
  };
  const first = ways().find(([w]) => w.startsWith("label/"));
  if (first) state.by = first[0];
  function groups(s) {
    const [kind, ...rest] = state.by.split("/"), task = s.tasks.find((t) => t.name === rest.join("/"));
    if (kind === "split") return [s.splits, (i) => s.split[i]];
    if (kind === "right") return [["right", "wrong"], (i) => (task.label[i] < 0 ? -1 : task.label[i] === task.predicted[i] ? 0 : 1)];
    return [task.classes, (i) => task[kind][i]];
  }
  function make() {
    const s = RUNS[state.run].specimens, m = s.maps[state.map], needle = state.find.toLowerCase();
    const big = s.id.length > 4000;
    const hit = needle ? s.id.map((_, i) => textOf(RUNS[state.run], i).includes(needle)) : null;
    const base = { type: big ? "scattergl" : "scatter", mode: "markers", hoverinfo: "none" };
    const pick = (rows) => ({ x: rows.map((i) => m.x[i]), y: rows.map((i) => m.y[i]), customdata: rows });
    const shine = (rows) => rows.map((i) => (!hit ? 0.85 : hit[i] ? 1 : 0.12));
    const data = [];
    const all = s.id.map((_, i) => i).filter((i) => m.x[i] !== null);
    if (state.by.startsWith("number/")) {
      const values = s.numbers[state.by.slice(7)];
      const rows = all.filter((i) => values[i] !== null);
      data.push({ ...base, ...pick(rows), marker: { size: 8, color: rows.map((i) => values[i]), colorscale: "Viridis", showscale: true, opacity: shine(rows), colorbar: { thickness: 12, outlinewidth: 0 } } });
    } else {
      const [names, group] = groups(s), parts = new Map();
      for (const i of all) { const g = group(i); if (!parts.has(g)) parts.set(g, []); parts.get(g).push(i); }
      for (const g of [...parts.keys()].sort((a, b) => a - b)) {
        const rows = parts.get(g);
        data.push({ ...base, ...pick(rows), name: g < 0 ? "no class known" : tick(names[g]),
          marker: { size: g < 0 ? 5 : 8, color: g < 0 ? "#8a919b" : PALETTE[g % PALETTE.length],
            symbol: g < 0 ? "circle" : SYMBOLS[Math.floor(g / PALETTE.length) % SYMBOLS.length], opacity: g < 0 && !hit ? 0.4 : shine(rows), line: { width: 0.5, color: css("--panel") } } });
      }
    }
    const label = (k) => m.share ? `component ${k + 1} (${percent(m.share[k])} of the variance)` : `${m.name} ${k + 1}`;
    return { data, bar: true, layout: { showlegend: data.length > 1, hovermode: "closest", hoverdistance: 12, dragmode: "zoom",
      xaxis: { title: label(0), zeroline: false }, yaxis: { title: label(1), zeroline: false } },
    then: (node) => {
      node.on("plotly_hover", (e) => showTip(RUNS[state.run], e.points[0].customdata, e.event));
      node.on("plotly_unhover", hideTip);
      node.on("plotly_click", (e) => { hideTip(); openSpecimen(state.run, e.points[0].customdata); });
    } };
  }
  const node = plot(make, innerWidth < 600 ? 460 : 600, "map of embeddings");
  node.id = "map-plot";
  const controls = () => h("div", { class: "controls" },
    withMap.length > 1 ? choice("Run", RUNS.map((run, i) => [String(i), `${"AB"[i]} ${run.name}`]), String(state.run), (v) => { state.run = Number(v); state.map = 0; holder.replaceChildren(controls()); refresh(node); }) : null,
    choice("Map", RUNS[state.run].specimens.maps.map((m, i) => [String(i), m.name]), String(state.map), (v) => { state.map = Number(v); refresh(node); }),
    choice("Colour by", ways(), state.by, (v) => { state.by = v; refresh(node); }),
    h("label", { class: "field" }, h("span", {}, "Highlight"), h("input", { type: "search", placeholder: "word, id, class", oninput: later((e) => { state.find = e.target.value.trim(); refresh(node); }) })));
  holder.append(controls());
  const s = RUNS[state.run].specimens;
  host.append(...thinned(), panel(holder, node, h("p", { class: "caption" },
    "Each point is the embedding of a specimen; those near each other look alike to the model. Hover shows id and report, a click opens the specimen. ",
    "Two dimensions keep a part of the distances only: points that overlap here may be far apart. ",
    s.umap === "not installed" ? "For a UMAP beside it, install the extra (pip install 'slidevlm[umap]') and make the page again." : "")));
  return [host];
}
function later(action) {
  let timer = 0;
  return (event) => { clearTimeout(timer); timer = setTimeout(() => action(event), 150); };
}

// -- specimens -------------------------------------------------------------------------------

const texts = RUNS.map(() => []);
function textOf(run, i) {
  const known = texts[RUNS.indexOf(run)];
  if (known[i] === undefined) {
    const s = run.specimens;
    known[i] = [s.id[i], s.patient[i], s.report[i], s.generated ? s.generated[i] || "" : "",
      ...s.tasks.flatMap((t) => (t.label[i] >= 0 ? [t.classes[t.label[i]]] : []))].join("\n").toLowerCase();
  }
  return known[i];
}
const bare = (word) => word.toLowerCase().replace(/^[^\p{L}\p{N}]+|[^\p{L}\p{N}]+$/gu, "");
function marked(text, other, kind) {
  const left = new Map();
  for (const word of other.split(/\s+/)) { const key = bare(word); left.set(key, (left.get(key) || 0) + 1); }
  const node = h("p", { class: "text", dir: "auto" });
  let run = "", open = null;
  const flush = () => { if (run) node.append(open ? h("mark", { class: kind }, run) : run); run = ""; };
  for (const piece of text.split(/(\s+)/)) {
    const key = bare(piece);
    let mark = open;
    if (key) { const n = left.get(key) || 0; mark = n === 0; if (n) left.set(key, n - 1); }
    if (/^\s*$/.test(piece)) { run += piece; continue; }
    if (mark !== open) { const space = /\s+$/.exec(run); const gap = space ? space[0] : ""; run = run.slice(0, run.length - gap.length); flush(); node.append(gap); open = mark; }
    run += piece;
  }
  flush();
  return node;
}
let browser = null;
function openSpecimen(run, i) {
  const id = RUNS[run].specimens.id[i];
  openTab("specimens");
  if (browser) browser.select(id);
}
function specimensTab() {
  const s = A.specimens;
  if (!s) return [panel(note("No predictions are stored: ", code(`slidevlm evaluate ${A.folder} --save-captions`)))];
  const state = { find: "", split: "all", group: "all", right: "all", sort: "order", page: 0, chosen: 0 };
  const list = h("div", { class: "list", role: "listbox", "aria-label": "Specimens" });
  const count = h("span", { class: "dim count" }), detail = h("div", { class: "detail" });
  const previous = h("button", { type: "button", onclick: () => { state.page--; fill(); }, "aria-label": "Previous page" }, "‹");
  const next = h("button", { type: "button", onclick: () => { state.page++; fill(); }, "aria-label": "Next page" }, "›");
  const place = new Map(s.id.map((id, i) => [id, i]));
  const sorts = [["order", "in the split's order"]];
  for (const name of Object.keys(s.numbers)) sorts.push([`${name}+`, `${scoreName(name)}, lowest first`], [`${name}-`, `${scoreName(name)}, highest first`]);
  const groups = [["all", "all classes"]];
  s.tasks.forEach((t, k) => t.classes.forEach((c, j) => groups.push([`${k}/${j}`, `${taskTitle(t.name)}: ${cut(c, 40)}`])));
  let rows = [];
  function filter() {
    const needles = state.find.toLowerCase().split(/\s+/).filter(Boolean);
    const [k, j] = state.group.split("/").map(Number);
    const wrongIn = (i) => (state.group === "all" ? s.tasks : [s.tasks[k]]).some((t) => t.label[i] >= 0 && t.predicted[i] >= 0 && t.label[i] !== t.predicted[i]);
    rows = s.id.map((_, i) => i).filter((i) =>
      (state.split === "all" || String(s.split[i]) === state.split)
      && (state.group === "all" || s.tasks[k].label[i] === j)
      && (state.right === "all" || (state.right === "wrong") === wrongIn(i))
      && needles.every((needle) => textOf(A, i).includes(needle)));
    if (state.sort !== "order") {
      const values = s.numbers[state.sort.slice(0, -1)], sign = state.sort.endsWith("+") ? 1 : -1;
      rows = rows.filter((i) => values[i] !== null).sort((a, b) => sign * (values[a] - values[b]) || a - b);
    }
    state.page = 0;
    fill();
  }
  function entry(i) {
    const wrong = s.tasks.some((t) => t.label[i] >= 0 && t.predicted[i] >= 0 && t.label[i] !== t.predicted[i]);
    return h("button", { type: "button", class: `entry${i === state.chosen ? " chosen" : ""}`, role: "option", "aria-selected": String(i === state.chosen), "data-id": s.id[i], onclick: () => choose(i, true) },
      h("span", { class: "entry-id" }, s.id[i], wrong ? h("span", { class: "wrong", title: "a predicted class is not the true one" }, " ✕") : null),
      h("span", { class: "entry-text", dir: "auto" }, cut(s.report[i] || "no report", 90)));
  }
  function fill() {
    const pages = Math.max(1, Math.ceil(rows.length / PAGE));
    state.page = Math.min(Math.max(0, state.page), pages - 1);
    const from = state.page * PAGE, shown = rows.slice(from, from + PAGE);
    list.replaceChildren(...(shown.length ? shown.map(entry) : [h("p", { class: "note" }, "Nothing fits this search and these filters.")]));
    count.textContent = rows.length ? `${from + 1}–${from + shown.length} of ${rows.length}` : "none";
    previous.disabled = state.page === 0;
    next.disabled = state.page >= pages - 1;
  }
  function choose(i, scroll) {
    state.chosen = i;
    for (const e of list.querySelectorAll(".entry")) {
      const mine = e.dataset.id === s.id[i];
      e.classList.toggle("chosen", mine);
      e.setAttribute("aria-selected", String(mine));
    }
    detail.replaceChildren(...specimenDetail(i));
    if (scroll && innerWidth < 860) detail.scrollIntoView({ behavior: "smooth" });
  }
  browser = { select: (id) => {
    const i = place.get(id);
    if (i === undefined) return;
    if (!rows.includes(i)) { Object.assign(state, { find: "", split: "all", group: "all", right: "all", sort: "order" }); search.value = ""; filter(); }
    state.page = Math.floor(rows.indexOf(i) / PAGE);
    fill();
    choose(i, true);
  } };
  const set = (name) => (value) => { state[name] = value; filter(); };
  const search = h("input", { type: "search", id: "search", placeholder: "word in a report, id, patient, class", oninput: later((e) => { state.find = e.target.value; filter(); }) });
  filter();
  if (rows.length) choose(rows[0], false);
  return [...thinned(), panel(h("div", { class: "controls" },
    h("label", { class: "field grow" }, h("span", {}, "Search"), search),
    s.splits.length > 1 ? choice("Split", [["all", "all splits"], ...s.splits.map((n, i) => [String(i), n])], "all", set("split")) : null,
    groups.length > 1 ? choice("True class", groups, "all", set("group")) : null,
    groups.length > 1 ? choice("Predicted", [["all", "right or wrong"], ["right", "right"], ["wrong", "wrong"]], "all", set("right")) : null,
    choice("Order", sorts, "order", set("sort")))),
  h("div", { class: "browser" }, h("div", { class: "side" }, h("div", { class: "pager" }, previous, count, next), list), detail)];
}
const scoreName = (name) => { const [kind, metric] = name.split("/"); return metric === "rank" ? `${TASKS[kind] || words(kind)}: rank` : metricTitle(metric || kind); };
function link(i, ...more) {
  const s = A.specimens;
  return h("button", { type: "button", class: "neighbour", onclick: () => { if (browser) browser.select(s.id[i]); } },
    h("span", { class: "entry-id" }, s.id[i]), ...more,
    h("span", { class: "entry-text", dir: "auto" }, cut(s.report[i] || "no report", 150)));
}
function specimenDetail(i) {
  const s = A.specimens, report = s.report[i];
  const others = RUNS.map((run, r) => {
    const t = run.specimens, at = r === 0 ? i : t ? t.id.indexOf(s.id[i]) : -1;
    return t && t.generated && at >= 0 ? t.generated[at] : null;
  });
  const chips = Object.entries(s.numbers).filter(([, v]) => v[i] !== null).map(([name, v]) =>
    h("span", { class: "chip" }, h("span", { class: "dim" }, scoreName(name), " "), number(v[i])));
  const truth = others[0] !== null && report ? marked(report, others[0], "missed") : h("p", { class: "text", dir: "auto" }, report || "no report");
  const columns = [h("div", {}, h("h3", {}, "True report"), truth)];
  others.forEach((text, r) => text !== null && columns.push(h("div", {}, h("h3", {}, badge(r), " Generated report"),
    text ? (report ? marked(text, report, "added") : h("p", { class: "text", dir: "auto" }, text)) : h("p", { class: "note" }, "(empty)"))));
  const known = s.tasks.filter((t) => t.label[i] >= 0 || t.predicted[i] >= 0);
  const bars = (t) => {
    if (!t.probability.length) return "";
    const order = t.classes.map((_, j) => j).sort((a, b) => (t.probability[b][i] || 0) - (t.probability[a][i] || 0)).slice(0, 3);
    return h("div", { class: "bars" }, order.map((j) => h("div", { class: "bar-row" }, h("span", { class: "bar-name" }, t.classes[j]),
      h("span", { class: "bar-track" }, h("span", { class: "bar-fill", style: { width: `${100 * (t.probability[j][i] || 0)}%` } })), h("span", { class: "number dim" }, percent(t.probability[j][i] || 0)))));
  };
  const parts = [h("h2", {}, s.id[i]), h("p", { class: "dim" }, `patient ${s.patient[i]} · ${s.splits[s.split[i]]}${i >= s.judged ? " (learnt from, not judged)" : ""}`),
    chips.length ? h("div", { class: "chips" }, chips) : null,
    h("div", { class: `columns columns${columns.length}` }, columns),
    others[0] !== null && report ? h("p", { class: "caption" }, h("mark", { class: "missed" }, "Marked"), " in the true report: words that the generated one lacks; ",
      h("mark", { class: "added" }, "marked"), " in the generated one: words that the true one lacks, wherever they stand. A different word is not always a different meaning.") : null];
  if (known.length) parts.push(h("h3", {}, "Classes"), table(["task", "true", "predicted", known.some((t) => t.probability.length) ? "most likely" : ""], known.map((t) => [taskTitle(t.name), t.label[i] >= 0 ? t.classes[t.label[i]] : "–",
    t.predicted[i] >= 0 ? h("span", { class: t.label[i] >= 0 && t.predicted[i] !== t.label[i] ? "wrong" : "right" }, t.label[i] >= 0 ? (t.predicted[i] === t.label[i] ? "✓ " : "✕ ") : "", t.classes[t.predicted[i]]) : "–", bars(t)])));
  if (s.near && i < s.near.length) parts.push(h("div", { class: "columns columns2" },
    h("div", {}, h("h3", {}, "Nearest specimens"), h("p", { class: "caption" }, "By the cosine of slide embeddings, within the split."), h("div", { class: "neighbours" }, s.near[i].map(([j, c]) => link(j, h("span", { class: "dim" }, ` ${c.toFixed(3)}${s.patient[j] === s.patient[i] ? " · same patient" : ""}`))))),
    h("div", {}, h("h3", {}, "Nearest reports"), h("p", { class: "caption" }, "The true reports of the split that the slide's embedding lies nearest to."), h("div", { class: "neighbours" }, s.found[i].map(([j, c]) => link(j, h("span", { class: "dim" }, ` ${c.toFixed(3)}`), j === i ? h("span", { class: "right" }, " its own") : null))))));
  return parts;
}

// -- attention -------------------------------------------------------------------------------

const HEAT = ["#14103c", "#541f78", "#9c2e7f", "#de4968", "#fb8761", "#fcfdbf"].map((c, i) => [i / 5, c]);
function cellsOf(slide, scale, k) {
  const bytes = atob(slide.levels[k]), found = Array.from({ length: slide.rows }, () => new Array(slide.columns).fill(null));
  let at = 0;
  slide.steps.forEach((step, i) => {
    at += step;
    found[Math.floor(at / slide.columns)][at % slide.columns] = (bytes.charCodeAt(i) / 255) ** 2 * scale.most;
  });
  return found;
}
function tileMap(one, slide, k, show) {
  const z = cellsOf(slide, one.scales[k], k), what = slide.factor > 1 ? `mean of ${slide.factor} × ${slide.factor} tiles` : "tile";
  const axis = { showgrid: false, zeroline: false, showline: false, linewidth: 0, showticklabels: false, ticks: "", constrain: "domain" };
  const under = show === "tiles" ? null : slide.thumbnail, range = under && under.width > 0;
  const over = under ? { opacity: show === "slide" ? 0 : 0.55 } : {};
  const images = under ? [{ source: under.src, xref: "x", yref: "y", x: under.x, y: under.y, sizex: under.width, sizey: under.height, sizing: "stretch", layer: "below" }] : [];
  const across = range ? { range: [Math.min(under.x, -0.5), Math.max(under.x + under.width, slide.columns - 0.5)] } : {};
  const down = range ? { range: [Math.max(under.y + under.height, slide.rows - 0.5), Math.min(under.y, -0.5)] } : { autorange: "reversed" };
  return { data: [{ type: "heatmap", z, ...over, zmin: 0, zmax: one.scales[k].top, colorscale: HEAT, hoverongaps: false,
    hovertemplate: `${what}: %{z:.3~g} times an even share<extra></extra>`,
    colorbar: { orientation: "h", thickness: 10, outlinewidth: 0, y: -0.02, yanchor: "top", len: 0.9, title: { text: "times an even share of the attention", side: "bottom", font: { size: 12 } } } }],
  layout: { dragmode: "pan", margin: { l: 8, r: 8, t: 8, b: 70 }, plot_bgcolor: css("--ground"), images, xaxis: { ...axis, ...across },
    yaxis: { ...axis, ...down, scaleanchor: "x" } }, bar: true };
}
function dropPlot(one, k) {
  const rows = k ? one.sentence_checks[k - 1] : one.check, what = k ? "change" : "cosine";
  const x = rows.map((r) => r.share), line = (name, key, color, dash) => ({ type: "scatter", mode: "lines+markers", x, y: rows.map((r) => r[key]), name,
    line: { color, width: 2, dash: dash || "solid" }, hovertemplate: `${name}, %{x:.0%} dropped: ${what} %{y:.3f}<extra></extra>` });
  const band = { type: "scatter", mode: "lines", x: [...x, ...[...x].reverse()], y: [...rows.map((r) => r.random_most), ...rows.map((r) => r.random_least).reverse()],
    fill: "toself", line: { width: 0 }, fillcolor: "rgba(138,145,155,.3)", hoverinfo: "skip", showlegend: false };
  return { data: [band, line("random", "random_mean", "#8a919b"), ...(k ? [] : [line("least attended", "least_attended", PALETTE[0], "dot")]), line("most attended", "most_attended", PALETTE[1])],
    layout: { showlegend: true, xaxis: { title: "share of the tiles dropped", tickformat: ".0%" }, yaxis: { title: k ? "change of log-probability a token" : "cosine with the embedding of all tiles" } }, bar: true };
}
function attentionTab() {
  const having = RUNS.filter((run) => run.attention);
  if (!having.length && RUNS.every((run) => run.refused)) return [panel(...RUNS.map((run, i) => h("p", { class: "note" }, badge(i), " ", run.refused)))];
  if (!having.length) return [panel(note("Where the model attends was not asked for. It needs the run's features; make the page again with:"), h("p", {}, code(`slidevlm report ${A.folder} --attention 8`)))];
  const state = { run: RUNS.indexOf(having[0]), at: 0, slide: 0, k: 0, show: "both" };
  const controls = h("div", {}), side = h("div", { class: "sentences" }), said = h("p", { class: "caption" }), told = h("p", { class: "caption" });
  const one = () => RUNS[state.run].attention.specimens[state.at];
  const map = plot(() => tileMap(one(), one().slides[state.slide], state.k, state.show), innerWidth < 600 ? 430 : 560, "attention over the tiles");
  const check = plot(() => dropPlot(one(), state.k), 360, "effect of dropping tiles");
  map.id = "attention-map";
  const SLIDE_CHECK = `The slide's embedding after dropping tiles, as its cosine with the embedding of all tiles: the lower, the more they mattered. Random: mean of ${having[0].attention.seeds} draws, the band from least to most. Where dropping the most attended tiles changes no more than dropping random ones, attention says nothing about the embedding.`;
  const SENTENCE_CHECK = `How much less readily the model would write this sentence, after the words before it, when the tiles are dropped that the sentence attends to most: the change of its mean log-probability a token (in nats); below 0 is less readily. Random: mean of ${having[0].attention.seeds} draws, the band from least to most. Where the two are alike, the attention of the sentence says nothing about it.`;
  const meant = h("span", {});
  const none = note("These features have no positions: the tiles cannot be drawn.");
  function choose(k) {
    state.k = k;
    side.querySelectorAll("button").forEach((b, i) => b.setAttribute("aria-pressed", String(i === k)));
    const s = one(), slide = s.slides[state.slide];
    map.hidden = !slide;
    none.hidden = Boolean(slide);
    said.replaceChildren();
    meant.textContent = k ? SENTENCE_CHECK : SLIDE_CHECK;
    refresh(check);
    if (!slide) return;
    said.append(`1 is an even share: what each of the ${number(s.tiles)} tiles had if all were attended to alike. Colours end at the 99th percentile (${number(s.scales[k].top)}); the most is ${number(s.scales[k].most)}. `,
      s.slides.length > 1 ? `This slide has ${percent(slide.share[k])} of the specimen's attention. ` : "",
      slide.factor > 1 ? `Too many tiles to draw singly: each cell is the mean of ${slide.factor} × ${slide.factor} tiles.` : "Each cell is a tile.");
    refresh(map);
  }
  function fill() {
    const s = one(), run = RUNS[state.run], i = run === A && A.specimens ? A.specimens.id.indexOf(s.id) : -1;
    const entry = (text, k) => h("button", { type: "button", class: "sentence", dir: "auto", "aria-pressed": "false", onclick: () => choose(k) }, text);
    controls.replaceChildren(h("div", { class: "controls" },
      having.length > 1 ? choice("Run", having.map((r) => [String(RUNS.indexOf(r)), `${"AB"[RUNS.indexOf(r)]} ${r.name}`]), String(state.run), (v) => { Object.assign(state, { run: Number(v), at: 0, slide: 0, k: 0 }); fill(); }) : null,
      choice("Specimen", run.attention.specimens.map((x, j) => [String(j), x.id]), String(state.at), (v) => { Object.assign(state, { at: Number(v), slide: 0, k: 0 }); fill(); }),
      s.slides.length > 1 ? choice("Slide", s.slides.map((x, j) => [String(j), `${j + 1}: ${percent(x.share[0])} of the attention`]), String(state.slide), (v) => { state.slide = Number(v); choose(state.k); }) : null,
      s.slides.some((x) => x.thumbnail) ? choice("Show", [["both", "tiles over the slide"], ["slide", "the slide alone"], ["tiles", "tiles alone"]], state.show, (v) => { state.show = v; refresh(map); }) : null,
      i >= 0 ? h("button", { type: "button", onclick: () => openSpecimen(0, i) }, "Its reports") : null));
    side.replaceChildren(h("h3", {}, "Attention of"), entry("The slide's embedding", 0),
      ...(s.sentences.length ? [h("h3", {}, "Sentences of the generated report"), ...s.sentences.map((text, j) => entry(text, j + 1))] : [note("This model writes no reports.")]));
    const other = run.evaluation && run.evaluation.about.model_hash && run.evaluation.about.model_hash !== run.attention.model_hash;
    told.textContent = other ? "The weights that attend here are not those of the evaluation on this page. " : "";
    choose(state.k);
  }
  fill();
  return [note("Attention says where the model reads, not why it decides: it is no explanation and no finding. The check below shows whether the attended tiles matter to the model at all."),
    panel(controls, told, h("div", { class: "attended" }, side, h("div", { class: "map" }, none, map, said))),
    figure("Does it matter?", check, meant)];
}

// -- data ------------------------------------------------------------------------------------

function dataTab() {
  const parts = [];
  RUNS.forEach((run, r) => {
    const c = run.check;
    if (TWO) parts.push(h("h2", {}, badge(r), ` ${run.name}`));
    if (!c) {
      parts.push(panel(note("No data check lies beside this run. Make one, and the page again:"),
        h("p", {}, code((run.lacking.find((l) => l.tab === "data") || {}).command || "slidevlm data check --config CONFIG --output RUN/check"))));
      return;
    }
    const o = c.cohort;
    parts.push(h("div", { class: "cards" }, [["errors", c.errors], ["warnings", c.warnings], ...(o ? [["specimens", o.specimens], ["patients", o.patients], ["tiles", o.tiles]] : [])].map(([name, value]) =>
      h("div", { class: "card" }, h("div", { class: "card-title" }, name), h("div", { class: `value${name === "errors" && value ? " wrong" : ""}` }, number(value))))));
    const order = { error: 0, warning: 1, note: 2 };
    parts.push(section("Findings", panel(c.findings.length ? h("ul", { class: "findings" }, [...c.findings].sort((a, b) => order[a.level] - order[b.level]).map((f) =>
      h("li", {}, h("span", { class: `level ${f.level}` }, f.level), ` ${f.topic}: ${f.message}`,
        f.items.length ? h("details", {}, h("summary", {}, `${f.items.length} listed`), h("div", { class: "items mono" }, f.items.slice(0, 200).map((x) => h("div", {}, x)), f.items.length > 200 ? h("div", { class: "dim" }, `and ${f.items.length - 200} more in check.json`) : null)) : null))) : note("Nothing was found."))));
    if (c.splits.length) parts.push(section("Splits", panel(table(["split", "specimens", "patients", "tiles", "reports", "truncated"], c.splits.map((x) => [x.name, x.specimens, x.patients, x.tiles, x.reports, x.truncated])))));
    const figures = c.histograms.map((one) => figure(one.title, plot(() => histogram(one), 300, one.title), `By split, ${one.unit} on a logarithmic axis${one.mark === null ? "" : "; the line is the limit"}.`));
    figures.push(...c.classes.map((one) => figure(`Classes of ${one.name}`, plot(() => classBars(one), 320, one.name), "Share of each class in each split.")));
    if (figures.length) parts.push(section("Distributions", h("div", { class: "grid" }, figures)));
  });
  return parts;
}
function histogram(one) {
  const low = one.edges.slice(0, -1), high = one.edges.slice(1);
  return { data: Object.entries(one.counts).map(([name, y]) => ({ type: "bar", name: tick(name), x: low.map((v, i) => Math.sqrt(v * high[i])), width: low.map((v, i) => high[i] - v), y,
    hovertext: low.map((v, i) => `${Math.round(v)} to ${Math.round(high[i])} ${plain(one.unit)}`), hoverinfo: "y+text+name" })),
  layout: { barmode: "stack", showlegend: true, xaxis: { type: "log", title: plain(one.unit), dtick: 1 }, yaxis: { title: "specimens" },
    shapes: one.mark === null ? [] : [{ type: "line", x0: one.mark, x1: one.mark, yref: "paper", y0: 0, y1: 1, line: { color: css("--bad"), dash: "dot" } }] } };
}
function classBars(one) {
  return { data: Object.entries(one.counts).map(([name, counts]) => { const total = Math.max(1, counts.reduce((a, b) => a + b, 0));
    return { type: "bar", name: tick(name), x: one.classes.map(tick), y: counts.map((v) => v / total), hovertext: counts.map((v) => `${v} of ${total}`), hoverinfo: "x+text+name" }; }),
  layout: { barmode: "group", showlegend: true, xaxis: { type: "category" }, yaxis: { tickformat: ".0%", title: "of the split" } } };
}

// -- settings --------------------------------------------------------------------------------

function settingsTab() {
  if (!A.settings) return [panel(note("config.yaml is missing in this folder."))];
  const other = TWO && RUNS[1].settings ? new Map(RUNS[1].settings.map((x) => [x.flag, x])) : null;
  let only = true, find = "";
  const host = h("div", {});
  const fill = () => {
    const rows = A.settings.filter((x) => {
      const b = other && other.get(x.flag), differs = b && b.value !== x.value;
      return (!only || (other ? differs : x.given)) && `${x.flag} ${x.value} ${x.help}`.toLowerCase().includes(find);
    }).map((x) => {
      const b = other && other.get(x.flag);
      const row = [h("span", { class: "mono" }, x.flag), h("span", { class: "mono" }, x.value || "–"), ...(other ? [h("span", { class: "mono" }, (b && b.value) || "–")] : []), x.default || "–", h("span", { class: "dim" }, x.help)];
      row.class = x.given ? "given" : "";
      return row;
    });
    host.replaceChildren(rows.length ? table(["argument", other ? badge(0) : "value", ...(other ? [badge(1)] : []), "default", "what it does"], rows, { class: "settings" })
      : note(other ? "The two runs have the same settings." : "Nothing fits."));
  };
  fill();
  return [panel(h("div", { class: "controls" },
    h("label", { class: "field grow" }, h("span", {}, "Search"), h("input", { type: "search", placeholder: "argument or word", oninput: later((e) => { find = e.target.value.toLowerCase(); fill(); }) })),
    choice("Show", [["only", other ? "what differs" : "what was set"], ["all", "everything"]], "only", (v) => { only = v === "only"; fill(); })), host),
  ...RUNS.map((run, i) => run.model ? h("details", { class: "panel" }, h("summary", {}, badge(i), " Model configuration (model.json)"), h("pre", { class: "mono" }, JSON.stringify(run.model, null, 2))) : null),
  ...RUNS.map((run, i) => run.environment ? h("details", { class: "panel" }, h("summary", {}, badge(i), " Environment"), h("pre", { class: "mono" }, JSON.stringify(run.environment, null, 2))) : null)];
}

// -- tabs ------------------------------------------------------------------------------------

const TABS = [["overview", "Overview", overview], ["training", "Training", training], ["retrieval", "Retrieval", retrieval],
  ["tasks", "Tasks", tasks], ["map", "Map", mapTab], ["specimens", "Specimens", specimensTab], ["attention", "Attention", attentionTab],
  ["data", "Data", dataTab], ["settings", "Settings", settingsTab]];
const built = new Map(), buttons = new Map();
const main = document.getElementById("main"), nav = document.getElementById("tabs");
function openTab(id) {
  if (!buttons.has(id)) id = "overview";
  hideTip();
  for (const [name, button] of buttons) {
    button.setAttribute("aria-selected", String(name === id));
    button.tabIndex = name === id ? 0 : -1;
  }
  if (!built.has(id)) {
    const host = h("div", { class: "tab", role: "tabpanel", id: `tab-${id}`, "aria-labelledby": `button-${id}` });
    main.append(host);
    built.set(id, host);
    host.append(...[TABS.find(([name]) => name === id)[2]()].flat().filter(Boolean));
  }
  for (const [name, host] of built) host.hidden = name !== id;
  buttons.get(id).scrollIntoView({ block: "nearest", inline: "nearest" });
  if (location.hash.slice(1) !== id) history.replaceState(null, "", `#${id}`);
}
for (const [id, title] of TABS) {
  const button = h("button", { type: "button", role: "tab", id: `button-${id}`, "aria-controls": `tab-${id}`, onclick: () => { openTab(id); scrollTo(0, 0); } }, title);
  buttons.set(id, button);
  nav.append(button);
}
nav.addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  const ids = TABS.map(([id]) => id), at = ids.findIndex((id) => buttons.get(id).getAttribute("aria-selected") === "true");
  const id = ids[(at + step + ids.length) % ids.length];
  openTab(id);
  buttons.get(id).focus();
});
addEventListener("hashchange", () => openTab(location.hash.slice(1)));
addEventListener("scroll", hideTip, { passive: true });
document.getElementById("title").textContent = RUNS.map((run) => run.name).join(" and ");
document.getElementById("footer").textContent = `Made by slidevlm ${D.version}. One file, no network: it can be sent and kept as it is; it contains the reports of the specimens${RUNS.some((run) => run.attention && run.attention.specimens.some((s) => s.slides.some((x) => x.thumbnail))) ? " and pictures of slides" : ""}.`;
applyTheme();
openTab(location.hash.slice(1));
root.dataset.ready = "yes";
performance.mark("ready");
})();
