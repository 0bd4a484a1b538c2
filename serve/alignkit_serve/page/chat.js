// A chat on /v1/chat/completions. Whatever the server or a person wrote becomes text nodes, never markup.

const CONSENT_VERSION = "chat-1"; // Names the wording beside the checkbox: a new wording needs a new name.
const KEY = "alignkit.key";

// Control characters draw nothing, and those of bidirectional text can make a sentence read as another.
const CONTROL = /([\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069])/;

const $ = (id) => document.getElementById(id);
const conversation = $("conversation");
const message = $("message");

const turns = []; // {question, text, root, answer, shown, problem, facts, feedback, thumb, judged}
let running = null; // the AbortController of the answer being written
let waiting = null; // the turn that waits for a key

class Problem extends Error {
  constructor(words, status = 0) {
    super(words);
    this.status = status;
  }
}

// ---- the API ----

async function call(path, { signal, body, method = body ? "POST" : "GET", once } = {}) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  if (once) headers["Idempotency-Key"] = once;
  let response;
  try {
    response = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body) });
  } catch (error) {
    throw signal?.aborted ? error : new Problem("The server cannot be reached. Is it running?");
  }
  if (!response.ok) throw new Problem(await inWords(response), response.status);
  return response;
}

async function inWords(response) {
  let words;
  try {
    words = (await response.json()).error.message;
  } catch {
    words = `The server answered ${response.status} ${response.statusText}`.trim(); // a proxy's page, say
  }
  const seconds = Number(response.headers.get("Retry-After"));
  if (!seconds) return words;
  return `${words.replace(/[.!]?$/, ".")} Try again in ${seconds} ${seconds === 1 ? "second" : "seconds"}.`;
}

// The data of each server-sent event, however the network cut the bytes.
async function* events(response, signal) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      throw signal.aborted ? error : new Problem("The connection was lost before the answer was complete.");
    }
    if (part.done) return;
    const lines = (rest + part.value).split(/\r\n|\n|\r(?!\n|$)/);
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) {
        data.push(line.slice(line[5] === " " ? 6 : 5));
      } else if (line === "" && data.length) {
        yield data.join("\n");
        data = [];
      }
    }
  }
}

async function loadModels(signal) {
  const models = (await (await call("/v1/models", { signal })).json()).data;
  const policy = (model) => model.alignkit?.policy_version ?? model.id;
  const options = models.map((model) => {
    const named = policy(model) === model.id ? model.id : `${model.id} (${policy(model)})`;
    return new Option(named, model.id);
  });
  const chosen = $("model").value;
  $("model").replaceChildren(...options);
  if (models.some((model) => model.id === chosen)) $("model").value = chosen;
  // Several names of one policy are no choice.
  const several = new Set(models.map(policy)).size > 1;
  $("model-choice").hidden = !several;
  $("model-name").hidden = several;
  $("model-name").textContent = models.length ? policy(models[0]) : "";
  $("notice").hidden = true;
}

// ---- asking and answering ----

function request(turn) {
  const system = $("system").value.trim();
  const before = turns.slice(0, turns.indexOf(turn)).filter((one) => one.text);
  const body = {
    model: $("model").value,
    messages: [
      ...(system ? [{ role: "system", content: system }] : []),
      ...before.flatMap((one) => [{ role: "user", content: one.question }, { role: "assistant", content: one.text }]),
      { role: "user", content: turn.question },
    ],
    stream: true,
    stream_options: { include_usage: true },
    alignkit: { consent: { train: $("consent").checked, version: CONSENT_VERSION } },
  };
  const temperature = $("temperature").valueAsNumber;
  const tokens = $("max-tokens").valueAsNumber;
  if (!Number.isNaN(temperature)) body.temperature = temperature;
  if (!Number.isNaN(tokens)) body.max_tokens = tokens;
  return body;
}

