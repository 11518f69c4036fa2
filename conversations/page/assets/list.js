// The list: filters, order, and a table of which only the rows in sight exist.

const ROW = 38; // pixels, as the style sheet has it
const OVERSCAN = 6;

const COLUMNS = [
  { key: 'id', label: 'Trajectory', wide: true },
  { key: 'preview', label: 'Asked', sort: false },
  { key: 'stop', label: 'Stop reason' },
  { key: 'reward', label: 'Reward', number: true },
  { key: 'turns', label: 'Turns', number: true },
  { key: 'response', label: 'Tokens', number: true, title: 'Tokens after the prompt' },
  { key: 'calls', label: 'Calls', number: true },
  { key: 'wall', label: 'Time', number: true },
];

const filters = { q: '', stop: new Set(), status: new Set(), reward: [null, null], length: [null, null], flags: new Set(), sort: '' };
const FLAGS = { infra: 'infrastructure failed', clean: 'all calls ok', warned: 'has warnings', differs: 'differs from the other run' };
const list = { order: new Int32Array(0), selected: 0, hits: null, searching: 0, pool: [], drawn: '' };

// ------------------------------------------------------------------ filters, and the part of the address that names them

function readFilters(params) {
  const range = (text) => (text || '..').split('..').map((part) => (part === '' || !Number.isFinite(Number(part)) ? null : Number(part)));
  const set = (text) => new Set((text || '').split(',').filter(Boolean));
  Object.assign(filters, { q: params.get('q') || '', stop: set(params.get('stop')), status: set(params.get('status')) });
  Object.assign(filters, { flags: set(params.get('only')), sort: params.get('sort') || '' });
  filters.reward = range(params.get('reward')).concat(null).slice(0, 2);
  filters.length = range(params.get('length')).concat(null).slice(0, 2);
}

function filterParams() {
  const params = new URLSearchParams();
  const put = (key, text) => text && params.set(key, text);
  const range = ([low, high]) => (low === null && high === null ? '' : `${low ?? ''}..${high ?? ''}`);
  put('q', filters.q);
  put('stop', [...filters.stop].join(','));
  put('status', [...filters.status].join(','));
  put('reward', range(filters.reward));
  put('length', range(filters.length));
  put('only', [...filters.flags].join(','));
  put('sort', filters.sort);
  return params;
}

const inside = (value, [low, high]) =>
  (low === null && high === null) || (value !== null && (low === null || value >= low) && (high === null || value <= high));

function passes(row) {
  const bits = column('statuses', row);
  const has = (name) => Math.floor(bits / 2 ** summary.names.status.indexOf(name)) % 2 === 1;
  return (
    (!filters.stop.size || filters.stop.has(stopOf(row))) &&
    (!filters.status.size || [...filters.status].some(has)) &&
    inside(column('reward', row), filters.reward) &&
    inside(column('response', row), filters.length) &&
    [...filters.flags].every((flag) => flagged(flag, row, bits))
  );
}

function flagged(flag, row, bits) {
  if (flag === 'infra') return column('infra', row) === 1;
  if (flag === 'clean') return bits <= 1;
  if (flag === 'warned') return column('warnings', row) > 0;
  return flag !== 'differs' || Boolean(column('differs', row));
}

/** Rows by the filters, in the order asked for; a text search runs after it and takes away what does not match. */
function refilter() {
  const passing = [];
  for (let row = 0; row < rows; row++) if (passes(row)) passing.push(row);
  list.passing = passing;
  list.hits = null;
  searchTexts(passing);
  reorder();
}

function reorder() {
  const kept = list.hits ? list.passing.filter((row) => list.hits.has(row)) : list.passing;
  const current = list.order[list.selected];
  list.order = Int32Array.from(sorted(kept));
  list.selected = Math.max(0, list.order.indexOf(current));
  drawCount();
  drawRows(true);
}

