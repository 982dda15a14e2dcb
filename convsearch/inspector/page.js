// The inspector's page: each view has an address behind the #, and the page asks for new steps every two seconds.
import {chart, legend, short} from "./charts.js";
import {$, get, h} from "./pages.js";

const POLL_MS = 2000, GROUPS = 10, PAGE = 24;
const TITLES = {
  reward: "Reward per sample",
  mrr: "Reciprocal rank",
  format_rate: "Format kept, share",
  kl: "KL to the reference, nats per token",
  entropy: "Entropy, nats per token",
  response_tokens: "Response length, tokens",
  rank1_rate: "Gold at rank 1, share",
  found_rate: "Gold found, share",
  spread_rate: "Groups that teach, share",
  truncated_rate: "Cut off, share",
  clip_rate: "Clipped ratios, share",
  grad_norm: "Gradient norm",
  loss: "Loss per token",
  lr: "Learning rate",
  sampler_gap: "Sampler against trainer, nats",
  step_s: "Step, seconds",
};
const ERRORS = ["no_tag", "many_tags", "empty", "truncated", "format"];
const main = $("main");
let runs = [], drawn = 0;

const given = value => value !== "" && value !== null && value !== undefined;
const query = values =>
  new URLSearchParams(Object.entries(values).filter(([, value]) => given(value))).toString();
const address = (view, values) => "#" + view + (query(values) ? "?" + query(values) : "");

function here() {
  const [view, rest] = location.hash.slice(1).split("?");
  const values = Object.fromEntries(new URLSearchParams(rest || ""));
  return {view: Object.hasOwn(VIEWS, view) ? view : "curves", values};
}

// ---- following the run

async function poll(run) {
  const wanted = query({run: run.number, version: run.version, offset: run.offset});
  const state = await get(`/api/state?${wanted}`, {headers: run.etag ? {"if-none-match": run.etag} : {}});
  if (!state) return false;
  if (state.metrics.reset) run.records = [];
  run.records.push(...state.metrics.records);
  const {version, offset} = state.metrics, {steps, rollouts, etag} = state;
  Object.assign(run, {version, offset, steps, rollouts, etag});
  return true;
}

function showStatus() {
  $("status").textContent = runs.map(run => {
    const last = run.steps.length ? `newest step ${run.steps[run.steps.length - 1] + 1}` : "no step yet";
    return `${last}, ${run.rollouts.toLocaleString("en")} rollouts`;
  }).join(" · ");
}

async function follow() {
  try {
    const changed = await Promise.all(runs.map(poll));
    if (changed.includes(true)) {
      showStatus();
      const {view, values} = here();
      if (view === "curves" || (view === "groups" && !values.step)) await show(false);
    }
  } catch (error) {
    $("status").textContent = `not reached: ${error.message}; asking again`;
  }
  setTimeout(follow, POLL_MS);
}

// ---- views

function curves() {
  const names = new Set(runs.flatMap(run => run.records.flatMap(record => Object.keys(record))));
  const points = (run, name) =>
    run.records.filter(record => typeof record[name] === "number").map(record => [record.step + 1, record[name]]);
  const two = runs.length > 1;
  const lines = (run, name) => [
    {name: two ? run.name : "training", points: points(run, name), colour: two ? run.number + 1 : 1},
    {
      name: (two ? run.name + ", " : "") + "held-out",
      points: points(run, "val_" + name),
      colour: two ? run.number + 1 : 2,
      dots: true,
    },
  ];
  const shown = Object.keys(TITLES).filter(name => names.has(name) || names.has("val_" + name));
  const figures = shown.map(name => chart(TITLES[name], runs.flatMap(run => lines(run, name))));
  const key = two
    ? runs.map(run => [`${run.name} (dots: held-out)`, `dot-${run.number + 1}`])
    : [["training: each step, and the mean of 5", "dot-1"], ["held-out conversations", "dot-2"]];
  if (!figures.some(Boolean))
    return h("p", {class: "panel empty"}, "No finished step yet. This page shows the first one when it is there.");
  return h("section", {class: "panel", "aria-label": "Curves"}, legend(key), h("div", {class: "grid"}, figures));
}

function rankChip(sample) {
  if (sample.error) return h("span", {class: "chip bad"}, `no rewrite: ${sample.error}`);
  if (!sample.rank) return h("span", {class: "chip bad"}, "not found");
  return h("span", {class: "chip " + (sample.rank <= 10 ? "good" : "")}, `rank ${sample.rank}`);
}

const rewardChip = sample => h("span", {class: "chip"}, `reward ${short(sample.reward)}`);

function card(run, sample, more) {
  const link = {
    href: address("rollout", {run: run.number || null, step: sample.step, row: sample.row}),
    "aria-label": `Rollout ${sample.row} of step ${sample.step + 1}`,
  };
  return h("article", {class: "card"},
    h("div", {}, rankChip(sample), " ", rewardChip(sample)), more,
    h("p", {}, h("strong", {}, sample.rewrite ?? sample.text)),
    sample.thinking && h("p", {class: "thought"}, sample.thinking),
    h("div", {class: "foot small"}, h("span", {}, `advantage ${short(sample.advantage)}`), h("a", link, "open")));
}

