// The tokens one by one: who wrote each, whether it is trained on, and how likely it was.

const BATCH = 2000; // tokens made at a time
const BINS = [0.99, 0.9, 0.7, 0.5, 0.3, 0.1, 0.03, 0.01]; // probabilities; below the last is the ninth bin
const KINDS = ['prompt', 'sampled', 'tool', 'user', 'template'];
const MODES = { author: 'Author', mask: 'Mask', logprob: 'Log-prob' };
let tokenMode = 'author';

const ENCODER = new TextEncoder();
const newDecoder = () => new TextDecoder('utf-8', { ignoreBOM: true });

function binOf(logprob) {
  const bin = BINS.findIndex((edge) => Math.exp(logprob) >= edge);
  return bin < 0 ? BINS.length : bin;
}

/** All tokens of a trajectory, made batch by batch as they come near; `start` is a position to show and mark. */
async function tokenView(record, tokens, start) {
  const table = await pieceOf();
  const body = h('div', { class: 'tokens', tabindex: '0', role: 'group', 'aria-label': 'Tokens; the arrow keys go from one to the next', 'data-mode': tokenMode });
  const view = { record, tokens, body, table, active: -1, decoder: newDecoder(), held: 0, segment: 0 };
  const near = (seen) => seen.filter((one) => one.isIntersecting).forEach((one) => one.target.make());
  const watch = new IntersectionObserver(near, { rootMargin: '1500px' });
  for (let first = 0; first < tokens.ids.length; first += BATCH) {
    const batch = h('div', { class: 'batch' });
    batch.first = first;
    batch.make = () => makeBatch(view, batch);
    body.append(batch);
    watch.observe(batch);
  }
  body.firstChild?.make();
  listen(view);
  const notes = table.texts.size ? null : h('p', { class: 'notice', text: 'This run has no tokenizer that could be read: the tokens are shown by their ids.' });
  if (Number.isInteger(start)) requestAnimationFrame(() => activate(view, start, 'center'));
  return h('div', { class: 'token-view' }, tokenBar(view), notes, body);
}

// ------------------------------------------------------------------ what an engine said when it scored the tokens again

const STRIP_CELLS = 300; // at most
const STRIP_EDGES = [0.001, 0.01, 0.1, 1]; // nats; over the last is the fifth step

/** How far each sampled token's log-prob is from the engine's: cells over the response, each with its worst token. */
function scoreStrip(view) {
  const { differences } = view.tokens;
  if (!differences?.length) return null;
  const step = Math.ceil(differences.length / STRIP_CELLS);
  const cells = [];
  for (let first = 0; first < differences.length; first += step) cells.push(stripCell(view, first, Math.min(first + step, differences.length)));
  return h('div', { class: 'score-strip', role: 'group', 'aria-label': 'Differences to the log-probs of the engine that scored the tokens again' }, cells);
}

function stripCell(view, first, end) {
  const { differences, prompt_ids: prompt } = view.tokens;
  let worst = -1;
  for (let place = first; place < end; place++) {
    if (Number.isFinite(differences[place]) && (worst < 0 || Math.abs(differences[place]) > Math.abs(differences[worst]))) worst = place;
  }
  if (worst < 0) return h('i', {});
  const position = prompt.length + worst;
  const level = STRIP_EDGES.filter((edge) => Math.abs(differences[worst]) > edge).length;
  const label = `token ${count(position)}: ${signed(differences[worst])}`;
  return h('button', { type: 'button', tabindex: '-1', title: label, 'aria-label': label, 'data-level': String(level), on: { click: () => activate(view, position, 'center') } });
}

const signed = (value) => `${value < 0 ? '−' : '+'}${Math.abs(value).toFixed(6)}`;