function sorted(kept) {
  const key = filters.sort.replace(/^-/, '');
  if (!COLUMNS.some((one) => one.key === key && one.sort !== false)) return kept;
  const values = key === 'stop' ? kept.map(stopOf) : kept.map((row) => column(key, row));
  const sign = filters.sort.startsWith('-') ? -1 : 1;
  const places = kept.map((row, place) => place);
  places.sort((a, b) => {
    const [x, y] = [values[a], values[b]];
    if (x === y) return a - b;
    if (x === null || y === null) return x === null ? 1 : -1;
    return x < y ? -sign : sign;
  });
  return places.map((place) => kept[place]);
}

async function searchTexts(candidates) {
  const mine = ++list.searching;
  const bar = $('search-progress');
  bar.hidden = true;
  $('grid').setAttribute('aria-busy', String(filters.q !== ''));
  if (!filters.q) return;
  list.hits = new Set();
  let drawn = performance.now();
  const progress = (done, hits) => {
    if (mine !== list.searching) return false;
    list.hits = hits;
    if (performance.now() - drawn < 120) return true;
    drawn = performance.now();
    bar.hidden = false;
    bar.max = candidates.length;
    bar.value = done;
    reorder();
    return true;
  };
  try {
    await search(filters.q, candidates, progress);
  } catch (error) {
    say(`The search ended early: ${error.message}`);
  }
  if (mine !== list.searching) return;
  bar.hidden = true;
  reorder();
  $('grid').setAttribute('aria-busy', 'false');
}

// ------------------------------------------------------------------ the bar of filters

function buildList() {
  const box = h('input', { id: 'search', type: 'search', placeholder: 'Search ids and texts', 'aria-label': 'Search ids and texts', autocomplete: 'off', spellcheck: 'false' });
  let wait = 0;
  box.addEventListener('input', () => {
    clearTimeout(wait);
    wait = setTimeout(() => changed({ q: box.value.trim() }), 180);
  });
  const bar = h('div', { class: 'bar', role: 'search' },
    h('div', { class: 'searchbox' }, box, h('progress', { id: 'search-progress', hidden: true, 'aria-label': 'Searching' })),
    choiceMenu('Stop reason', 'stop', counted('stop')),
    choiceMenu('Tool status', 'status', counted('status')),
    rangeMenu('Reward', 'reward', 'any'),
    rangeMenu('Length', 'length', '1'),
    choiceMenu('Only', 'flags', flagCounts()),
    h('button', { id: 'clear', class: 'quiet', type: 'button', text: 'Clear', on: { click: () => changed({ q: '', stop: new Set(), status: new Set(), flags: new Set(), reward: [null, null], length: [null, null] }) } }),
    h('span', { id: 'count', role: 'status' }));
  const head = h('div', { class: 'row head', role: 'row' }, COLUMNS.map(headCell));
  const grid = h('div', { id: 'grid', role: 'grid', tabindex: '0', 'aria-label': 'Trajectories', 'aria-colcount': String(COLUMNS.length) },
    h('div', { role: 'rowgroup', class: 'headgroup' }, head),
    h('div', { id: 'space', role: 'rowgroup' }));
  grid.addEventListener('scroll', () => drawRows(false), { passive: true });
  new ResizeObserver(() => drawRows(true)).observe(grid);
  $('list').replaceChildren(bar, grid);
}

function headCell(one) {
  const cell = h('span', { class: `cell c-${one.key}`, role: 'columnheader', title: one.title });
  if (one.sort === false) cell.textContent = one.label;
  else cell.append(h('button', { type: 'button', text: one.label, on: { click: () => changed({ sort: nextSort(one) }) } }));
  return cell;
}

/** First the way one looks for: most of a number, the alphabet of a name; then the other way; then the file's order. */
function nextSort({ key, number }) {
  const ways = number ? [`-${key}`, key] : [key, `-${key}`];
  return filters.sort === ways[0] ? ways[1] : filters.sort === ways[1] ? '' : ways[0];
}

function counted(kind) {
  const totals = new Map(summary.names[kind].map((name) => [name, 0]));
  for (let row = 0; row < rows; row++) {
    for (const name of kind === 'stop' ? [stopOf(row)] : statusesOf(row)) totals.set(name, totals.get(name) + 1);
  }
  return [...totals].filter(([, total]) => total > 0).map(([name, total]) => [name, name, total]);
}

