// The inspector's page: each view has an address behind the #, new steps come in by asking every two seconds.
import {chart, h, legend, short} from "./charts.js";

const POLL_MS = 2000, GROUPS = 10, PAGE = 24;
const TITLES = {
  reward: "Reward a sample", mrr: "Reciprocal rank", format_rate: "Format kept, share", kl: "KL to the reference, nats a token", entropy: "Entropy, nats a token",
  response_tokens: "Response length, tokens", rank1_rate: "Gold at rank 1, share", found_rate: "Gold found, share", spread_rate: "Groups that teach, share",
  truncated_rate: "Cut off, share", clip_rate: "Clipped ratios, share", grad_norm: "Gradient norm", loss: "Loss a token", lr: "Learning rate",
  sampler_gap: "Sampler against trainer, nats", step_s: "Step, seconds",
};
const main = document.getElementById("main"), status = document.getElementById("status");
let runs = [], drawn = 0;

async function get(path, headers) {
  const response = await fetch(path, {headers});
  if (response.status === 304) return null;
  const body = await response.json();
  if (!response.ok) throw new Error(typeof body.detail === "string" ? body.detail : "the server did not understand the request");
  return Object.assign(body, {etag: response.headers.get("etag")});
}

const query = values => new URLSearchParams(Object.entries(values).filter(([, value]) => value !== "" && value !== null && value !== undefined)).toString();
const address = (view, values) => "#" + view + (query(values) ? "?" + query(values) : "");

function here() {
  const [view, rest] = location.hash.slice(1).split("?");
  return {view: Object.hasOwn(VIEWS, view) ? view : "curves", values: Object.fromEntries(new URLSearchParams(rest || ""))};
}

// ---- following the run

async function poll(run) {
  const state = await get(`/api/state?${query({run: run.number, version: run.version, offset: run.offset})}`, run.etag ? {"if-none-match": run.etag} : {});
  if (!state) return false;
  if (state.metrics.reset) run.records = [];
  run.records.push(...state.metrics.records);
  Object.assign(run, {version: state.metrics.version, offset: state.metrics.offset, steps: state.steps, rollouts: state.rollouts, etag: state.etag});
  return true;
}

function tell() {
  status.textContent = runs.map(run => {
    const last = run.steps.length ? `newest step ${run.steps[run.steps.length - 1] + 1}` : "no step yet";
    return `${last}, ${run.rollouts.toLocaleString("en")} rollouts`;
  }).join(" · ");
}

async function follow() {
  try {
    const changed = await Promise.all(runs.map(poll));
    if (changed.includes(true)) {
      tell();
      const {view, values} = here();
      if (view === "curves" || (view === "groups" && !values.step)) await show(false);
    }
  } catch (error) {
    status.textContent = `not reached: ${error.message}; asking again`;
  }
  setTimeout(follow, POLL_MS);
}

// ---- views

function curves() {
  const names = [...new Set(runs.flatMap(run => run.records.flatMap(record => Object.keys(record))))];
  const points = (run, name) => run.records.filter(record => typeof record[name] === "number").map(record => [record.step + 1, record[name]]);
  const two = runs.length > 1;
  const figures = Object.keys(TITLES).filter(name => names.includes(name) || names.includes("val_" + name)).map(name => chart(TITLES[name], runs.flatMap(run => [
    {name: two ? run.name : "training", points: points(run, name), colour: two ? run.number + 1 : 1},
    {name: (two ? run.name + ", " : "") + "held-out", points: points(run, "val_" + name), colour: two ? run.number + 1 : 2, dots: true},
  ])));
  const key = two ? runs.map(run => [`${run.name} (dots: held-out)`, `dot-${run.number + 1}`]) : [["training: each step, and the mean of 5", "dot-1"], ["held-out conversations", "dot-2"]];
  if (!figures.some(Boolean)) return h("p", {class: "panel empty"}, "No finished step yet. This page shows the first one when it is there.");
  return h("section", {class: "panel", "aria-label": "Curves"}, legend(key), h("div", {class: "grid"}, figures));
}

