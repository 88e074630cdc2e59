// The endpoint's page: asks /v1/rack each second, draws what it says, and chats over /v1/chat/completions.
//
//   /v1/rack --poll--> facts --draw--> Models, Macs, plots          question --chat--> /v1/chat/completions, streamed
//
// Whatever ingress answers: a document that is older than the last one is left out. The history is this tab's.

const POLL_MS = 1000;
const HIDDEN_MS = 5000;
const LIMIT_MS = 10000;
const SHORTEST_S = 60; // that a plot shows
const LONGEST_S = 600;
const GAP_S = 15; // between two samples: what was in between is not known, and not drawn
const KEY = "pomarium-key";
const SILENT = "The endpoint does not answer.";

const at = (id) => document.getElementById(id);
const needsKey = document.documentElement.dataset.key === "needed";
const samples = [];
let facts = null;
let heard = null; // when the last document came, of performance.now()
let fault = null; // why none came since, a sentence
let drawn = "";

// --- small helpers ---------------------------------------------------------------------------------------------------

function make(name, attributes = {}, ...children) {
  const svg = ["svg", "path", "line"].includes(name);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children.filter((child) => child !== null));
  return made;
}

const number = (value) => (value >= 100 || Number.isInteger(value) ? value.toFixed(0) : value.toFixed(1));
const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)}%`;
const layers = (stage) => `${stage.first}–${stage.end - 1}`;
const total = (values) => values.reduce((sum, value) => sum + value, 0);

function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let step = 0;
  while (bytes >= 1024 && step < units.length - 1) [bytes, step] = [bytes / 1024, step + 1];
  return `${bytes < 10 && step > 0 ? bytes.toFixed(1).replace(".0", "") : bytes.toFixed(0)} ${units[step]}`;
}

function bits(perSecond) {
  const units = [[1e12, "Tb/s"], [1e9, "Gb/s"], [1e6, "Mb/s"]];
  const [factor, unit] = units.find(([least]) => perSecond >= least) ?? [1e3, "kb/s"];
  return `${Number((perSecond / factor).toPrecision(3))} ${unit}`;
}

function seconds(passed) {
  return passed < 120 ? `${Math.round(passed)} s` : `${Math.round(passed / 60)} min`;
}

const stored = () => sessionStorage.getItem(KEY);
const headers = () => (stored() === null ? {} : { Authorization: `Bearer ${stored()}` });

function sentence(status, text) {
  try {
    return JSON.parse(text).error.message;
  } catch {
    return status === null ? SILENT : `The endpoint answered with status ${status}.`;
  }
}

async function fetched(path) {
  // Status and text; null and nothing if there is no answer.
  try {
    const answer = await fetch(path, { cache: "no-store", headers: headers(), signal: AbortSignal.timeout(LIMIT_MS) });
    return [answer.status, await answer.text()];
  } catch {
    return [null, ""];
  }
}

// --- the rack's state ------------------------------------------------------------------------------------------------

async function poll() {
  if (!needsKey || stored() !== null) await look();
  setTimeout(poll, document.hidden ? HIDDEN_MS : POLL_MS);
}

async function look() {
  const key = stored();
  const [status, text] = await fetched("v1/rack");
  if (key !== stored()) return; // forgotten meanwhile
  if (status === 401) {
    askForKey(key !== null);
    return;
  }
  if (status === 200) take(JSON.parse(text));
  else fault = sentence(status, text);
  at("door").hidden = true;
  at("main").hidden = facts === null;
  at("forget").hidden = stored() === null;
  tell();
}

function take(found) {
  [heard, fault] = [performance.now(), null];
  if (facts !== null && found.at <= facts.at) return; // another ingress answered, which looked before
  facts = found;
  const now = performance.now() / 1000;
  samples.push({
    time: now,
    speed: total(found.replicas.map((replica) => replica.tokens_per_s)),
    answered: total(found.replicas.map((replica) => replica.requests_per_min)),
    running: total(found.replicas.map((replica) => replica.running)),
    waiting: total(found.replicas.map((replica) => replica.waiting)),
  });
  while (samples[0].time < now - LONGEST_S) samples.shift();
  const shown = JSON.stringify({ ...found, at: 0 });
  if (shown !== drawn) draw(found);
  drawn = shown;
  drawPlots(now);
}

function tell() {
  const age = heard === null ? null : (performance.now() - heard) / 1000;
  const gone = fault !== null || (age !== null && age > 2 * LIMIT_MS / 1000);
  let text = gone ? fault ?? SILENT : "connecting";
  if (gone && age !== null) text += ` No answer since ${seconds(age)}.`;
  if (!gone && facts !== null) text = whole(facts);
  if (at("said").textContent !== text) at("said").textContent = text;
  const well = facts !== null && (hurt(facts) ? "hurt" : "live");
  at("connection").className = `connection ${gone ? "gone" : well || ""}`;
  document.querySelector(".facts").classList.toggle("stale", gone);
}

const hurt = (found) => [...found.macs, ...found.models].some((one) => KINDS[one.state] === "bad") || found.disk;

function whole(found) {
  const lost = found.macs.filter((mac) => mac.state === "lost").length;
  const asleep = found.macs.filter((mac) => mac.state === "asleep").length;
  const alive = found.macs.filter((mac) => mac.alive).length;
  const kind = found.simulated ? "simulated rack" : found.macs.some((mac) => mac.chip) ? "rack" : "one machine";
  if (kind === "one machine") return kind;
  return [`${kind}: ${alive} of ${found.macs.length} Macs alive`, asleep && `${asleep} asleep`, lost && `${lost} lost`]
    .filter(Boolean)
    .join(", ");
}

// --- drawing ---------------------------------------------------------------------------------------------------------

const KINDS = {
  serving: "good", alive: "good", awake: "good",
  starting: "busy", waking: "busy", waiting: "busy", leaving: "busy", draining: "busy", "going to sleep": "busy",
  asleep: "idle", "set aside": "idle", drained: "idle",
  lost: "bad", failed: "bad",
};

const pill = (state) => make("span", { class: `pill ${KINDS[state] ?? "idle"}` }, state);

function bar(shares, label, high = false) {
  const parts = shares.map((share) => {
    const part = make("i");
    part.style.width = `${Math.min(100, 100 * share)}%`;
    return part;
  });
  return make("div", { class: `bar${high ? " high" : ""}`, role: "img", "aria-label": label }, ...parts);
}

function draw(found) {
  const said = notes(found);
  if (said.map((note) => note.textContent).join("") !== at("notes").textContent) at("notes").replaceChildren(...said);
  at("models").replaceChildren(...found.models.map((model) => modelCard(model, found)));
  const macs = found.macs.map((mac) => macCard(mac, found));
  at("macs").replaceChildren(...(macs.length ? macs : [make("p", { class: "empty" }, "No Mac runs a stage now.")]));
  at("version").textContent = `Pomarium ${found.version}`;
  const names = found.models.map((model) => model.name);
  if (names.join("\n") !== [...at("model").options].map((option) => option.value).join("\n")) {
    at("model").replaceChildren(...names.map((name) => make("option", { value: name }, name)));
  }
}

function notes(found) {
  const note = (text, mild = false) => make("p", { class: mild ? "note mild" : "note" }, text);
  const because = (part) => (part.why ? `: ${part.why}` : "");
  const serving = new Set(found.models.filter((model) => model.state === "serving").map((model) => model.name));
  return [
    ...found.missing.map((part) => note(`The endpoint is without ${part.what}${because(part)}.`, part.coming)),
    ...found.losses.map((loss) => note(`${loss.model}: ${loss.reason}`)),
    ...found.waiting
      .filter((report) => serving.has(report.model))
      .map((report) => note(`A further replica of ${report.model} waits for Macs: ${report.reason}`, true)),
    ...(found.disk ? [note(found.disk)] : []),
  ];
}

function fact(name, value) {
  return make("div", {}, make("dt", {}, name), make("dd", {}, value));
}

function modelCard(model, found) {
  const replicas = found.replicas.filter((replica) => replica.model === model.name);
  const card = make(
    "article", { class: "card model" },
    make("div", { class: "head" }, make("h3", {}, model.name), pill(model.state)),
    model.reason ? make("p", { class: "reason" }, model.reason) : null,
  );
  if (replicas.length === 0) return card;
  const use = total(replicas.map((replica) => replica.kv_use)) / replicas.length;
  const share = total(replicas.map((replica) => replica.cached_share)) / replicas.length;
  card.append(make(
    "dl", {},
    fact("tokens/s", number(total(replicas.map((replica) => replica.tokens_per_s)))),
    fact("running", `${total(replicas.map((replica) => replica.running))}`),
    fact("queued", `${total(replicas.map((replica) => replica.waiting))}`),
    fact("KV in use", percent(use)),
    fact("cached prompt", percent(share)),
    fact(replicas.length === 1 ? "replica" : "replicas", `${replicas.length}`),
  ));
  for (const replica of replicas) card.append(path(replica));
  return card;
}

function path(replica) {
  // In the order in which hidden states pass from Mac to Mac.
  const between = (one, two) => replica.links.find((link) => link.here === one.mac && link.there === two.mac);
  const hops = replica.stages.flatMap((stage, place) => [
    place ? arrow(between(replica.stages[place - 1], stage)) : null,
    make("span", { class: "hop" }, make("b", {}, stage.mac), ` ${layers(stage)}`),
  ]);
  const whole = make("span", { class: "sub" }, `${replica.layers} layers`);
  return make("div", { class: "path" }, whole, ...hops.filter(Boolean));
}

function arrow(link) {
  return make("span", { class: "sub" }, "→", link?.bandwidth ? ` ${bits(8 * link.bandwidth)} →` : "");
}

function macCard(mac, found) {
  const held = mac.stages.map((stage) => stage.memory);
  const room = mac.model_memory ?? mac.memory ?? null;
  const purpose = mac.model_memory === undefined ? "" : " for models";
  const words = `${size(total(held))}${room === null ? "" : ` of ${size(room)}`}${purpose}`;
  const replicas = found.replicas.filter((replica) => replica.stages.some((stage) => stage.mac === mac.name));
  const speed = total(replicas.map((replica) => replica.tokens_per_s));
  const other = mac.version !== undefined && mac.version !== found.version;
  const known = mac.chip ? [mac.chip, size(mac.memory), mac.address, mac.head && "head"] : [];
  const about = known.filter(Boolean).join(" · ");
  const idle = room === null ? "no stage" : `no stage · ${size(room)}${purpose}`;
  const away = mac.alive ? "" : mac.state === "lost" ? " lost" : " away";
  const stages = mac.stages.map((stage) => make(
    "li", {}, make("b", {}, stage.model), ` layers ${layers(stage)}, ${size(stage.memory)}`,
  ));
  return make(
    "article", { class: `card mac${away}` },
    make("div", { class: "head" }, make("h3", {}, mac.name), pill(mac.state)),
    about ? make("p", { class: "sub" }, about) : null,
    mac.reason || other ? make("p", { class: "reason" }, mac.reason || `Runs ${mac.version}: left out.`) : null,
    room === null ? null : bar(held.map((bytes) => bytes / room), `Memory: ${words}`, total(held) > 0.95 * room),
    make("p", { class: "sub" }, mac.stages.length ? `${words} · ${number(speed)} tokens/s` : idle),
    stages.length ? make("ul", { class: "stages" }, ...stages) : null,
  );
}

// --- plots -----------------------------------------------------------------------------------------------------------

const PLOTS = [
  { title: "Tokens per second", lines: [{ key: "speed" }] },
  { title: "Requests per minute", lines: [{ key: "answered" }] },
  { title: "Requests at once", lines: [{ key: "running", name: "running" }, { key: "waiting", name: "queued" }] },
];

function drawPlots(now) {
  at("plots").replaceChildren(...PLOTS.map((plot) => plotCard(plot, now)));
}

function plotCard({ title, lines }, now) {
  const [width, height] = [300, 60];
  const most = ceiling(Math.max(1, ...lines.flatMap((line) => samples.map((sample) => sample[line.key]))));
  const span = Math.max(SHORTEST_S, now - samples[0].time);
  const x = (sample) => width * (1 - (now - sample.time) / span);
  const y = (value) => height * (1 - value / most);
  const last = samples[samples.length - 1];
  const figures = lines.map((line) => `${number(last[line.key])}${line.name ? ` ${line.name}` : ""}`).join(", ");
  const label = `${title}, the last ${seconds(span)}: now ${figures}; the axis ends at ${number(most)}`;
  const box = { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none" };
  const svg = make("svg", { ...box, role: "img", "aria-label": label });
  svg.append(make("line", { class: "floor", x1: 0, x2: width, y1: height, y2: height }));
  lines.forEach((line, index) => {
    for (const run of runs()) {
      const points = run.map((sample) => `${x(sample).toFixed(1)},${y(sample[line.key]).toFixed(1)}`);
      const ends = [x(run[0]).toFixed(1), x(run[run.length - 1]).toFixed(1)];
      const area = `M${ends[0]},${height}L${points.join("L")}L${ends[1]},${height}Z`;
      if (index === 0) svg.append(make("path", { class: "area", d: area }));
      svg.append(make("path", { class: index ? "line b" : "line", d: `M${points.join("L")}` }));
    }
  });
  const values = lines.flatMap((line) => [
    number(last[line.key]),
    make("span", {}, line.name ? ` ${line.name} ` : ""),
  ]);
  const axis = [`${seconds(span)} ago`, `top ${number(most)}`, "now"].map((text) => make("span", {}, text));
  return make(
    "article", { class: "card plot" },
    make("h3", {}, title),
    make("div", { class: "now" }, ...values),
    svg,
    make("div", { class: "axis", "aria-hidden": "true" }, ...axis),
  );
}

function runs() {
  const found = [];
  for (const sample of samples) {
    const run = found[found.length - 1];
    if (run && sample.time - run[run.length - 1].time <= GAP_S) run.push(sample);
    else found.push([sample]);
  }
  return found;
}

function ceiling(value) {
  const step = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 3, 5, 7.5, 10].map((factor) => factor * step).find((round) => round >= value);
}

// --- chat ------------------------------------------------------------------------------------------------------------

let messages = [];
let asking = null;

function say(kind, text) {
  const line = make("div", { class: `said ${kind}` }, text);
  at("talk").append(line);
  at("talk").scrollTop = at("talk").scrollHeight;
  return line;
}

async function ask(question) {
  messages.push({ role: "user", content: question });
  say("user", question);
  const answer = { text: "", thought: "", tokens: 0, began: performance.now(), first: null, last: null };
  const line = say("model", "");
  const speed = make("p", { class: "speed" }, "waiting for the first token");
  at("talk").append(speed);
  const own = new AbortController();
  asking = own;
  busy(true);
  const clock = setInterval(() => {
    const passed = seconds((performance.now() - answer.began) / 1000);
    if (answer.first === null) speed.textContent = `waiting for the first token, ${passed}`;
  }, 1000);
  try {
    await stream(own, answer, () => {
      const thought = answer.thought ? [make("span", { class: "thought" }, `${answer.thought}\n`)] : [];
      line.replaceChildren(...thought, answer.text);
      speed.textContent = rate(answer);
      at("talk").scrollTop = at("talk").scrollHeight;
    });
    speed.textContent = rate(answer);
  } catch (error) {
    speed.textContent = own.signal.aborted ? `stopped; ${rate(answer)}` : rate(answer);
    if (!own.signal.aborted && answer.first === null) speed.remove();
    if (!own.signal.aborted) say("fault", error.message);
  } finally {
    clearInterval(clock);
  }
  if (asking !== own) return; // a new chat has begun meanwhile
  if (answer.text) messages.push({ role: "assistant", content: answer.text });
  else messages.pop();
  if (!answer.text && !answer.thought) line.remove();
  asking = null;
  busy(false);
}

async function stream(own, answer, changed) {
  const body = {
    model: at("model").value, messages, stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
  };
  const got = await fetch("v1/chat/completions", {
    method: "POST", body: JSON.stringify(body), signal: own.signal,
    headers: { "Content-Type": "application/json", ...headers() },
  }).catch((error) => {
    throw own.signal.aborted ? error : new Error(SILENT);
  });
  if (!got.ok) throw new Error(sentence(got.status, await got.text()));
  let left = "";
  for await (const piece of texts(got.body)) {
    const events = (left + piece).split("\n\n");
    left = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ") || event === "data: [DONE]") continue;
      taken(JSON.parse(event.slice(6)), answer);
      changed();
    }
  }
}

async function* texts(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let got = await reader.read(); !got.done; got = await reader.read()) yield got.value;
}

function taken(chunk, answer) {
  if (chunk.error) throw new Error(chunk.error.message);
  const delta = chunk.choices?.[0]?.delta ?? {};
  const thought = delta.reasoning ?? delta.reasoning_content ?? "";
  if (delta.content || thought) {
    answer.last = performance.now();
    answer.first ??= { time: answer.last, tokens: chunk.usage?.completion_tokens ?? 1 };
  }
  answer.text += delta.content ?? "";
  answer.thought += thought;
  answer.tokens = chunk.usage?.completion_tokens ?? answer.tokens;
}

function rate(answer) {
  if (answer.first === null) return "no token";
  const began = `first token after ${((answer.first.time - answer.began) / 1000).toFixed(1)} s`;
  const passed = (answer.last - answer.first.time) / 1000;
  const tokens = answer.tokens - answer.first.tokens;
  const rate = passed > 0 && tokens > 0 ? `, ${number(tokens / passed)} tokens/s` : "";
  return `${answer.tokens} tokens${rate}, ${began}`;
}

function busy(yes) {
  const focused = document.activeElement === at(yes ? "send" : "stop");
  at("send").hidden = yes;
  at("stop").hidden = !yes;
  at("talk").setAttribute("aria-busy", yes);
  if (focused) at(yes ? "stop" : "question").focus();
}

// --- what its user does ----------------------------------------------------------------------------------------------

function askForKey(wrong) {
  sessionStorage.removeItem(KEY);
  [facts, heard, fault, drawn] = [null, null, null, ""];
  samples.length = 0;
  at("main").hidden = at("forget").hidden = true;
  at("said").textContent = "locked";
  at("connection").className = "connection";
  if (wrong) {
    at("door-said").textContent = "The endpoint does not take this key. Give one that it was started with.";
    at("door-said").className = "wrong";
  }
  if (at("door").hidden) {
    at("door").hidden = false;
    at("key").focus();
  }
}

at("door").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, at("key").value.trim());
  at("key").value = "";
  look();
});

at("forget").addEventListener("click", () => {
  sessionStorage.removeItem(KEY);
  location.reload(); // what the key has shown is forgotten with it
});

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = at("question").value.trim();
  if (!question || asking !== null) return;
  at("question").value = "";
  ask(question);
});

at("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  at("ask").requestSubmit();
});

at("stop").addEventListener("click", () => asking?.abort());

function clear() {
  asking?.abort();
  [messages, asking] = [[], null];
  at("talk").replaceChildren();
  busy(false);
}

at("new").addEventListener("click", () => {
  clear();
  at("question").focus();
});

document.addEventListener("visibilitychange", () => {
  if (!document.hidden && (!needsKey || stored() !== null)) look();
});

at("base").textContent = new URL("v1", document.baseURI).href;
if (needsKey && stored() === null) askForKey(false);
setInterval(() => {
  if (at("door").hidden) tell();
}, 1000);
poll();
