// Elements from data. Nothing here, or anywhere, turns text into markup: text becomes text nodes and plain attributes.

const $ = (id) => document.getElementById(id);
const SVG = 'http://www.w3.org/2000/svg';
const CUT = 20000; // characters of a text that are shown before "show all"
const CHUNK = 1 << 16;

/** An element: `props` are attributes, but for `class`, `text` and `on` (listeners by event). */
function h(name, props, ...children) {
  return fill(document.createElement(name), props, children);
}

function svg(name, props, ...children) {
  return fill(document.createElementNS(SVG, name), props, children);
}

function fill(element, props, children) {
  for (const [key, value] of Object.entries(props || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key === 'text') element.textContent = value;
    else if (key === 'on') for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    else element.setAttribute(key, value === true ? '' : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

const CONTROL = /[\x00-\x08\x0B-\x1F\x7F-\x9F\u061C\u200E\u200F\u2028-\u202E\u2066-\u2069\uFEFF]|\p{Cs}/gu;

/** Text with its control characters, direction marks and lone surrogates made visible, so that none acts. */
function visible(text) {
  return String(text).replace(CONTROL, (found) => {
    const code = found.codePointAt(0);
    if (code < 0x20) return String.fromCharCode(0x2400 + code);
    return code === 0x7f ? '\u2421' : `\u27e8U+${code.toString(16).toUpperCase().padStart(4, '0')}\u27e9`;
  });
}

/** A one-line form of any text: visible, blanks joined, at most `length` characters. */
function brief(text, length) {
  const start = String(text).slice(0, 4 * length).replace(/\s+/g, ' ').trim();
  return visible(start.length > length ? `${start.slice(0, length - 1)}…` : start);
}

/** Untrusted text as a block: what is long is cut, with a button for the whole of it. */
function textBlock(text, kind) {
  const whole = String(text);
  const block = h('div', { class: `text ${kind || ''}`, dir: 'auto' });
  if (whole.length <= CUT) {
    block.textContent = visible(whole);
    return block;
  }
  const shown = h('div', { text: visible(whole.slice(0, CUT)) });
  const more = h('button', { class: 'more', type: 'button', text: `Show all ${count(whole.length)} characters`, on: { click: showAll } });
  function showAll() {
    const chunks = [];
    for (let at = 0; at < whole.length; at += CHUNK) chunks.push(h('div', { class: 'chunk', text: visible(whole.slice(at, at + CHUNK)) }));
    block.replaceChildren(...chunks);
  }
  block.append(shown, more);
  return block;
}

function pill(text, tone) {
  return h('span', { class: 'pill', 'data-tone': tone, text: visible(text) });
}

// ------------------------------------------------------------------ numbers

const count = (value) => Number(value).toLocaleString('en');
const plural = (value, noun) => `${count(value)} ${noun}${value === 1 ? '' : 's'}`;
const trajectories = (value) => `${count(value)} ${value === 1 ? 'trajectory' : 'trajectories'}`;

function seconds(value) {
  if (typeof value !== 'number') return '–';
  if (value === 0) return '0 s';
  if (value < 0.001) return `${(value * 1e6).toFixed(0)} µs`;
  if (value < 1) return `${(value * 1000).toFixed(value < 0.01 ? 1 : 0)} ms`;
  if (value < 60) return `${value.toFixed(value < 10 ? 2 : 1)} s`;
  return `${Math.floor(value / 60)} min ${String(Math.floor(value % 60)).padStart(2, '0')} s`;
}

function short(value) {
  if (value === null || value === undefined) return '–';
  return typeof value === 'number' ? String(Number(value.toPrecision(4))) : visible(String(value));
}

// ------------------------------------------------------------------ statuses and stop reasons have a tone

const TONES = {
  ok: 'ok', external: 'ok', tool_error: 'bad', unknown_tool: 'warn', invalid_arguments: 'warn', malformed: 'warn', rejected: 'warn',
  backend_error: 'infra', timeout: 'infra', cancelled: 'infra',
  stop: 'ok', tool_stop: 'ok', length: 'warn', max_turns: 'warn', prompt_too_long: 'warn', invalid_tool_calls: 'warn',
  deadline: 'infra', engine_error: 'infra',
};
const tone = (name) => (Object.hasOwn(TONES, name) ? TONES[name] : 'bad');