const runPicker = (chosen, change) => runs.length < 2 ? null
  : h("label", {}, "Run", h("select", {name: "run", onchange: change},
    runs.map(run => h("option", {value: run.number, selected: run.number === chosen}, run.name))));

const button = (label, attributes) => h("button", {type: "button", ...attributes}, label);

function groupSection(run, group) {
  const about = `${group.samples.length} samples, mean reward ${short(group.reward)}`;
  const all = address("search", {run: run.number || null, qid: group.qid});
  return h("section", {class: "panel", "aria-label": group.qid},
    h("div", {class: "head"}, h("h2", {class: "mono"}, group.qid), h("span", {class: "muted small"}, about),
      h("a", {class: "small", href: all}, "all its rollouts")),
    h("div", {class: "cards"}, group.samples.map(sample => card(run, sample))));
}

async function groups(values) {
  const run = runs[Number(values.run) || 0], start = Number(values.start) || 0;
  if (!run.steps.length) return h("p", {class: "panel empty"}, "No rollouts yet.");
  const newest = run.steps[run.steps.length - 1], step = values.step ? Number(values.step) - 1 : newest;
  const found = await get(`/api/groups?${query({run: run.number, step, start, count: GROUPS})}`);
  const place = run.steps.indexOf(step);
  const go = more => {
    const now = {run: run.number || null, step: step + 1, start: start || null};
    location.hash = address("groups", {...now, ...more}).slice(1);
  };
  const toStep = (index, label, id) => button(label, {
    disabled: !(index in run.steps), id, onclick: () => go({step: run.steps[index] + 1, start: null}),
  });
  const setStep = event => go({step: event.target.value, start: null});
  const controls = h("div", {class: "panel controls"},
    runPicker(run.number, event => go({run: event.target.value, start: null})),
    toStep(place - 1, "Earlier step", "earlier"),
    h("label", {}, "Step",
      h("input", {type: "number", id: "step", min: 1, max: newest + 1, value: step + 1, onchange: setStep})),
    toStep(place + 1, "Later step", "later"),
    h("a", {href: address("groups", {run: run.number || null})},
      values.step ? "Follow the newest" : "Following the newest"));
  const last = Math.min(start + GROUPS, found.total);
  const earlier = () => go({start: Math.max(0, start - GROUPS) || null}), later = () => go({start: start + GROUPS});
  const pages = found.total > GROUPS && h("div", {class: "panel controls between"},
    button("Earlier groups", {disabled: start === 0, onclick: earlier}),
    h("span", {class: "muted"}, `groups ${start + 1} to ${last} of ${found.total}`),
    button("Later groups", {disabled: start + GROUPS >= found.total, onclick: later}));
  return [controls, found.groups.map(group => groupSection(run, group)), pages];
}

function searchForm(values) {
  const field = (label, attributes, style) =>
    h("label", {class: style}, label, h("input", {...attributes, value: values[attributes.name] ?? ""}));
  const number = (name, label, step) => field(label, {type: "number", name, step});
  const choice = (name, label, options) => h("label", {}, label, h("select", {name}, options.map(([value, text]) =>
    h("option", {value, selected: value === (values[name] || "")}, text))));
  const submit = event => {
    event.preventDefault();
    const fields = Object.fromEntries(new FormData(event.target));
    if (fields.run === "0") delete fields.run;
    location.hash = address("search", fields).slice(1);
  };
  const ranks = [["", "any"], ["1", "1"], ["2-10", "2 to 10"], ["11-100", "11 and below"], ["none", "not found"]];
  const formats = [["", "any"], ["none", "kept"], ["any", "broken"], ...ERRORS.map(name => [name, `broken: ${name}`])];
  return h("form", {class: "panel", role: "search", onsubmit: submit},
    runPicker(Number(values.run) || 0),
    field("Words in the output (\"a phrase\" in quotes)", {type: "search", name: "text", id: "text"}, "wide"),
    field("Query id", {type: "text", name: "qid"}),
    choice("rank", "Gold rank", ranks), choice("error", "Format", formats),
    number("reward_min", "Reward from", "any"), number("reward_max", "to", "any"),
    number("from", "Step from", "1"), number("to", "to", "1"),
    h("button", {class: "main", type: "submit"}, "Search"));
}