async function answer(turn) {
  const { signal } = (running = new AbortController());
  const mine = running;
  const begun = performance.now();
  const facts = { policy: "", tokens: null, seconds: null, end: "" };
  const speak = speaker();
  const tell = () => (turn.facts.textContent = inFacts(facts));
  busy(turn, true);
  try {
    if (!$("model").value) await loadModels(signal);
    await read(turn, signal, facts, speak, tell);
    offerThumbs(turn);
  } catch (problem) {
    if (signal.aborted) facts.end = "stopped";
    else if (problem.status === 401) askForKey(problem.message, turn);
    else if (problem instanceof Problem) complain(turn, problem.message);
    else throw problem;
  } finally {
    if (turn.text || facts.end) {
      facts.seconds = (performance.now() - begun) / 1000;
      tell();
    }
    if (!signal.aborted) speak(turn.text, true);
    if (running === mine) running = null;
    busy(turn, false);
  }
}

async function read(turn, signal, facts, speak, tell) {
  const response = await call("/v1/chat/completions", { signal, body: request(turn) });
  for await (const data of events(response, signal)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Problem(chunk.error.message);
    if (chunk.usage) facts.tokens = chunk.usage.completion_tokens;
    if (chunk.alignkit?.policy_version && !facts.policy) {
      facts.policy = chunk.alignkit.policy_version;
      tell();
    }
    const choice = chunk.choices[0];
    if (!choice) continue;
    if (choice.alignkit?.completion_id) turn.answer.dataset.completion = choice.alignkit.completion_id;
    if (choice.finish_reason === "length") facts.end = "cut off at the token limit";
    if (choice.delta.content) {
      turn.text += choice.delta.content;
      following(() => show(turn.shown, choice.delta.content));
      speak(turn.text);
    }
  }
  throw new Problem("The connection was lost before the answer was complete.");
}

function inFacts({ policy, tokens, seconds, end }) {
  return [
    policy && `policy ${policy}`,
    tokens !== null && `${tokens} ${tokens === 1 ? "token" : "tokens"}`,
    seconds !== null && `${seconds.toFixed(1)} s`,
    end,
  ].filter(Boolean).join(" · ");
}

function ask(question) {
  const root = $("turn").content.cloneNode(true).firstElementChild;
  const answering = root.querySelector(".answer");
  const turn = {
    question,
    text: "",
    root,
    answer: answering,
    shown: answering.querySelector(".text"),
    problem: answering.querySelector(".problem"),
    facts: answering.querySelector(".facts"),
    feedback: answering.querySelector(".feedback"),
    thumb: null, // {id, value}: what was said of the answer
    judged: 0, // how often
  };
  show(root.querySelector(".question"), question);
  turn.problem.querySelector("button").addEventListener("click", () => again(turn));
  for (const button of turn.feedback.querySelectorAll("button")) button.addEventListener("click", () => judge(turn, button.value));
  for (const button of document.querySelectorAll(".turn .problem button")) button.hidden = true; // One can only go on from the end.
  turns.push(turn);
  $("welcome").hidden = true;
  $("turns").append(root);
  conversation.scrollTop = conversation.scrollHeight;
  answer(turn);
}

function again(turn) {
  if (running) return;
  turn.text = "";
  turn.shown.replaceChildren();
  turn.facts.textContent = "";
  turn.problem.hidden = true;
  message.focus();
  answer(turn);
}

function restart() {
  running?.abort();
  waiting = null;
  turns.length = 0;
  $("turns").replaceChildren();
  $("spoken").replaceChildren();
  $("welcome").hidden = false;
  message.focus();
}

// ---- thumbs ----

// An answer that ended well is stored, and only of one that is can anything be said.
function offerThumbs(turn) {
  turn.feedback.hidden = !turn.answer.dataset.completion;
}

// A second click on the same thumb takes it back; the other one takes its place.
async function judge(turn, value) {
  if (turn.judging) return;
  turn.judging = true;
  const status = turn.feedback.querySelector("[role=status]");
  status.textContent = "";
  const completion = turn.answer.dataset.completion;
  const once = `${completion}/${turn.judged}/${value}`; // Clicked again after a failure, it is the same.
  const opinion = { kind: "thumb", value };
  const said = `/v1/feedback/${turn.thumb?.id}`;
  try {
    if (turn.thumb?.value === value) {
      await call(said, { method: "DELETE" });
      turn.thumb = null;
    } else {
      const response = turn.thumb
        ? await call(said, { method: "PATCH", body: opinion, once })
        : await call("/v1/feedback", { body: { ...opinion, target_type: "completion", target_id: completion }, once });
      turn.thumb = { id: (await response.json()).id, value };
    }
    turn.judged++;
  } catch (problem) {
    if (!(problem instanceof Problem)) throw problem;
    const barred = problem.status === 403;
    if (barred) for (const button of turn.feedback.querySelectorAll("button")) button.hidden = true;
    status.textContent = barred ? "This key may not give feedback." : problem.message;
  } finally {
    turn.judging = false;
  }
  for (const button of turn.feedback.querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(turn.thumb?.value === button.value));
  }
}

