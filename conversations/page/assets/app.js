// What the address says is what is shown: `#/list`, `#/plots`, `#/run`, `#/t/ID[/bBRANCH][/tokens[/POSITION]|/group|/diff|/record]`, then the filters.

const TABS = { conversation: 'Conversation', tokens: 'Tokens', group: 'Group', diff: 'Difference', record: 'Record' };
const KEYS = [
  ['j  k', 'next, previous trajectory'], ['Enter', 'open'], ['Esc', 'close, one thing at a time'], ['/', 'search'],
  ['c  t  g  d  r', 'conversation, tokens, group, difference, record'], ['n  p', 'next, previous turn'], ['l  s', 'list, plots'],
  ['← →', 'from token to token'], ['?', 'this'],
];
const LONG_ID = 200; // longer ids stand in addresses by their place in the file
const place = { view: 'list', row: null, branch: 0, tab: 'conversation', position: null };
let shown = '';
let drawing = 0;
let complaint = ''; // about the address, said when it is shown

// ------------------------------------------------------------------ addresses

function address() {
  const params = filterParams().toString();
  return `#/${pathOf(place)}${params ? `?${params}` : ''}`;
}

function pathOf({ view, row, branch, tab, position }) {
  if (view !== 't') return view;
  const id = column('id', row);
  const name = id.length > LONG_ID || id.startsWith('@') || !id.isWellFormed?.() ? `@${row}` : encodeURIComponent(id);
  return `t/${name}${branch ? `/b${branch}` : ''}${tab === 'conversation' ? '' : `/${tab}`}${tab === 'tokens' && position !== null ? `/${position}` : ''}`;
}

function addressOf(row) {
  const params = filterParams().toString();
  return `#/${pathOf({ view: 't', row, branch: 0, tab: 'conversation', position: null })}${params ? `?${params}` : ''}`;
}