async function search(values, mine) {
  const run = runs[Number(values.run) || 0], {from, to, ...rest} = values;
  const wanted = {...rest, run: run.number, step_min: from ? from - 1 : "", step_max: to ? to - 1 : "", size: PAGE};
  const list = h("div", {class: "cards"}), next = h("div", {class: "controls"});
  const said = h("p", {class: "muted", role: "status", id: "found"}, "Searching …");
  main.replaceChildren(searchForm(values),
    h("section", {class: "panel", "aria-label": "Rollouts"}, said, list, next));
  const place = sample =>
    h("p", {class: "small"}, `step ${sample.step + 1}, `, h("span", {class: "mono"}, sample.qid));
  let cursor = values.cursor || "", scanned = 0, count = 0;
  while (true) {  // a rare word takes several requests, because each scans a bounded number of rollouts
    const found = await get(`/api/rollouts?${query({...wanted, cursor, size: PAGE - count})}`);
    if (mine !== drawn) return null;
    scanned += found.scanned;
    count += found.rollouts.length;
    list.append(...found.rollouts.map(sample => card(run, sample, place(sample))));
    cursor = found.cursor;
    if (!cursor || count >= PAGE) break;
    said.textContent = `${count} found in ${scanned.toLocaleString("en")} rollouts, searching on …`;
  }
  const share = `${scanned.toLocaleString("en")} of ${run.rollouts.toLocaleString("en")} looked through`;
  said.textContent = count ? `${count} rollouts, newest steps first; ${share}` : "Nothing like this.";
  if (values.cursor) next.append(h("a", {href: address("search", {...values, cursor: null})}, "To the first page"));
  if (cursor) next.append(h("a", {id: "next", href: address("search", {...values, cursor})}, "Next page"));
  return null;
}

async function rollout(values) {
  const run = runs[Number(values.run) || 0], number = run.number || null;
  const found = await get(`/api/rollout?${query({run: run.number, step: values.step, row: values.row})}`);
  const others = found.group.map((row, i) => row === found.row ? h("strong", {}, `${i + 1} `)
    : [h("a", {href: address("rollout", {run: number, step: found.step, row})}, `${i + 1}`), " "]);
  const step = h("a", {href: address("groups", {run: number, step: found.step + 1})}, String(found.step + 1));
  const answer = `${found.tokens.length} in the answer, ended by ${found.finish_reason}`;
  const facts = {
    Query: h("span", {class: "mono"}, found.qid),
    Step: step,
    "Samples of its group": others,
    Advantage: short(found.advantage),
    Tokens: `${found.prompt_tokens} in the prompt, ${answer}`,
    "Weights of step": String(found.weights_version),
  };
  const hint = "Marked: tokens with a probability under 10 %. Hold the pointer over a token to see its probability.";
  const token = ([text, logprob]) =>
    h(logprob < Math.log(.1) ? "mark" : "span", {title: `${(100 * Math.exp(logprob)).toFixed(1)} %`}, text);
  return h("section", {class: "panel", "aria-label": "Rollout"},
    h("h2", {}, found.rewrite ?? "No rewrite"), h("p", {}, rankChip(found), " ", rewardChip(found)),
    h("dl", {}, Object.entries(facts).map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])),
    found.prompt && [h("h3", {}, "Prompt"), h("pre", {}, found.prompt)],
    h("h3", {}, "Answer"), h("p", {class: "muted small"}, hint), h("pre", {}, found.tokens.map(token)));
}

async function comparison() {
  const found = await get("/api/compare");
  const names = runs.map(run => run.name), signed = value => (value > 0 ? "+" : "") + short(value);
  const head = h("thead", {}, h("tr", {}, ["", ...names, "difference"].map((name, i) =>
    h("th", {scope: "col", class: i && "num"}, name))));
  const row = (name, style, cells) => h("tr", {}, h("th", {scope: "row", class: style}, name),
    cells.map(cell => h("td", {class: "num"}, cell)));
  const table = (title, about, rows) => h("section", {class: "panel"}, h("h2", {}, title),
    h("p", {class: "muted small"}, about),
    h("div", {class: "scroll", tabindex: 0}, h("table", {}, head, h("tbody", {}, rows))));
  const link = (item, value, i) => [
    h("a", {href: address("search", {run: i || null, qid: item.qid})}, short(value)),
    h("span", {class: "muted small"}, ` of ${item.rollouts[i]}`),
  ];
  const metrics = found.metrics.map(({name, values: [a, b]}) => row(name, null, [short(a), short(b), signed(b - a)]));
  const queries = found.queries.map(item => row(item.qid, "mono",
    [...item.reward.map((value, i) => link(item, value, i)), signed(item.reward[1] - item.reward[0])]));
  const shared = `${found.shared.toLocaleString("en")} queries are in both runs`;
  return [curves(),
    table("Where they ended", "Mean of the last five values of each metric.", metrics),
    table("Queries that differ most", `Mean reward over all rollouts of a query; ${shared}.`, queries)];
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
  if (event.key === "/") {
    event.preventDefault();
    location.hash = "search";
    setTimeout(() => $("text")?.focus(), 100);
  }
  if (event.key === "j") $("earlier")?.click();
  if (event.key === "k") $("later")?.click();
});

const empty = {records: [], steps: [], rollouts: 0, version: "", offset: 0, etag: ""};
runs = (await get("/api/runs")).map((run, number) => ({...run, number, ...structuredClone(empty)}));
$("name").textContent = runs.map(run => run.name).join(" and ");
document.title = runs.map(run => run.name).join(" / ") + ": run inspector";
$("compare-link").hidden = runs.length < 2;
await Promise.all(runs.map(poll));
showStatus();
await show(false);
setTimeout(follow, POLL_MS);