const rankChip = sample => sample.error ? h("span", {class: "chip bad"}, `no rewrite: ${sample.error}`)
  : h("span", {class: "chip " + (sample.rank && sample.rank <= 10 ? "good" : sample.rank ? "" : "bad")}, sample.rank ? `rank ${sample.rank}` : "not found");

const card = (run, sample, more) => h("article", {class: "card"},
  h("div", {}, rankChip(sample), " ", h("span", {class: "chip"}, `reward ${short(sample.reward)}`)), more,
  h("p", {}, h("strong", {}, sample.rewrite ?? sample.text)),
  sample.thinking && h("p", {class: "thought"}, sample.thinking),
  h("div", {class: "foot small"}, h("span", {}, `advantage ${short(sample.advantage)}`),
    h("a", {href: address("rollout", {run: run.number || null, step: sample.step, row: sample.row}), "aria-label": `Rollout ${sample.row} of step ${sample.step + 1}`}, "open")));

const runPicker = (chosen, change) => runs.length < 2 ? null : h("label", {}, "Run", h("select", {name: "run", onchange: change},
  runs.map(run => h("option", {value: run.number, selected: run.number === chosen}, run.name))));

async function groups(values) {
  const run = runs[Number(values.run) || 0], start = Number(values.start) || 0;
  if (!run.steps.length) return h("p", {class: "panel empty"}, "No rollouts yet.");
  const newest = run.steps[run.steps.length - 1], step = values.step ? Number(values.step) - 1 : newest;
  const found = await get(`/api/groups?${query({run: run.number, step, start, count: GROUPS})}`);
  const place = run.steps.indexOf(step);
  const go = more => { location.hash = address("groups", {run: run.number || null, step: step + 1, start: start || null, ...more}).slice(1); };
  const to = (index, label, name) => h("button", {type: "button", disabled: !(index in run.steps), id: name, onclick: () => go({step: run.steps[index] + 1, start: null})}, label);
  const controls = h("div", {class: "panel controls"}, runPicker(run.number, event => go({run: event.target.value, start: null})),
    to(place - 1, "Earlier step", "earlier"),
    h("label", {}, "Step", h("input", {type: "number", id: "step", min: 1, max: newest + 1, value: step + 1, onchange: event => go({step: event.target.value, start: null})})),
    to(place + 1, "Later step", "later"),
    h("a", {href: address("groups", {run: run.number || null})}, values.step ? "Follow the newest" : "Following the newest"));
  const pages = found.total > GROUPS && h("div", {class: "panel controls between"},
    h("button", {type: "button", disabled: start === 0, onclick: () => go({start: Math.max(0, start - GROUPS) || null})}, "Earlier groups"),
    h("span", {class: "muted"}, `groups ${start + 1} to ${Math.min(start + GROUPS, found.total)} of ${found.total}`),
    h("button", {type: "button", disabled: start + GROUPS >= found.total, onclick: () => go({start: start + GROUPS})}, "Later groups"));
  return [controls, found.groups.map(group => h("section", {class: "panel", "aria-label": group.qid},
    h("div", {class: "head"}, h("h2", {class: "mono"}, group.qid), h("span", {class: "muted small"}, `${group.samples.length} samples, mean reward ${short(group.reward)}`),
      h("a", {class: "small", href: address("search", {run: run.number || null, qid: group.qid})}, "all its rollouts")),
    h("div", {class: "cards"}, group.samples.map(sample => card(run, sample))))), pages];
}

const option = (value, label, chosen) => h("option", {value, selected: value === (chosen || "")}, label);

