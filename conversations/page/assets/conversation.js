// One conversation: its messages, each call with its answer, and where the time went.

const INDENT = 2;

/** The messages of a record, as articles. A tool message stands with the call that it answers. */
function conversation(record, options = {}) {
  const calls = new Map(record.tool_calls.map((call) => [call.call_id, call]));
  const placed = new Set();
  let turn = -1;
  const parts = record.messages.map((message, place) => {
    const sampled = message.role === 'assistant' && typeof message.raw === 'string';
    if (sampled) turn += 1;
    if (message.role === 'tool' && placed.has(message.tool_call_id)) return null;
    const own = sampled ? ownCalls(message, calls, turn, placed) : [];
    const answers = own.map((call) => callCard(call, answerTo(record, call), record));
    const at = sampled ? `turn-${turn}` : `message-${place}`;
    const shown = [h('header', {}, h('span', { class: 'role', text: visible(message.role) }), h('span', { class: 'meta', text: metaOf(record, message, sampled ? turn : -1) }))];
    if (message.reasoning_content) shown.push(thinking(message.reasoning_content));
    if (textOf(message.content).trim() || !answers.length) shown.push(...content(message, record));
    if (!sampled && Array.isArray(message.tool_calls)) shown.push(...message.tool_calls.map(givenCall));
    return h('article', { class: 'message', 'data-role': message.role, 'data-at': at, id: options.plain ? null : at, tabindex: options.plain ? null : '-1' }, shown, answers);
  });
  const left = record.tool_calls.filter((call) => !placed.has(call.call_id));
  return h('div', { class: 'conversation' }, folded(record, parts, options), left.map((call) => callCard(call, null, record)));
}

/** The messages, with those that a branch has from its parents folded, and the places where branches depart. */
function folded(record, parts, { own, tree = [] }) {
  const sampled = record.messages.flatMap((message, place) => (message.role === 'assistant' && typeof message.raw === 'string' ? [place] : []));
  const number = own ? own.number : 0;
  for (const one of tree) {
    const article = one.number && one.parent === number ? parts[sampled[one.turn - 1]] : null;
    if (article) article.append(h('p', { class: 'departs' }, branchLink(one, `Branch ${one.number} departs here: ${one.reason}`)));
  }
  if (!own || own.turn === null) return parts;
  const end = sampled[own.turn - 1] + 1;
  const before = parts.slice(0, end).filter(Boolean);
  return [h('details', { class: 'parents' }, h('summary', { text: `${plural(before.length, 'message')} before it, of ${own.parent ? `branch ${own.parent}` : 'the trunk'}` }), before), ...parts.slice(end)];
}

// ------------------------------------------------------------------ branches of a session

function branchLink(one, label) {
  return h('a', { href: `#/${pathOf({ ...place, branch: one.number, tab: 'conversation', position: null })}`, text: label, on: { click: (event) => { event.preventDefault(); event.stopPropagation(); openBranch(one.number); } } });
}

/** The sequences of a session, each below its parent; folded but for the way to the one that is shown. */
function branchTree(tree, shown) {
  const below = (number) => tree.filter((one) => one.number && (one.parent ?? 0) === number);
  const holds = (number) => number === shown || below(number).some((one) => holds(one.number));
  const node = (one) => {
    const name = one.number ? `${one.number} ${one.reason}` : 'trunk';
    const children = below(one.number);
    const more = children.length ? ` · ${count(children.length)} ${children.length === 1 ? 'branch' : 'branches'}` : '';
    const label = h('span', { class: 'branch', 'aria-current': one.number === shown ? 'true' : null }, branchLink(one, name),
      h('span', { class: 'meta', text: `${one.turn === null ? '' : `after turn ${one.turn} · `}${plural(one.turns, 'turn')} · ${count(one.sampled)} sampled${more}` }),
      h('span', { class: 'meta', text: brief(one.preview, 60) }));
    if (!children.length) return h('li', {}, label);
    return h('li', {}, h('details', { open: shown > 0 && holds(one.number) }, h('summary', {}, label), h('ul', {}, children.map(node))));
  };
  return h('nav', { class: 'branches', 'aria-label': 'Sequences of the session' }, h('ul', {}, node(tree[0])));
}

function content(message, record) {
  const empty = textOf(message.content) === '';
  return empty ? [h('div', { class: 'text none', text: '(empty)' })] : said(message.content, record);
}

/** What a model thought, folded: often long, and not the answer. */
function thinking(text) {
  const block = h('details', { class: 'thinking' }, h('summary', { text: `Thinking, ${plural(String(text).length, 'character')}` }));
  block.addEventListener('toggle', () => block.childElementCount === 1 && block.append(textBlock(text)));
  return block;
}

function ownCalls(message, calls, turn, placed) {
  const named = (message.tool_calls || []).map((call) => calls.get(call.id)).filter(Boolean);
  const more = [...calls.values()].filter((call) => call.turn === turn && !named.includes(call));
  const own = [...named, ...more];
  own.forEach((call) => placed.add(call.call_id));
  return own;
}