function flagCounts() {
  return Object.entries(FLAGS).map(([flag, label]) => {
    let total = 0;
    for (let row = 0; row < rows; row++) if (flagged(flag, row, column('statuses', row))) total++;
    return [flag, label, total];
  }).filter(([flag]) => flag !== 'differs' || summary.run.against);
}

function menu(label, ...content) {
  const button = h('summary', {}, h('span', { class: 'label', text: label }), h('span', { class: 'value' }));
  const details = h('details', { class: 'menu', name: 'filter' }, button, h('div', { class: 'sheet' }, content));
  details.addEventListener('keydown', (event) => {
    if (event.key !== 'Escape' || !details.open) return;
    details.open = false;
    button.focus();
    event.stopPropagation();
  });
  return details;
}

function choiceMenu(label, key, choices) {
  const boxes = choices.map(([value, text, total]) => {
    const box = h('input', { type: 'checkbox', 'data-key': key, 'data-value': value });
    box.addEventListener('change', () => {
      const next = new Set(filters[key]);
      if (box.checked) next.add(value);
      else next.delete(value);
      changed({ [key]: next });
    });
    return h('label', { class: 'choice' }, box, h('span', { text: visible(text) }), h('span', { class: 'total', text: count(total) }));
  });
  const made = menu(label, boxes.length ? boxes : h('p', { class: 'none', text: 'There are none in this run.' }));
  made.dataset.filter = key;
  return made;
}

function rangeMenu(label, key, step) {
  const input = (place, name) => {
    const box = h('input', { type: 'number', step, 'aria-label': `${label}, ${name}`, placeholder: name, 'data-range': key, 'data-place': place });
    box.addEventListener('change', () => {
      const next = [...filters[key]];
      next[place] = box.value === '' ? null : Number(box.value);
      changed({ [key]: next });
    });
    return box;
  };
  const unit = key === 'length' ? 'Tokens after the prompt' : 'Reward';
  const made = menu(label, h('p', { class: 'none', text: unit }), h('div', { class: 'range' }, input(0, 'from'), h('span', { text: '–' }), input(1, 'to')));
  made.dataset.filter = key;
  return made;
}

/** Brings the bar in line with the filters. */
function drawBar() {
  if ($('search') !== document.activeElement) $('search').value = filters.q;
  for (const box of document.querySelectorAll('#list input[data-key]')) box.checked = filters[box.dataset.key].has(box.dataset.value);
  for (const box of document.querySelectorAll('#list input[data-range]')) {
    if (box !== document.activeElement) box.value = filters[box.dataset.range][box.dataset.place] ?? '';
  }
  for (const made of document.querySelectorAll('#list .menu')) {
    const value = filters[made.dataset.filter];
    const text = value instanceof Set ? (value.size > 1 ? String(value.size) : [...value][0] || '') : value.some((part) => part !== null) ? `${value[0] ?? ''}–${value[1] ?? ''}` : '';
    made.querySelector('.value').textContent = visible(FLAGS[text] || text);
    made.toggleAttribute('data-active', text !== '');
  }
  const params = filterParams();
  params.delete('sort');
  $('clear').hidden = ![...params].length;
  COLUMNS.forEach((one, place) => {
    const way = filters.sort === one.key ? 'ascending' : filters.sort === `-${one.key}` ? 'descending' : 'none';
    if (one.sort !== false) document.querySelectorAll('#grid .head .cell')[place].setAttribute('aria-sort', way);
  });
}

function drawCount() {
  const whole = rows < summary.run.total ? `first ${count(rows)} of ${count(summary.run.total)}` : trajectories(rows);
  $('count').textContent = list.order.length === rows ? whole : `${count(list.order.length)} of ${count(rows)}`;
  $('count').title = rows < summary.run.total ? limited() : '';
}

// ------------------------------------------------------------------ rows in sight