function tokenBar(view) {
  const { body } = view;
  const keys = h('div', { class: 'keys' });
  const draw = () => keys.replaceChildren(...legendOf(tokenMode));
  const buttons = Object.entries(MODES).map(([mode, label]) =>
    h('button', { type: 'button', text: label, 'aria-pressed': String(mode === tokenMode), 'data-mode': mode, on: { click: () => setMode(mode) } }));
  function setMode(mode) {
    tokenMode = mode;
    body.dataset.mode = mode;
    buttons.forEach((button) => button.setAttribute('aria-pressed', String(button.dataset.mode === mode)));
    draw();
  }
  draw();
  return h('div', { class: 'token-bar' }, h('div', { class: 'segmented', role: 'group', 'aria-label': 'Colour by' }, buttons), keys, turnButtons(view), scoreStrip(view));
}

/** To each turn's first sampled token. */
function turnButtons(view) {
  const { turns } = view.record;
  const shown = turns.slice(0, 24);
  if (!shown.length) return null;
  return h('div', { class: 'turns' }, 'Turn', shown.map((turn, place) =>
    h('button', { class: 'quiet', type: 'button', text: String(place + 1), 'aria-label': `To turn ${place + 1}`, on: { click: () => activate(view, turn.start, 'start', false) } })));
}

function legendOf(mode) {
  if (mode === 'author') return KINDS.map((kind) => h('span', {}, h('i', { class: 'swatch', 'data-kind': kind }), kind));
  if (mode === 'mask') return [['1', 'mask 1: sampled, trained on'], ['0', 'mask 0'], ['p', 'prompt']].map(([mask, label]) => h('span', {}, h('i', { class: 'swatch', 'data-mask': mask }), label));
  const labels = ['≥ 99%', ...BINS.slice(1).map((edge) => `${+(edge * 100).toFixed(1)}%`), '< 1%'];
  return [h('span', { class: 'meta', text: 'probability' }), h('span', { class: 'scale' }, labels.map((label, bin) => h('span', { 'data-bin': String(bin), text: label })))];
}

function makeBatch(view, batch) {
  if (batch.firstChild) return;
  const { tokens, table } = view;
  const end = Math.min(batch.first + BATCH, tokens.ids.length);
  Object.assign(view, { decoder: newDecoder(), held: 0 });
  for (let before = Math.max(0, batch.first - 3); before < batch.first; before++) shownText(view, tokens.ids[before], table);
  const parts = [];
  for (let position = batch.first; position < end; position++) parts.push(tokenElement(view, position, table));
  batch.append(...parts);
}

function segmentAt(view, position) {
  const segments = view.tokens.segments;
  if (view.segment >= segments.length || position < segments[view.segment][1]) view.segment = 0;
  while (view.segment < segments.length && position >= segments[view.segment][2]) view.segment++;
  return segments[view.segment] || ['?', 0, 0];
}

function tokenElement(view, position, table) {
  const { tokens } = view;
  const place = position - tokens.prompt_ids.length;
  const [kind, from] = segmentAt(view, position);
  const id = tokens.ids[position];
  const text = shownText(view, id, table);
  const mask = place < 0 ? 'p' : String(tokens.response_mask[place]);
  const logprob = place < 0 ? NaN : tokens.logprobs[place];
  const bin = typeof logprob === 'number' && !Number.isNaN(logprob) ? String(binOf(logprob)) : null;
  const element = h('span', { class: 'token', 'data-kind': KINDS.includes(kind) ? kind : 'unknown', 'data-mask': mask, 'data-bin': bin, 'data-special': table.special.has(id), 'data-first': position === from });
  element.position = position;
  element.textContent = text;
  return element;
}

/** A token's text; a character that several tokens make up appears in the last of them, its bytes in those before. */
function shownText(view, id, table) {
  const piece = table.texts.get(id);
  if (piece === undefined) return `⟨${id}⟩`;
  if (typeof piece === 'string' && !view.held) return printable(piece);
  const bytes = typeof piece === 'string' ? [...ENCODER.encode(piece)] : piece;
  const text = view.decoder.decode(Uint8Array.from(bytes), { stream: true });
  const over = text.includes('\uFFFD') ? 0 : view.held + bytes.length - ENCODER.encode(text).length;
  view.held = Math.max(0, over);
  return printable(text) + (view.held ? `‹${hex(bytes.slice(-view.held))}›` : '');
}