function searchForm(values) {
  const number = (name, label, step) => h("label", {}, label, h("input", {type: "number", name, step, value: values[name] ?? ""}));
  const form = h("form", {class: "panel", role: "search", onsubmit: event => {
    event.preventDefault();
    const given = Object.fromEntries(new FormData(event.target));
    if (given.run === "0") delete given.run;
    location.hash = address("search", given).slice(1);
  }},
  runPicker(Number(values.run) || 0),
  h("label", {class: "wide"}, "Words in the output (\"a phrase\" in quotes)", h("input", {type: "search", name: "text", id: "text", value: values.text ?? ""})),
  h("label", {}, "Query id", h("input", {type: "text", name: "qid", value: values.qid ?? ""})),
  h("label", {}, "Gold rank", h("select", {name: "rank"}, option("", "any", values.rank), option("1", "1", values.rank), option("2-10", "2 to 10", values.rank),
    option("11-100", "11 and below", values.rank), option("none", "not found", values.rank))),
  h("label", {}, "Format", h("select", {name: "error"}, option("", "any", values.error), option("none", "kept", values.error), option("any", "broken", values.error),
    ["no_tag", "many_tags", "empty", "truncated", "format"].map(name => option(name, `broken: ${name}`, values.error)))),
  number("reward_min", "Reward from", "any"), number("reward_max", "to", "any"), number("from", "Step from", "1"), number("to", "to", "1"),
  h("button", {class: "main", type: "submit"}, "Search"));
  return form;
}

async function search(values, mine) {
  const run = runs[Number(values.run) || 0], {from, to, ...rest} = values;
  const asked = {...rest, run: run.number, step_min: from ? from - 1 : "", step_max: to ? to - 1 : "", size: PAGE};
  const list = h("div", {class: "cards"}), said = h("p", {class: "muted", role: "status", id: "found"}, "Searching …"), next = h("div", {class: "controls"});
  const part = [searchForm(values), h("section", {class: "panel", "aria-label": "Rollouts"}, said, list, next)];
  main.replaceChildren(...part);
  let cursor = values.cursor || "", scanned = 0, count = 0;
  while (true) {  // a rare word takes several requests, for each looks through a bounded number of rollouts
    const found = await get(`/api/rollouts?${query({...asked, cursor, size: PAGE - count})}`);
    if (mine !== drawn) return null;
    scanned += found.scanned;
    count += found.rollouts.length;
    list.append(...found.rollouts.map(sample => card(run, sample, h("p", {class: "small"}, `step ${sample.step + 1}, `, h("span", {class: "mono"}, sample.qid)))));
    cursor = found.cursor;
    if (!cursor || count >= PAGE) break;
    said.textContent = `${count} found in ${scanned.toLocaleString("en")} rollouts, searching on …`;
  }
  said.textContent = count ? `${count} rollouts, newest steps first; ${scanned.toLocaleString("en")} of ${run.rollouts.toLocaleString("en")} looked through` : "Nothing like this.";
  if (values.cursor) next.append(h("a", {href: address("search", {...values, cursor: null})}, "To the first page"));
  if (cursor) next.append(h("a", {id: "next", href: address("search", {...values, cursor})}, "Next page"));
  return null;
}

async function rollout(values) {
  const run = runs[Number(values.run) || 0], found = await get(`/api/rollout?${query({run: run.number, step: values.step, row: values.row})}`);
  const others = found.group.map((row, i) => row === found.row ? h("strong", {}, `${i + 1} `) : [h("a", {href: address("rollout", {run: run.number || null, step: found.step, row})}, `${i + 1}`), " "]);
  const facts = {Query: h("span", {class: "mono"}, found.qid), Step: h("a", {href: address("groups", {run: run.number || null, step: found.step + 1})}, String(found.step + 1)), "Samples of its group": others,
    Advantage: short(found.advantage), Tokens: `${found.prompt_tokens} in the prompt, ${found.tokens.length} in the answer, ended by ${found.finish_reason}`,
    "Weights of step": String(found.weights_version)};
  return h("section", {class: "panel", "aria-label": "Rollout"},
    h("h2", {}, found.rewrite ?? "No rewrite"), h("p", {}, rankChip(found), " ", h("span", {class: "chip"}, `reward ${short(found.reward)}`)),
    h("dl", {}, Object.entries(facts).map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])),
    found.prompt && [h("h3", {}, "Prompt"), h("pre", {}, found.prompt)],
    h("h3", {}, "Answer"), h("p", {class: "muted small"}, "Marked: tokens that were sampled at a probability under 10 %; hold the pointer over a token for its own."),
    h("pre", {}, found.tokens.map(([text, logprob]) => h(logprob < Math.log(.1) ? "mark" : "span", {title: `${(100 * Math.exp(logprob)).toFixed(1)} %`}, text))));
}

