// The playground's page. All that comes from models and passages goes in as text, never as markup.

const $ = id => document.getElementById(id);
const EXAMPLE = "Q: Who wrote Things Fall Apart?\nA: The Nigerian author Chinua Achebe, as his debut novel.\nQ: what is it about?";
const DEPTH = 1000, LONG = 700;
let seed = 1, asked = 0, last = null;

async function call(path, body) {
  const response = await fetch(path, body && {method: "POST", headers: {"content-type": "application/json"}, body: JSON.stringify(body)});
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.detail);
  return answer;
}

const make = (tag, style, ...children) => {
  const element = document.createElement(tag);
  if (style) element.className = style;
  element.append(...children);
  return element;
};

// {context: [question, answer, ...], question, gold}, or null where nothing is typed
function parse(text) {
  text = text.trim();
  if (!text) return null;
  if (text.startsWith("{")) {
    const record = JSON.parse(text), gold = record.gold_docids || (record.positive_ctxs || []).map(passage => passage.passage_id);
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
  if (turns.length % 2 === 0 || turns[0].who !== "Q") throw new Error("the conversation must begin and end with a question");
  if (turns.some(turn => !turn.said)) throw new Error("a turn is empty");
  return {context: turns.slice(0, -1).map(turn => turn.said), question: turns[turns.length - 1].said, gold: null};
}

function preview() {
  let items = [];
  $("talk").setAttribute("aria-invalid", "false");
  try {
    const talk = parse($("talk").value);
    if (talk) {
      items = [...talk.context, talk.question].map((said, i) => make("li", "", make("span", "who", "QA"[i % 2]), i === talk.context.length ? make("strong", "", said) : said));
      if (talk.gold && !$("gold").value) $("gold").value = talk.gold.join(", ");
    }
  } catch (error) {
    if (!$("talk").value.trim().endsWith(":")) items = [make("li", "muted", error.message)];
    $("talk").setAttribute("aria-invalid", "true");
  }
  $("parsed").replaceChildren(...items);
}

const golds = () => $("gold").value.split(/[\s,]+/).filter(Boolean);

async function search(query, talk, mine) {
  const index = $("index").value, gold = golds();
  const found = await call("search", {index, queries: [query], k: Number($("k").value) || 10, contents: true});
  if (found.errors) throw new Error(found.errors["0"]);
  const hits = found.results[0], items = [["raw question", talk.question], ["query", query]].filter(([name, text]) => name === "query" || text !== query);
  const [marks, ranks] = await Promise.all([
    hits.length ? call("playground/marks", {query, texts: hits.map(hit => hit.contents)}) : {texts: []},
    gold.length ? call("rank", {index, depth: DEPTH, items: items.map(([id, text]) => ({id, query: text, gold_docids: gold}))}) : null,
  ]);
  if (mine !== asked) return;
  $("passages").replaceChildren(...hits.map((hit, i) => passage(hit, i + 1, marks.texts[i], gold.includes(hit.docid))));
  $("found").textContent = hits.length ? `${hits.length} ${hits.length === 1 ? "passage" : "passages"}` : "No passage has a word of the query";
  $("ranks").hidden = !ranks;
  if (ranks) $("ranks").replaceChildren("Gold passage: ", ...items.flatMap(([name], i) => [i ? " → " : "", chip(name, ranks.ranks[name], ranks.errors[name])]));
}

function chip(name, rank, error) {
  const good = rank && rank <= 10;
  return make("span", "chip " + (good ? "good" : rank ? "" : "bad"), `${name}: ` + (error || (rank ? `rank ${rank}` : `not in the first ${DEPTH.toLocaleString("en")}`)));
}

function passage(hit, place, pieces, gold) {
  const words = all => {
    let room = all ? Infinity : LONG;
    const shown = [];
    for (const [text, marked] of pieces) {
      if (room <= 0) break;
      const part = text.length > room ? text.slice(0, room) : text;
      shown.push(marked ? make("mark", "", part) : part);
      room -= text.length;
    }
    return shown;
  };
  const text = make("p", "", ...words(false));
  const item = make("li", gold ? "gold" : "", make("div", "meta", make("strong", "", String(place)), make("span", "mono", hit.docid),
    make("span", "muted small", `score ${hit.score.toFixed(3)}`), gold ? make("span", "chip good", "gold") : ""), text);
  if (pieces.reduce((sum, [part]) => sum + part.length, 0) > LONG) {
    const more = make("button", "small", "Whole passage");
    more.type = "button";
    more.addEventListener("click", () => { text.replaceChildren(...words(true)); more.remove(); });
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
    if (mine === asked) { $("fault").textContent = error.message; $("fault").hidden = false; $("answer").hidden = true; $("status").hidden = true; }
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
      const answer = await call("playground/rewrite", {rewriter, question: talk.question, context: talk.context, style: $("style").value, seed});
      if (mine !== asked) return;
      query = answer.rewrite ?? talk.question;
      $("thinking").textContent = answer.thinking || answer.output;
      $("thought").hidden = !(answer.thinking || answer.output);
      note = answer.rewrite === null ? `No rewrite could be read (${answer.error}), so the raw question is searched.` : `Rewritten in ${answer.seconds.toFixed(1)} s.`;
      $("note").className = answer.rewrite === null ? "small bad" : "small muted";
    }
    $("note").textContent = note;
    $("note").hidden = !note;
    $("again").hidden = !rewriter;
    $("query").value = query;
    await search(query, talk, mine);
  }, rewriter ? "Rewriting … (the first time its model has to be loaded)" : "Searching …");
}

$("form").addEventListener("submit", event => { event.preventDefault(); seed = 1; submit(); });
$("again").addEventListener("click", () => { seed += 1; submit(); });
$("requery").addEventListener("submit", event => { event.preventDefault(); run(mine => search($("query").value, last, mine), "Searching …"); });
$("query").addEventListener("keydown", event => { if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); $("requery").requestSubmit(); } });
$("talk").addEventListener("input", preview);
$("talk").addEventListener("keydown", event => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); seed = 1; submit(); } });
$("example").addEventListener("click", () => { $("talk").value = EXAMPLE; $("gold").value = ""; preview(); $("go").focus(); });
$("clear").addEventListener("click", () => { asked += 1; $("talk").value = $("gold").value = ""; preview(); $("answer").hidden = true; $("fault").hidden = true; $("go").disabled = false;
  $("status").hidden = false; $("status").textContent = "The results come here."; $("talk").focus(); });
document.querySelector(".skip").addEventListener("click", event => { event.preventDefault(); $("results").focus(); });

const about = await call("playground/about");
$("index").replaceChildren(...about.indexes.map(index => new Option(index.name, index.name)));
$("rewriter").replaceChildren(new Option("none: the question as it is", ""), ...about.rewriters.map(name => new Option(name, name)));
$("style").value = about.style;
$("served").textContent = about.indexes.map(index => `${index.name}: ${index.passages.toLocaleString("en")} passages, ${index.retriever}`).join(" · ");
preview();
