// The labelling page. The form is the truth and works without this; here are its keys, the ranking to drag, the draft and the lease.

const BEAT_MS = 60_000; // How often a lease is renewed, as long as somebody is there.
const PAUSE_MS = 500; // How long after a change the draft is saved.

const $ = (id) => document.getElementById(id);
const sheet = $("sheet");
const cards = [...document.querySelectorAll(".card")];

// ---- the form ----

const rankOf = (slot) => sheet.elements[`rank-${slot}`];
const letterOf = (slot) => $(`name-${slot}`).textContent;
const ratingsOf = (slot) => [...sheet.elements[`rating-${slot}`]];

function entered() {
  return {
    cards: cards.map((card, slot) => ({
      rank: Number(rankOf(slot).value) || null,
      rating: Number(ratingsOf(slot).find((one) => one.checked)?.value) || null,
      flags: [...card.querySelectorAll("[type=checkbox]:checked")].map((one) => one.value),
    })),
    comment: sheet.elements.comment.value,
    dwell_ms: dwell(),
  };
}

// ---- the ranking: lists of slots, the best first; those in one list are equal ----

let selected = null;
let dragged = null;

function tiers() {
  const found = [];
  cards.forEach((_, slot) => rankOf(slot).value && (found[rankOf(slot).value] ??= []).push(slot));
  return found.filter(Boolean);
}

function rank(wanted) {
  const kept = wanted.filter((tier) => tier.length);
  cards.forEach((_, slot) => (rankOf(slot).value = kept.findIndex((tier) => tier.includes(slot)) + 1 || ""));
  draw();
  changed();
}

// In a tier of its own before the one at that place, or in that tier itself.
function place(slot, at, tied) {
  const without = tiers().map((tier) => tier.filter((one) => one !== slot));
  if (tied) without[at].push(slot);
  else without.splice(at, 0, [slot]);
  rank(without);
}

function unrank(slot) {
  rank(tiers().map((tier) => tier.filter((one) => one !== slot)));
}

function move(slot, step) {
  const all = tiers();
  const at = all.findIndex((tier) => tier.includes(slot));
  const alone = at >= 0 && all[at].length === 1;
  if (at < 0) {
    if (step < 0) place(slot, all.length, false); // What has no rank yet stands below all that have.
  } else if (!alone) {
    place(slot, step < 0 ? at : at + 1, false);
  } else if (step > 0 && at === all.length - 1) {
    unrank(slot);
  } else if (step > 0 || at > 0) {
    place(slot, step < 0 ? at - 1 : at + 2, false);
  }
  tell(slot);
}

function tie(slot) {
  const all = tiers();
  const at = all.findIndex((tier) => tier.includes(slot));
  if (at < 0 && all.length) place(slot, all.length - 1, true);
  else if (at > 0 && all[at].length === 1) place(slot, at - 1, true);
  tell(slot);
}

function tell(slot) {
  const all = tiers();
  const at = all.findIndex((tier) => tier.includes(slot));
  const others = at < 0 ? [] : all[at].filter((one) => one !== slot).map(letterOf);
  const tied = others.length ? `, tied with ${others.join(", ")}` : "";
  $("spoken").textContent = at < 0 ? `${letterOf(slot)} is not ranked` : `${letterOf(slot)} has rank ${at + 1} of ${all.length}${tied}`;
}

// ---- what is seen ----