async function comparison() {
  const found = await get("/api/compare");
  const head = names => h("thead", {}, h("tr", {}, names.map((name, i) => h("th", {scope: "col", class: i && "num"}, name))));
  const row = (name, values) => h("tr", {}, h("th", {scope: "row"}, name), values.map(value => h("td", {class: "num"}, value)));
  const names = runs.map(run => run.name), signed = value => (value > 0 ? "+" : "") + short(value);
  return [curves(),
    h("section", {class: "panel"}, h("h2", {}, "Where they ended"), h("p", {class: "muted small"}, "Mean of the last five values of each metric."),
      h("div", {class: "scroll", tabindex: 0}, h("table", {}, head(["", ...names, "difference"]),
        h("tbody", {}, found.metrics.map(metric => row(metric.name, [...metric.values.map(short), signed(metric.values[1] - metric.values[0])])))))),
    h("section", {class: "panel"}, h("h2", {}, "Queries that differ most"), h("p", {class: "muted small"}, `Mean reward over all rollouts of a query; ${found.shared.toLocaleString("en")} queries are in both runs.`),
      h("div", {class: "scroll", tabindex: 0}, h("table", {}, head(["", ...names, "difference"]), h("tbody", {}, found.queries.map(item => h("tr", {}, h("th", {scope: "row", class: "mono"}, item.qid),
        item.reward.map((value, i) => h("td", {class: "num"}, h("a", {href: address("search", {run: i || null, qid: item.qid})}, short(value)), h("span", {class: "muted small"}, ` of ${item.rollouts[i]}`))),
        h("td", {class: "num"}, signed(item.reward[1] - item.reward[0]))))))))];
}

const VIEWS = {curves, groups, search, rollout, compare: comparison};

async function show(moved = true) {
  const {view, values} = here(), mine = ++drawn;
  for (const link of document.querySelectorAll("nav a")) link.toggleAttribute("aria-current", link.hash === "#" + view);
  try {
    const content = await (VIEWS[view] || curves)(values, mine);
    if (mine === drawn && content) main.replaceChildren(...[content].flat(Infinity).filter(Boolean));
  } catch (error) {
    if (mine === drawn) main.replaceChildren(h("p", {class: "failed", role: "alert"}, error.message));
  }
  if (moved && mine === drawn && view !== "search") { main.focus({preventScroll: true}); scrollTo(0, 0); }
  document.body.dataset.shown = String(mine);
}

document.querySelector(".skip").addEventListener("click", event => { event.preventDefault(); main.focus(); });
addEventListener("hashchange", () => show());
addEventListener("keydown", event => {
  if (event.target.closest("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/") { event.preventDefault(); location.hash = "search"; setTimeout(() => document.getElementById("text")?.focus(), 100); }
  if (event.key === "j") document.getElementById("earlier")?.click();
  if (event.key === "k") document.getElementById("later")?.click();
});

runs = (await get("/api/runs")).map((run, number) => ({...run, number, records: [], steps: [], rollouts: 0, version: "", offset: 0, etag: ""}));
document.getElementById("name").textContent = runs.map(run => run.name).join(" and ");
document.title = runs.map(run => run.name).join(" / ") + ": run inspector";
document.getElementById("compare-link").hidden = runs.length < 2;
await Promise.all(runs.map(poll));
tell();
await show(false);
setTimeout(follow, POLL_MS);