function readAddress() {
  const [path, query] = location.hash.replace(/^#\/?/, '').split('?');
  readFilters(new URLSearchParams(query || ''));
  const [view, name, ...parts] = path.split('/');
  const branch = /^b\d{1,6}$/.test(parts[0] || '') ? Number(parts.shift().slice(1)) : 0;
  const [tab, position] = parts;
  Object.assign(place, { view: ['list', 'plots', 'run', 't'].includes(view) ? view : 'list', row: null, branch: 0, tab: 'conversation', position: null });
  if (place.view !== 't') return;
  place.row = rowNamed(name || '');
  if (place.row === null) {
    complaint = 'There is no such trajectory in this page.';
    place.view = 'list';
    return;
  }
  place.branch = branch <= (column('branches', place.row) || 0) ? branch : 0;
  place.tab = Object.hasOwn(TABS, tab) ? tab : 'conversation';
  place.position = /^\d+$/.test(position || '') ? Number(position) : null;
}

function rowNamed(name) {
  if (/^@\d+$/.test(name)) return Number(name.slice(1)) < rows ? Number(name.slice(1)) : null;
  let id = '';
  try {
    id = decodeURIComponent(name);
  } catch {
    return null;
  }
  const row = summary.columns.id?.indexOf(id) ?? -1;
  return row < 0 ? null : row;
}

/** Goes to another place, as a step that "back" takes back. */
function go(change) {
  Object.assign(place, { position: null }, change);
  if (address() === location.hash) show();
  else location.hash = address();
}

/** The same place, told more exactly: no step of its own. */
function replaceAddress(change) {
  Object.assign(place, change);
  shown = address();
  history.replaceState(null, '', shown);
}

const openPlace = (view) => go({ view, row: null, branch: 0 });
const openRow = (row, tab) => go({ view: 't', row, branch: row === place.row ? place.branch : 0, tab: tab || (place.view === 't' ? place.tab : 'conversation') });

/** New filters or order. */
function changed(change) {
  Object.assign(filters, change);
  replaceAddress({});
  drawBar();
  if ('sort' in change && Object.keys(change).length === 1) reorder();
  else refilter();
  if (!$('plots').hidden) drawPlots();
}

// ------------------------------------------------------------------ showing

function show() {
  shown = address();
  hideTip();
  say(complaint);
  complaint = '';
  const open = place.view === 't';
  document.body.dataset.view = place.view;
  $('list').hidden = !(open || place.view === 'list');
  $('detail').hidden = !open;
  $('plots').hidden = place.view !== 'plots';
  $('about').hidden = place.view !== 'run';
  drawNav();
  if (place.view === 'plots') drawPlots();
  if (open) {
    const at = list.order.indexOf(place.row);
    if (at >= 0) select(at);
    drawDetail();
  } else if (!$('list').hidden) drawRows(true);
  document.title = `${open ? `${brief(column('id', place.row), 60)} · ` : ''}${visible(summary.run.name)} · turntrace`;
}

function drawNav() {
  const link = (view, label) => h('a', { href: `#/${view}`, text: label, 'aria-current': (place.view === 't' ? 'list' : place.view) === view ? 'page' : null, on: { click: (event) => { event.preventDefault(); openPlace(view); } } });
  $('nav').replaceChildren(link('list', 'Trajectories'), link('plots', 'Plots'), link('run', 'Run'));
}

async function drawDetail() {
  const mine = ++drawing;
  const { row, branch, tab, position } = place;
  const detail = $('detail');
  let body;
  let found = null;
  try {
    found = await trajectory(row);
    if (mine !== drawing) return;
    const sequence = branch ? { ...found.branch(branch), other: null } : found;
    body = await tabBody(tab, row, sequence, position, found.record.branches || []);
  } catch (error) {
    body = h('p', { class: 'notice', text: `This trajectory cannot be shown: ${error.message}` });
  }
  if (mine !== drawing) return;
  detail.replaceChildren(detailHead(row, found), h('div', { class: 'body' }, body));
  detail.scrollTop = 0;
}

async function tabBody(tab, row, found, position, tree) {
  const { record, tokens, other } = found;
  if (tab === 'tokens') return tokenView(record, tokens(), position);
  if (tab === 'group') return groupView(row);
  if (tab === 'diff') return other ? differenceView(row) : h('p', { class: 'none', text: 'The other run has no such trajectory.' });
  if (tab === 'record') return recordView(record, tokens());
  const own = tree.find((one) => one.number === place.branch) || null;
  const parts = [...remarks(record), facts(record, row, own), timeline(record), offered(record.tools), conversation(record, { own, tree })].filter(Boolean);
  return tree.length ? h('div', { class: 'session' }, branchTree(tree, place.branch), h('div', {}, parts)) : parts;
}

const openBranch = (number) => go({ view: 't', row: place.row, branch: number });

function recordView(record, tokens) {
  const { ids, logprobs, differences, ...rest } = tokens;
  const lines = { ...record, ...rest, response_logprobs: `${logprobs.length} values: the Tokens tab has each` };
  return [h('p', { class: 'meta', text: 'The record as it lies on disk, keys as they are documented in conversations/trajectory.py.' }), textBlock(pretty(lines), 'code')];
}

function detailHead(row, found) {
  const tabs = Object.entries(TABS).filter(([tab]) => (tab !== 'diff' || summary.run.against) && (tab !== 'group' || rowsOfTask(column('task', row)).length > 1));
  const at = list.order.indexOf(row);
  const step = (by, label, glyph) => h('button', { class: 'quiet', type: 'button', 'aria-label': label, title: label, text: glyph, disabled: !(at >= 0 && at + by >= 0 && at + by < list.order.length), on: { click: () => openRow(list.order[at + by]) } });
  const size = rowsOfTask(column('task', row)).length;
  return h('header', { class: 'detail-head' },
    h('div', { class: 'title' },
      h('button', { class: 'quiet close', type: 'button', 'aria-label': 'Close', title: 'Close (Esc)', text: '×', on: { click: () => openPlace('list') } }),
      h('h2', { text: brief(column('id', row), 200), title: brief(column('id', row), 2000) }),
      found ? pill(found.record.stop_reason, tone(found.record.stop_reason)) : null,
      h('span', { class: 'grow' }),
      h('span', { class: 'meta', text: at < 0 ? 'outside the filters' : `${count(at + 1)} of ${count(list.order.length)}` }),
      step(-1, 'Previous (k)', '↑'), step(1, 'Next (j)', '↓')),
    h('nav', { class: 'tabs', 'aria-label': 'Parts of the trajectory' }, tabs.map(([tab, label]) =>
      h('a', { href: `#/${pathOf({ ...place, row, tab, position: null })}`, 'aria-current': tab === place.tab ? 'page' : null, text: tab === 'group' ? `${label} (${size})` : label, on: { click: (event) => { event.preventDefault(); go({ view: 't', row, tab }); } } }))));
}

function drawAbout() {
  const { manifest, total, name, against } = summary.run;
  const entries = Object.entries(manifest).filter(([key]) => !['config', 'tools'].includes(key));
  const part = (title, value) => (value === undefined ? null : h('details', { class: 'offered' }, h('summary', { text: title }), textBlock(typeof value === 'string' ? value : pretty(value), 'code')));
  fill($('about'), {}, [
    h('h2', { text: visible(name) }),
    rows < total ? h('p', { class: 'notice', text: limited() }) : null,
    h('dl', { class: 'about' }, [['trajectories', count(total)], ...(against ? [['compared with', against]] : []), ...entries].map(([key, value]) => h('div', {}, h('dt', { text: visible(key) }), h('dd', {}, aboutValue(value))))),
    part('config', manifest.config), part('tools', manifest.tools), h('p', { class: 'meta', text: 'Hashes are not checked here: turntrace verify does that.' })]);
}

function limited() {
  return `This page has the first ${count(rows)} of the run's ${count(summary.run.total)} trajectories. A larger --limit holds more; --serve has no limit.`;
}

/** An object's entries as lines of their own; what is nested deeper is JSON. */
function aboutValue(value) {
  if (value === undefined || value === null) return '–';
  if (typeof value !== 'object' || Array.isArray(value)) return textBlock(typeof value === 'string' ? value : JSON.stringify(value));
  const text = (part) => brief(typeof part === 'string' ? part : JSON.stringify(part), 400);
  return h('div', { class: 'pairs' }, Object.entries(value).map(([key, part]) => [h('span', { text: brief(key, 80) }), h('div', { text: text(part) })]));
}

function say(text) {
  $('notice').textContent = text;
  $('notice').hidden = !text;
}

// ------------------------------------------------------------------ keys

function onKey(event) {
  if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || document.querySelector('dialog[open]')) return;
  if (event.key === 'Escape') return escape(event);
  if (event.target.matches('input, textarea, select')) return enterList(event);
  const act = { ...MOVES, ...(place.view === 't' ? IN_DETAIL : {}) }[event.key];
  if (!act || (event.key === 'Enter' && event.target.matches('a, button, summary'))) return;
  if (SCROLLS.test(event.key) && event.target.id !== 'grid' && (place.view !== 'list' || event.target !== document.body)) return;
  event.preventDefault();
  act();
}