function element(name, className, text = "") {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

function chip(slot) {
  const made = element("div", "chip");
  const name = element("button", "name");
  name.append(element("span", "letter", letterOf(slot)), element("span", "start", cards[slot].querySelector(".text").textContent.slice(0, 80)));
  name.addEventListener("click", () => select(slot));
  made.append(name);
  for (const [sign, words, act] of [["↑", "up", () => move(slot, -1)], ["=", "to a tie with the one above", () => tie(slot)], ["↓", "down", () => move(slot, 1)]]) {
    const button = element("button", "step", sign);
    button.title = `Move ${letterOf(slot)} ${words}`;
    button.setAttribute("aria-label", button.title);
    button.addEventListener("click", act);
    made.append(button);
  }
  for (const button of made.children) button.type = "button";
  made.draggable = true;
  made.addEventListener("dragstart", (event) => {
    dragged = slot;
    event.dataTransfer.setData("text/plain", letterOf(slot));
    event.dataTransfer.effectAllowed = "move";
  });
  made.addEventListener("dragend", () => mark(null));
  return made;
}

const chips = sheet ? cards.map((_, slot) => chip(slot)) : [];

function draw() {
  const focused = document.activeElement;
  const all = tiers();
  const rows = all.flatMap((tier, at) => [gap(at), row(tier, at)]);
  $("tiers").replaceChildren(...rows, gap(all.length));
  const rest = cards.map((_, slot) => slot).filter((slot) => !rankOf(slot).value);
  $("unranked").replaceChildren(...rest.map((slot) => chips[slot]));
  $("tray-name").textContent = rest.length ? `Not ranked yet: drag, or press ↑` : "All are ranked.";
  focused?.focus({ preventScroll: true }); // What is moved loses it.
}

function gap(at) {
  const made = element("li", "gap");
  made.dataset.gap = at;
  made.setAttribute("role", "presentation");
  return made;
}

function row(tier, at) {
  const made = element("li", "tier");
  made.dataset.tier = at;
  const held = element("div", "held");
  held.append(...tier.map((slot) => chips[slot]));
  made.append(element("span", "place", at + 1), held);
  return made;
}

function select(slot) {
  selected = Math.max(0, Math.min(cards.length - 1, slot));
  for (const each of [cards, chips]) each.forEach((one, i) => one.toggleAttribute("data-selected", i === selected));
  const ratings = ratingsOf(selected);
  // The middle: from there an arrow goes either way, and as long as nothing is chosen nothing is suggested.
  (ratings.find((one) => one.checked) ?? ratings[3]).focus({ preventScroll: true });
  cards[selected].scrollIntoView({ block: "nearest" });
}

// ---- dragging ----

function target(event) {
  return dragged === null ? null : event.target.closest("[data-gap], [data-tier], #tray");
}

function mark(over) {
  for (const one of document.querySelectorAll(".over")) one.classList.remove("over");
  over?.classList.add("over");
  if (!over) dragged = null;
}

function drop(event) {
  const over = target(event);
  if (!over) return;
  event.preventDefault();
  const slot = dragged;
  mark(null);
  if (over.dataset.gap) place(slot, Number(over.dataset.gap), false);
  else if (over.dataset.tier) place(slot, Number(over.dataset.tier), true);
  else unrank(slot);
  tell(slot);
}

// ---- the draft, the lease, the time ----

let timer = 0;
let dirty = false;
let active = true;
let saving = Promise.resolve();
let before = 0; // milliseconds that it was in sight until it was hidden last
let since = null;

function dwell() {
  return Math.round(before + (since === null ? 0 : performance.now() - since));
}

function inSight(on) {
  before = dwell();
  since = on ? performance.now() : null;
}

function changed() {
  dirty = true;
  $("saved").textContent = "";
  clearTimeout(timer);
  timer = setTimeout(save, PAUSE_MS);
}

function save() {
  clearTimeout(timer);
  saving = saving.then(async () => {
    dirty = false;
    const body = JSON.stringify(entered());
    if (await send("draft", { method: "PUT", body, headers: { "Content-Type": "application/json" }, keepalive: body.length < 60_000 })) {
      if (!dirty) $("saved").textContent = "Draft saved";
    } else {
      dirty = true;
    }
  });
}

function beat() {
  if (!active || document.hidden) return;
  active = false;
  if (dirty) save();
  else send("heartbeat", { method: "POST" });
}

// Whether it went well; if not, the page says why, and what was entered stays where it is.
async function send(what, options) {
  let problem = "";
  try {
    const response = await fetch(`/label/${$("task").dataset.assignment}/${what}`, { ...options, headers: { Accept: "application/json", ...options.headers } });
    if (response.status === 401) problem = "You are signed out. Sign in again in another tab, and go on here.";
    else if (!response.ok) problem = (await response.json()).error.message;
  } catch {
    problem = "The server cannot be reached. What you entered stays on this page.";
  }
  $("notice").textContent = problem;
  $("notice").hidden = !problem;
  return !problem;
}

// ---- what people do ----

const KEYS = {
  j: () => select(selected === null ? 0 : selected + 1),
  k: () => select(selected === null ? 0 : selected - 1),
  "=": () => selected !== null && tie(selected),
  Enter: () => sheet.requestSubmit(),
  s: () => {
    $("skip").open = true;
    $("reason").focus();
  },
  "?": () => $("help").togglePopover(),
};

function onKey(event) {
  if (event.ctrlKey || event.altKey || event.metaKey || event.isComposing) return;
  const at = event.target;
  if (at.matches("textarea, [type=text], [type=number], #reason")) return;
  if (event.key === "Enter" && at.closest("button, a, summary")) return;
  if (event.key === "u" && $("undo")) act(event, () => $("undo").requestSubmit());
  else if (!sheet) return;
  else if (/^[1-9]$/.test(event.key) && cards[event.key - 1]) act(event, () => select(event.key - 1));
  else if (event.shiftKey && selected !== null && event.key === "ArrowUp") act(event, () => move(selected, -1));
  else if (event.shiftKey && selected !== null && event.key === "ArrowDown") act(event, () => move(selected, 1));
  else if (Object.hasOwn(KEYS, event.key)) act(event, KEYS[event.key]);
}

function act(event, what) {
  event.preventDefault();
  what();
}

document.addEventListener("keydown", onKey);

if (sheet) {
  before = Number(sheet.elements.dwell_ms.value) || 0;
  document.documentElement.classList.add("scripted");
  $("ranking").hidden = false;
  draw();
  inSight(!document.hidden);
  $("problems")?.focus();
  sheet.addEventListener("input", changed);
  sheet.addEventListener("submit", () => {
    clearTimeout(timer);
    dirty = false;
    sheet.elements.dwell_ms.value = dwell();
  });
  for (const [slot, card] of cards.entries()) {
    card.addEventListener("click", (event) => event.target.closest("label, summary, input") || select(slot));
  }
  $("ranking").addEventListener("dragover", (event) => {
    const over = target(event);
    if (over) act(event, () => mark(over));
  });
  $("ranking").addEventListener("drop", drop);
  for (const sign of ["keydown", "pointermove", "scroll"]) document.addEventListener(sign, () => (active = true), { passive: true });
  document.addEventListener("visibilitychange", () => {
    inSight(!document.hidden);
    if (document.hidden && dirty) save();
  });
  setInterval(beat, BEAT_MS);
}