const answerTo = (record, call) => record.messages.find((message) => message.role === 'tool' && message.tool_call_id === call.call_id) || null;

function metaOf(record, message, turn) {
  if (turn < 0) return message.role === 'assistant' ? 'given' : message.name ? brief(message.name, 80) : '';
  const found = record.turns[turn];
  if (!found) return `turn ${turn + 1}`;
  const cached = found.cached_tokens ? ` (${count(found.cached_tokens)} cached)` : '';
  return [`turn ${turn + 1}`, plural(found.end - found.start, 'token'), `prompt ${count(found.prompt_tokens)}${cached}`, seconds(found.engine_s), visible(found.finish_reason), ...resumedAt(found)].join(' · ');
}

const resumedAt = (turn) => (turn.resumed || []).map(([at, weights]) => `resumed at token ${count(at)}${weights === null ? '' : ` (weights ${brief(weights, 40)})`}`);

// ------------------------------------------------------------------ calls

function callCard(call, answer, record) {
  const reward = typeof call.reward === 'number' ? `step reward ${short(call.reward)}` : '';
  return h('section', { class: 'call', 'data-status': call.status, 'aria-label': brief(`call of ${call.name}`, 100) },
    h('header', {}, h('span', { class: 'name', text: brief(call.name || '(no name)', 120) }), pill(call.status, tone(call.status)),
      h('span', { class: 'meta', text: [tookOf(call), reward].filter(Boolean).join(' · ') })),
    h('div', { class: 'arguments' }, argumentsOf(call.arguments)),
    response(call, answer, record),
    cropped(call, record),
    call.error ? h('div', { class: 'error' }, h('span', { class: 'tag', text: 'error, for the reader of the record' }), textBlock(call.error)) : null,
    call.attempts.length > 1 ? attempts(call) : null,
    Object.keys(call.metrics || {}).length ? h('p', { class: 'meta metrics', text: pairs(call.metrics) }) : null);
}

/** What a call took: its times, its tries, what came back and how much of that the model does not see. */
function tookOf({ attempts: tries, queue_s: queued, run_s: ran, status }) {
  if (status === 'external') return 'run by the agent program';
  if (!tries.length) return 'not run';
  const last = tries[tries.length - 1];
  const parts = [queued > 0.0005 ? `queued ${seconds(queued)}` : '', `ran ${seconds(ran)}`, tries.length > 1 ? `${tries.length} attempts` : ''];
  if (typeof last.bytes === 'number') parts.push(plural(last.bytes, 'byte'));
  if (last.tokens_cut > 0) parts.push(`${plural(last.tokens_cut, 'token')} cut`);
  return parts.filter(Boolean).join(' · ');
}

function argumentsOf(value) {
  if (typeof value === 'string') return textBlock(value, 'code');
  const entries = Object.entries(value || {});
  if (!entries.length) return h('p', { class: 'meta', text: 'no arguments' });
  return entries.map(([key, part]) => h('div', { class: 'argument' }, h('span', { class: 'key', text: brief(key, 120) }), textBlock(typeof part === 'string' ? part : pretty(part), 'code')));
}

/** A flat object on one line. */
function pairs(value) {
  const told = (part) => (typeof part === 'number' ? short(part) : typeof part === 'string' ? part : JSON.stringify(part));
  return brief(Object.entries(value).filter(([, part]) => part !== null).map(([key, part]) => `${key} ${told(part)}`).join(' · '), 400);
}

const pretty = (value) => JSON.stringify(value, null, INDENT);

function response(call, answer, record) {
  const shown = answer ? answer.content : unseen(call);
  if (shown === null || shown === undefined) return h('p', { class: 'meta', text: 'no response' });
  const parts = [h('span', { class: 'tag', text: answer ? 'response' : 'response, not shown to the model' }), ...said(shown, record, 'code')];
  if (typeof call.full_response === 'string') {
    const whole = h('details', { class: 'whole' }, h('summary', { text: `Cut for the model: the whole has ${count(call.full_response.length)} characters` }));
    whole.addEventListener('toggle', () => whole.childElementCount === 1 && whole.append(textBlock(call.full_response, 'code')));
    parts.push(whole);
  }
  return h('div', { class: 'response' }, parts);
}

/** What a call answered that the model was not shown: its images, then its text. */
function unseen(call) {
  const images = (call.images || []).map((image) => ({ type: 'image', image }));
  return images.length ? [...images, { type: 'text', text: call.response ?? '' }] : call.response;
}

function attempts(call) {
  const line = (one) => ` queued ${seconds(one.queue_s)}, ran ${seconds(one.run_s)} ${brief([one.error_class, one.error].filter(Boolean).join(': '), 300)}`;
  return h('ol', { class: 'attempts' }, call.attempts.map((one) => h('li', {}, pill(one.status, tone(one.status)), line(one))));
}

