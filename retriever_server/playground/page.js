// The playground's page. All text of models and passages becomes text nodes, never markup.
import {$, get, h} from "./pages.js";

const EXAMPLE = "Q: Who wrote Things Fall Apart?\n" +
  "A: The Nigerian author Chinua Achebe, as his debut novel.\nQ: what is it about?";
const DEPTH = 1000, LONG = 700;
let seed = 1, asked = 0, last = null;

const post = (path, body) =>
  get(path, {method: "POST", headers: {"content-type": "application/json"}, body: JSON.stringify(body)});

// {context: [question, answer, ...], question, gold}, or null if nothing is typed
function parse(text) {
  text = text.trim();
  if (!text) return null;
  if (text.startsWith("{")) {
    const record = JSON.parse(text);
    const gold = record.gold_docids || (record.positive_ctxs || []).map(passage => passage.passage_id);
    if (typeof record.question !== "string") throw new Error("the JSON has no “question”");
    return {context: (record.context || []).map(String), question: record.question, gold: (gold || []).map(String)};
  }
  const turns = [];
  for (const line of text.split("\n").map(part => part.trim()).filter(Boolean)) {
    const found = /^(q|question|user|human|a|answer|assistant|system|agent|bot)\d*\s*[:>]\s*(.*)$/i.exec(line);
    const who = found ? (/^[quh]/i.test(found[1]) ? "Q" : "A") : turns.length % 2 ? "A" : "Q";
    const previous = turns[turns.length - 1];
    if (previous && previous.who === who) previous.said += " " + (found ? found[2] : line);
    else turns.push({who, said: found ? found[2] : line});
  }
  if (turns.length % 2 === 0 || turns[0].who !== "Q")
    throw new Error("the conversation must begin and end with a question");
  if (turns.some(turn => !turn.said)) throw new Error("a turn is empty");
  return {context: turns.slice(0, -1).map(turn => turn.said), question: turns[turns.length - 1].said, gold: null};
}

function preview() {
  let items = [];
  $("talk").setAttribute("aria-invalid", "false");
  try {
    const talk = parse($("talk").value);
    if (talk) {
      items = [...talk.context, h("strong", {}, talk.question)].map((said, i) =>
        h("li", {}, h("span", {class: "who"}, "QA"[i % 2]), said));
      if (talk.gold && !$("gold").value) $("gold").value = talk.gold.join(", ");
    }
  } catch (error) {
    if (!$("talk").value.trim().endsWith(":")) items = [h("li", {class: "muted"}, error.message)];
    $("talk").setAttribute("aria-invalid", "true");
  }
  $("parsed").replaceChildren(...items);
}

const golds = () => $("gold").value.split(/[\s,]+/).filter(Boolean);

async function search(query, talk, mine) {
  const index = $("index").value, gold = golds();
  const found = await post("search", {index, queries: [query], k: Number($("k").value) || 10, contents: true});
  if (found.errors) throw new Error(found.errors["0"]);
  const hits = found.results[0], items = [{id: "query", query, gold_docids: gold}];
  if (talk.question !== query) items.unshift({id: "raw question", query: talk.question, gold_docids: gold});
  const [marks, ranks] = await Promise.all([
    hits.length ? post("playground/marks", {query, texts: hits.map(hit => hit.contents)}) : {texts: []},
    gold.length ? post("rank", {index, depth: DEPTH, items}) : null,
  ]);
  if (mine !== asked) return;
  $("passages").replaceChildren(
    ...hits.map((hit, i) => passage(hit, i + 1, marks.texts[i], gold.includes(hit.docid))));
  const count = `${hits.length} ${hits.length === 1 ? "passage" : "passages"}`;
  $("found").textContent = hits.length ? count : "No passage has a word of the query";
  $("ranks").hidden = !ranks;
  if (ranks) $("ranks").replaceChildren("Gold passage: ",
    ...items.flatMap(({id}, i) => [i ? " → " : "", chip(id, ranks.ranks[id], ranks.errors[id])]));
}

function chip(name, rank, error) {
  const style = rank && rank <= 10 ? "good" : rank ? "" : "bad";
  const absent = `not in the first ${DEPTH.toLocaleString("en")}`;
  return h("span", {class: "chip " + style}, `${name}: ${error || (rank ? `rank ${rank}` : absent)}`);
}