function drawRows(fresh) {
  const grid = $('grid');
  if (!grid || !summary || $('list').hidden) return;
  const space = $('space');
  const head = grid.firstChild.offsetHeight;
  const first = Math.max(0, Math.floor((grid.scrollTop - head) / ROW) - OVERSCAN);
  const last = Math.min(list.order.length, first + Math.ceil(grid.clientHeight / ROW) + 2 * OVERSCAN);
  const sight = `${first}-${last}`;
  if (!fresh && sight === list.drawn) return;
  list.drawn = sight;
  space.style.height = `${list.order.length * ROW}px`;
  grid.setAttribute('aria-rowcount', String(list.order.length + 1));
  while (list.pool.length < last - first) list.pool.push(newRow(space));
  list.pool.forEach((element, place) => drawRow(element, first + place < last ? first + place : -1));
  grid.setAttribute('aria-activedescendant', `row-${list.order[list.selected]}`);
  space.dataset.empty = list.order.length ? '' : 'No trajectory matches these filters.';
}

function newRow(space) {
  const element = h('div', { class: 'row', role: 'row' }, COLUMNS.map((one) => h('span', { class: `cell c-${one.key}`, role: 'gridcell' })));
  element.addEventListener('click', () => {
    list.selected = element.place;
    openRow(list.order[element.place]);
  });
  space.append(element);
  return element;
}

function drawRow(element, place) {
  element.hidden = place < 0;
  if (place < 0) return;
  const row = list.order[place];
  element.place = place;
  element.style.transform = `translateY(${place * ROW}px)`;
  element.setAttribute('aria-selected', String(place === list.selected));
  if (element.row === row) return;
  element.row = row;
  element.id = `row-${row}`;
  element.setAttribute('aria-rowindex', String(place + 2));
  const [id, preview, stop, reward, turns, response, calls, wall] = element.children;
  drawId(id, row);
  preview.textContent = brief(column('preview', row), 160);
  stop.replaceChildren(dot(tone(stopOf(row))), visible(stopOf(row)));
  drawReward(reward, row);
  turns.textContent = count(column('turns', row));
  response.textContent = count(column('response', row));
  calls.replaceChildren(...callMarks(row), count(column('calls', row)));
  wall.textContent = seconds(column('wall', row));
}

/** The sample at the end of an id stays in sight however narrow the column. */
function drawId(cell, row) {
  const [, stem, tail] = /^(.*?)(-[^-]{0,12})?$/su.exec(brief(column('id', row), 120));
  cell.replaceChildren(h('span', { class: 'stem', text: stem }), tail || '');
}

function drawReward(cell, row) {
  const reward = column('reward', row);
  cell.replaceChildren(column('infra', row) ? h('span', { class: 'flag', text: 'infra', title: 'infrastructure failed: no reward' }) : short(reward));
  cell.dataset.sign = reward === null ? 'none' : reward > 0 ? 'plus' : 'zero';
}

const dot = (kind) => h('i', { class: 'dot', 'data-tone': kind, 'aria-hidden': 'true' });

function callMarks(row) {
  const marks = statusesOf(row).filter((name) => !['ok', 'external'].includes(name)).map((name) => h('i', { class: 'dot', 'data-tone': tone(name), role: 'img', 'aria-label': visible(name), title: visible(name) }));
  if (column('differs', row)) marks.unshift(h('span', { class: 'flag', text: `≠ ${turnOf(column('differs', row))}` }));
  return marks;
}

/** Moves the selection and keeps it in sight; opens it where a trajectory is open already. */
function select(place) {
  if (!list.order.length) return;
  list.selected = Math.max(0, Math.min(list.order.length - 1, place));
  const grid = $('grid');
  const head = grid.firstChild.offsetHeight;
  const top = list.selected * ROW;
  if (top < grid.scrollTop) grid.scrollTop = top;
  else if (top + ROW + head > grid.scrollTop + grid.clientHeight) grid.scrollTop = top + ROW + head - grid.clientHeight;
  drawRows(true);
}