function givenCall(call) {
  const { name, arguments: given } = call.function || {};
  return h('section', { class: 'call' }, h('header', {}, h('span', { class: 'name', text: brief(name, 120) }), h('span', { class: 'meta', text: 'given' })), textBlock(given, 'code'));
}

// ------------------------------------------------------------------ where the time went

/** Turns one after another: the engine's queue, the engine, then a turn's calls side by side. Times add up, not clock times. */
function timeline(record) {
  const bars = [];
  let at = 0;
  record.turns.forEach((turn, place) => {
    for (const [kind, length] of [['queue', turn.queue_s], ['engine', turn.engine_s]]) {
      if (length > 0) bars.push({ kind, at, length, lane: 0, turn: place, label: kind === 'queue' ? 'waited for the engine' : 'engine' });
      at += length || 0;
    }
    const own = record.tool_calls.filter((call) => call.turn === place);
    own.forEach((call, lane) => bars.push({ kind: 'tool', at: at + call.queue_s, length: call.run_s, lane: lane % 4, turn: place, label: call.name }));
    at += Math.max(0, ...own.map((call) => call.queue_s + call.run_s));
  });
  if (!(at > 0)) return null;
  const lanes = 1 + Math.max(...bars.map((bar) => bar.lane));
  const strip = h('div', { class: 'strip', role: 'img', 'aria-label': `${plural(record.turns.length, 'turn')} in ${seconds(at)}` });
  strip.style.setProperty('--lanes', lanes);
  strip.append(...bars.map((bar) => barElement(bar, at)));
  return h('div', { class: 'timeline' }, strip, legend([['queue', 'queue'], ['engine', 'engine'], ['tool', 'tools']], seconds(at)));
}

function barElement(bar, whole) {
  const element = h('span', { class: 'bar-part', 'data-kind': bar.kind, title: `turn ${bar.turn + 1} · ${brief(bar.label, 60)} · ${seconds(bar.length)}`, on: { click: () => jumpTo(`turn-${bar.turn}`) } });
  element.style.left = `${(100 * bar.at) / whole}%`;
  element.style.width = `max(2px, ${(100 * bar.length) / whole}%)`;
  element.style.setProperty('--lane', bar.lane);
  return element;
}

function legend(entries, ...more) {
  return h('p', { class: 'legend' }, entries.map(([kind, label]) => h('span', {}, h('i', { class: 'swatch', 'data-kind': kind }), label)), more.map((text) => h('span', { class: 'meta', text })));
}

function jumpTo(id) {
  const target = $(id);
  if (!target) return;
  target.scrollIntoView({ block: 'start', behavior: matchMedia('(prefers-reduced-motion: reduce)').matches ? 'auto' : 'smooth' });
  target.focus({ preventScroll: true });
}

// ------------------------------------------------------------------ the rest of the record

function facts(record, row, own) {
  const parts = Object.entries(record.reward_parts || {});
  const entries = [
    ['Reward', short(record.reward) + (parts.length > 1 ? ` = ${parts.map(([name, value]) => `${brief(name, 40)} ${short(value)}`).join(' + ')}` : '')],
    ...(typeof record.advantage === 'number' ? [['Advantage', short(record.advantage)]] : []),
    ['Turns', own && own.number ? `${count(own.turns)} in this branch` : record.num_turns],
    ['Tokens', own && own.number ? `${count(own.sampled)} sampled in this branch` : `${count(column('prompt', row))} prompt, ${count(column('response', row))} after it, ${count(column('sampled', row))} of them sampled`],
    ['Time', seconds(record.wall_s)],
    ['Ground truth', record.ground_truth === null ? '–' : brief(typeof record.ground_truth === 'string' ? record.ground_truth : JSON.stringify(record.ground_truth), 80)],
  ];
  return h('dl', { class: 'facts' }, entries.map(([name, value]) => h('div', {}, h('dt', { text: name }), h('dd', { text: visible(value) }))));
}

function remarks(record) {
  const found = [];
  if (record.infra_error) found.push(['infra', 'Infrastructure failed: this trajectory has no reward and is left out of exports.']);
  if (record.error) found.push(['bad', record.error]);
  for (const warning of record.warnings || []) found.push(['warn', `${warning.kind}: ${warning.text}`]);
  if (record.parent) found.push(['note', `From ${pairs(record.parent)}`]);
  return found.map(([kind, text]) => h('div', { class: 'remark', 'data-tone': kind }, textBlock(text)));
}

function offered(tools) {
  if (!Array.isArray(tools) || !tools.length) return null;
  const names = tools.map((tool) => tool.function?.name ?? '?');
  const details = h('details', { class: 'offered' }, h('summary', { text: `${plural(tools.length, 'tool')} offered: ${brief(names.join(', '), 200)}` }));
  details.addEventListener('toggle', () => details.childElementCount === 1 && details.append(textBlock(pretty(tools), 'code')));
  return details;
}