function enterList(event) {
  if (event.target.id !== 'search' || !['Enter', 'ArrowDown'].includes(event.key)) return;
  event.preventDefault();
  $('grid').focus();
}

function escape(event) {
  if (event.target.id === 'search') {
    if (filters.q) {
      event.target.value = '';
      changed({ q: '' });
    } else $('grid').focus();
    return;
  }
  if (!$('tip').hidden) hideTip();
  else if (place.view !== 'list') openPlace('list');
  $('grid').focus();
}

function move(by) {
  const open = place.view === 't';
  const here = open ? list.order.indexOf(place.row) : list.selected;
  select(here + by);
  if (open && list.order.length) openRow(list.order[list.selected]);
}

function moveTurn(by) {
  const turns = [...document.querySelectorAll('#detail .message')];
  const top = $('detail').querySelector('.detail-head').getBoundingClientRect().bottom;
  const here = turns.findLastIndex((element) => element.getBoundingClientRect().top <= top + 24);
  const next = turns[Math.max(0, Math.min(turns.length - 1, here + by))];
  if (next?.id) jumpTo(next.id);
}

const SCROLLS = /^(Arrow|Page|Home|End)/; // these move in the list only where nothing else is to be scrolled
const tabKey = (tab) => () => (tab !== 'diff' || summary.run.against ? openRow(place.row, tab) : null);
const MOVES = {
  j: () => move(1), k: () => move(-1), ArrowDown: () => move(1), ArrowUp: () => move(-1), PageDown: () => move(15), PageUp: () => move(-15), Home: () => move(-rows), End: () => move(rows),
  Enter: () => place.view === 'list' && list.order.length && openRow(list.order[list.selected]),
  '/': () => { if (place.view !== 'list' && place.view !== 't') openPlace('list'); $('search').focus(); $('search').select(); },
  '?': () => $('help').showModal(), l: () => openPlace('list'), s: () => openPlace('plots'),
};
const IN_DETAIL = { c: tabKey('conversation'), t: tabKey('tokens'), g: tabKey('group'), d: tabKey('diff'), r: tabKey('record'), n: () => moveTurn(1), p: () => moveTurn(-1) };