function passage(hit, place, pieces, gold) {
  const words = all => {
    let room = all ? Infinity : LONG;
    const shown = [];
    for (const [text, marked] of pieces) {
      if (room <= 0) break;
      const part = text.length > room ? text.slice(0, room) : text;
      shown.push(marked ? h("mark", {}, part) : part);
      room -= text.length;
    }
    return shown;
  };
  const text = h("p", {}, words(false));
  const meta = h("div", {class: "meta"}, h("strong", {}, String(place)), h("span", {class: "mono"}, hit.docid),
    h("span", {class: "muted small"}, `score ${hit.score.toFixed(3)}`),
    gold && h("span", {class: "chip good"}, "gold"));
  const item = h("li", {class: gold && "gold"}, meta, text);
  if (pieces.reduce((sum, [part]) => sum + part.length, 0) > LONG) {
    const all = () => { text.replaceChildren(...words(true)); more.remove(); };
    const more = h("button", {class: "small", type: "button", onclick: all}, "Whole passage");
    text.append(" … ");
    item.append(more);
  }
  return item;
}

async function run(task, words) {
  const mine = ++asked;
  $("fault").hidden = true;
  $("status").hidden = false;
  $("status").textContent = words;
  $("go").disabled = true;
  try {
    await task(mine);
    if (mine === asked) { $("answer").hidden = false; $("status").hidden = true; }
  } catch (error) {
    if (mine === asked) {
      $("fault").textContent = error.message;
      $("fault").hidden = false;
      $("answer").hidden = $("status").hidden = true;
    }
  } finally {
    if (mine === asked) $("go").disabled = false;
  }
}

function submit() {
  const rewriter = $("rewriter").value;
  run(async mine => {
    const talk = parse($("talk").value);
    if (!talk) { $("talk").focus(); throw new Error("Type a question, or press Example."); }
    last = talk;
    let query = talk.question, note = "";
    $("thought").hidden = true;
    if (rewriter) {
      const {question, context} = talk, style = $("style").value;
      const answer = await post("playground/rewrite", {rewriter, question, context, style, seed});
      if (mine !== asked) return;
      const failed = answer.rewrite === null;
      query = answer.rewrite ?? question;
      $("thinking").textContent = answer.thinking || answer.output;
      $("thought").hidden = !(answer.thinking || answer.output);
      note = failed ? `No rewrite could be read (${answer.error}), so the raw question is searched.`
        : `Rewritten in ${answer.seconds.toFixed(1)} s.`;
      $("note").className = failed ? "small bad" : "small muted";
    }
    $("note").textContent = note;
    $("note").hidden = !note;
    $("again").hidden = !rewriter;
    $("query").value = query;
    await search(query, talk, mine);
  }, rewriter ? "Rewriting … (the first time its model has to be loaded)" : "Searching …");
}

function clear() {
  asked += 1;
  $("talk").value = $("gold").value = "";
  preview();
  $("answer").hidden = $("fault").hidden = true;
  $("go").disabled = $("status").hidden = false;
  $("status").textContent = "The results come here.";
  $("talk").focus();
}

const on = (id, event, act) => $(id).addEventListener(event, act);
on("form", "submit", event => { event.preventDefault(); seed = 1; submit(); });
on("again", "click", () => { seed += 1; submit(); });
on("requery", "submit", event => {
  event.preventDefault();
  run(mine => search($("query").value, last, mine), "Searching …");
});
on("query", "keydown", event => {
  if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); $("requery").requestSubmit(); }
});
on("talk", "input", preview);
on("talk", "keydown", event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); seed = 1; submit(); }
});
on("example", "click", () => { $("talk").value = EXAMPLE; $("gold").value = ""; preview(); $("go").focus(); });
on("clear", "click", clear);
document.querySelector(".skip").addEventListener("click", event => { event.preventDefault(); $("results").focus(); });

const about = await get("playground/about");
const styles = {paper: "published"};  // other styles are shown by their name
const describe = index => `${index.name}: ${index.passages.toLocaleString("en")} passages, ${index.retriever}`;
$("index").replaceChildren(...about.indexes.map(index => new Option(index.name, index.name)));
$("rewriter").replaceChildren(
  new Option("none: the question as it is", ""), ...about.rewriters.map(name => new Option(name, name)));
$("style").replaceChildren(...about.styles.map(name => new Option(styles[name] || name, name)));
$("style").value = about.style;
$("served").textContent = about.indexes.map(describe).join(" · ");
preview();