// ---- what is seen and heard ----

function show(element, text) {
  text.split(CONTROL).forEach((piece, i) => {
    if (i % 2) {
      const mark = document.createElement("span");
      mark.className = "control";
      mark.textContent = `U+${piece.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
      element.append(mark);
    } else if (element.lastChild instanceof Text) {
      element.lastChild.appendData(piece); // into the same node: a character may come in two halves
    } else if (piece) {
      element.append(piece);
    }
  });
}

// Screen readers get whole sentences: word by word they would stutter.
function speaker() {
  let said = 0;
  $("spoken").replaceChildren();
  return (text, all = false) => {
    const unsaid = text.slice(said);
    const sentences = all ? unsaid : (unsaid.match(/^[^]*(?:[.!?…]\s|\n)/)?.[0] ?? "");
    if (!sentences.trim()) return;
    said += sentences.length;
    const line = document.createElement("p");
    show(line, sentences);
    $("spoken").append(line);
  };
}

// Keeps the end in sight for those who were looking at it, and leaves those alone who scrolled up.
function following(change) {
  const atEnd = conversation.scrollHeight - conversation.scrollTop - conversation.clientHeight < 60;
  change();
  if (atEnd) conversation.scrollTop = conversation.scrollHeight;
}

function busy(turn, on) {
  turn.answer.setAttribute("aria-busy", String(on));
  const stopHadFocus = document.activeElement === $("stop");
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
  if (stopHadFocus && !running) message.focus();
}

function complain(turn, words) {
  following(() => {
    turn.problem.hidden = false;
    turn.problem.firstElementChild.textContent = words;
  });
}

// ---- the key ----

function askForKey(reason, turn = null) {
  const refused = sessionStorage.getItem(KEY) !== null;
  waiting = turn;
  forget();
  $("key-reason").textContent = refused ? reason : "";
  $("key-form").hidden = false;
  $("key").focus();
}

function forget() {
  sessionStorage.removeItem(KEY);
  $("held-key").hidden = true;
}

async function useKey() {
  sessionStorage.setItem(KEY, $("key").value);
  $("key").value = "";
  $("key-form").hidden = true;
  $("held-key").hidden = false;
  message.focus();
  const turn = waiting;
  waiting = null;
  await start(turn);
}

async function start(turn = null) {
  try {
    await loadModels();
  } catch (problem) {
    if (!(problem instanceof Problem)) throw problem;
    if (problem.status === 401) return askForKey(problem.message, turn);
    $("notice").textContent = problem.message;
    $("notice").hidden = false;
  }
  if (turn) answer(turn);
}

// ---- what people do ----

function fit() {
  message.style.height = "auto";
  message.style.height = `${message.scrollHeight}px`;
  $("send").disabled = !message.value.trim();
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = message.value.trim();
  if (!question || running) return;
  if (!$("key-form").hidden) {
    $("key").focus();
    return;
  }
  if (!$("settings").checkValidity()) {
    $("settings").showPopover();
    $("settings").reportValidity();
    return;
  }
  message.value = "";
  fit();
  message.focus();
  ask(question);
});
message.addEventListener("input", fit);
message.addEventListener("keydown", (event) => {
  // While an input method composes, Enter chooses a word; Safari tells so by the old code alone.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  $("composer").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  // With the settings open, Escape closes them.
  if (event.key === "Escape" && !$("settings").matches(":popover-open")) running?.abort();
});
$("stop").addEventListener("click", () => running?.abort());
$("new").addEventListener("click", restart);
$("forget").addEventListener("click", forget);
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey();
});

$("held-key").hidden = sessionStorage.getItem(KEY) === null;
fit();
start();