// ------------------------------------------------------------------ light and dark

const THEMES = { auto: '◐ Auto', light: '○ Light', dark: '● Dark' };

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $('theme').textContent = THEMES[theme];
  $('theme').setAttribute('aria-label', `Colours: ${theme}; press to change`);
  try {
    localStorage.setItem('turntrace-theme', theme);
  } catch {
    // A page from disk may have no storage: the choice then lasts as long as the page.
  }
}

function startTheme() {
  let kept = null;
  try {
    kept = localStorage.getItem('turntrace-theme');
  } catch {
    kept = null;
  }
  setTheme(Object.hasOwn(THEMES, kept ?? '') ? kept : 'auto');
  const names = Object.keys(THEMES);
  $('theme').addEventListener('click', () => setTheme(names[(names.indexOf(document.documentElement.dataset.theme) + 1) % names.length]));
}

function buildHelp() {
  $('help').replaceChildren(
    h('h2', { text: 'Keys' }),
    h('dl', {}, KEYS.map(([keys, does]) => h('div', {}, h('dt', {}, keys.split('  ').join(' ').split(' ').map((key) => h('kbd', { text: key }))), h('dd', { text: does })))),
    h('form', { method: 'dialog' }, h('button', { type: 'submit', text: 'Close' })));
  $('help-button').addEventListener('click', () => $('help').showModal());
}

// ------------------------------------------------------------------ start

async function start() {
  startTheme();
  buildHelp();
  if (typeof DecompressionStream === 'undefined') throw new Error('this browser is too old: it has no DecompressionStream');
  summary = JSON.parse(await inflate($('summary').textContent));
  rows = (summary.columns.id || []).length;
  readAddress();
  buildList();
  drawAbout();
  document.addEventListener('keydown', onKey);
  addEventListener('hashchange', () => {
    if (location.hash === shown) return;
    const before = filterParams().toString();
    readAddress();
    drawBar();
    if (filterParams().toString() !== before) refilter();
    show();
  });
  addEventListener('beforeprint', () => document.querySelectorAll('.tokens .batch').forEach((batch) => batch.make()));
  $('list').hidden = false;
  drawBar();
  refilter();
  show();
  document.documentElement.dataset.ready = '';
}

start().catch((error) => say(`This page cannot be shown: ${error.message}`));