const hex = (bytes) => bytes.map((byte) => byte.toString(16).toUpperCase().padStart(2, '0')).join(' ');
const printable = (text) => visible(text).replace(/\n/g, '↵\n').replace(/\t/g, '⇥\t');

// ------------------------------------------------------------------ the card of one token

function listen(view) {
  const { body } = view;
  body.addEventListener('mouseover', (event) => event.target.position !== undefined && activate(view, event.target.position));
  body.addEventListener('mouseleave', () => hideTip());
  body.addEventListener('blur', () => hideTip());
  body.addEventListener('click', (event) => event.target.position !== undefined && replaceAddress({ position: event.target.position }));
  body.addEventListener('keydown', (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 20, ArrowUp: -20, Home: -Infinity, End: Infinity }[event.key];
    if (step === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const last = view.tokens.ids.length - 1;
    activate(view, Math.max(0, Math.min(last, (view.active < 0 ? -1 : view.active) + step)), 'nearest');
  });
}

function elementAt(view, position) {
  const batch = view.body.children[Math.floor(position / BATCH)];
  if (!batch) return null;
  batch.make();
  return batch.children[position % BATCH] || null;
}

function activate(view, position, scroll, tip = true) {
  const element = elementAt(view, position);
  if (!element) return;
  view.body.querySelector('.token.active')?.classList.remove('active');
  element.classList.add('active');
  view.active = position;
  if (scroll) element.scrollIntoView({ block: scroll });
  if (tip) showTip(element, tokenCard(view, position));
  else hideTip();
}

function tokenCard(view, position) {
  const { tokens, record, table } = view;
  const place = position - tokens.prompt_ids.length;
  const id = tokens.ids[position];
  const logprob = place < 0 ? NaN : tokens.logprobs[place];
  const known = typeof logprob === 'number' && !Number.isNaN(logprob);
  const turn = record.turns.findIndex((one) => position >= one.start && position < one.end);
  const [kind] = segmentAt(view, position);
  const entries = [
    ['id', id],
    ['text', pieceText(table.texts.get(id))],
    ['position', place < 0 ? `${count(position)} in the prompt` : `${count(position)}, response ${count(place)}`],
    ['author', `${visible(kind)}${turn < 0 ? '' : `, turn ${turn + 1}`}`],
    ['mask', place < 0 ? 'prompt' : short(tokens.response_mask[place])],
    ['log-prob', known ? `${logprob}` : '–'],
    ...(tokens.differences && Number.isFinite(tokens.differences[place]) ? [['scored again', signed(tokens.differences[place])]] : []),
    ['probability', known ? `${+(100 * Math.exp(logprob)).toPrecision(6)}%` : '–'],
  ];
  return h('dl', {}, entries.map(([name, value]) => h('div', {}, h('dt', { text: name }), h('dd', { text: value }))));
}

function pieceText(piece) {
  if (piece === undefined) return 'not in the vocabulary';
  return typeof piece === 'string' ? brief(JSON.stringify(piece), 120) : `bytes ${hex(piece)}`;
}

function showTip(anchor, card) {
  const tip = $('tip');
  tip.replaceChildren(card);
  tip.hidden = false;
  const box = anchor.getClientRects()[0] || anchor.getBoundingClientRect();
  const [wide, high] = [tip.offsetWidth, tip.offsetHeight];
  const below = box.bottom + 8 + high < innerHeight;
  tip.style.left = `${Math.max(8, Math.min(innerWidth - wide - 8, box.left))}px`;
  tip.style.top = `${below ? box.bottom + 8 : Math.max(8, box.top - high - 8)}px`;
}

function hideTip() {
  $('tip').hidden = true;
}
