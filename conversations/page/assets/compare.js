// Trajectories side by side: the samples of a task, or a replay beside what it replays.

const AROUND = 10; // tokens shown before and after the first that differs
const GROUP_LIMIT = 16; // samples made at once; more on request

async function groupView(row) {
  const members = rowsOfTask(column('task', row));
  const columns = h('div', { class: 'columns' });
  await addColumns(columns, members.slice(0, GROUP_LIMIT), row);
  const rest = members.slice(GROUP_LIMIT);
  const more = rest.length ? h('button', { class: 'more', type: 'button', text: `Show ${rest.length} more`, on: { click: () => addColumns(columns, rest, row).then(() => more.remove()) } }) : null;
  return h('div', { class: 'group' }, groupFacts(members), columns, more);
}

async function addColumns(columns, members, current) {
  for (const row of members) {
    const { record } = await trajectory(row);
    columns.append(h('section', { class: 'column', 'aria-label': `sample ${column('sample', row)}`, 'data-current': row === current },
      h('header', {},
        h('a', { href: addressOf(row), text: `sample ${column('sample', row)}` }),
        h('span', { class: 'reward', text: short(record.reward) }), pill(record.stop_reason, tone(record.stop_reason)),
        h('span', { class: 'meta', text: `${plural(record.num_turns, 'turn')} · ${plural(column('response', row), 'token')}` })),
      withoutPrompt(record)));
  }
}

/** What the samples share, the task's own messages, is left out. */
function withoutPrompt(record) {
  const first = record.messages.findIndex((message) => message.role === 'assistant' && typeof message.raw === 'string');
  return conversation({ ...record, messages: first < 0 ? [] : record.messages.slice(first) }, { plain: true });
}

function groupFacts(members) {
  const rewards = members.map((row) => column('reward', row)).filter((reward) => reward !== null);
  const mean = rewards.reduce((sum, reward) => sum + reward, 0) / rewards.length;
  const spread = Math.sqrt(rewards.reduce((sum, reward) => sum + (reward - mean) ** 2, 0) / rewards.length);
  const told = rewards.length ? `mean reward ${short(mean)}, standard deviation ${short(spread)}, best ${short(Math.max(...rewards))}` : 'no rewards';
  return h('p', { class: 'meta', text: `${plural(members.length, 'sample')} · ${told}` });
}

// ------------------------------------------------------------------ two runs

const turnOf = (parting) => (parting.turn === null ? 'prompt' : `turn ${parting.turn + 1}`);

async function differenceView(row) {
  const { record, tokens, other } = await trajectory(row);
  const [ours, theirs] = [tokens(), other.tokens()];
  const parting = column('differs', row);
  const against = summary.run.against;
  const table = differences(record, other.record, parting);
  const head = parting
    ? h('p', { class: 'verdict', 'data-tone': 'warn' }, `The first token that differs is at position ${count(parting.token)}, ${turnOf(parting)}.`)
    : h('p', { class: 'verdict', 'data-tone': 'ok' }, 'All tokens are the same.');
  const sides = h('div', { class: 'columns two' },
    side(summary.run.name, record, other.record), side(against, other.record, record));
  return h('div', { class: 'difference' }, head, parting ? await strip([summary.run.name, ours], [against, theirs], parting.token) : null, table, sides);
}

/** The tokens around the parting, one line a run. */
async function strip(...sides) {
  const at = sides.pop();
  const table = await pieceOf();
  const lines = sides.map(([name, tokens]) => {
    const view = { tokens, segment: 0, held: 0, decoder: newDecoder() };
    const from = Math.max(0, at - AROUND);
    const shown = [];
    for (let position = from; position < Math.min(tokens.ids.length, at + AROUND); position++) {
      const element = tokenElement(view, position, table);
      element.title = `position ${position}, id ${tokens.ids[position]}`;
      if (position === at) element.classList.add('parts');
      shown.push(element);
    }
    if (tokens.ids.length <= at) shown.push(h('span', { class: 'token parts', text: '(ends here)' }));
    return h('div', { class: 'line' }, h('span', { class: 'key', text: brief(name, 40) }), h('div', { class: 'tokens', 'data-mode': 'author' }, shown));
  });
  return h('div', { class: 'parting' }, lines);
}

/** What differs beside the tokens: how it ended, and the first call that was answered otherwise. */
function differences(record, other, parting) {
  const found = ['stop_reason', 'reward', 'num_turns'].filter((key) => JSON.stringify(record[key]) !== JSON.stringify(other[key]));
  const lines = found.map((key) => [key.replace('_', ' '), short(record[key]), short(other[key])]);
  const same = (a, b) => a && b && ['name', 'arguments', 'status', 'response'].every((key) => JSON.stringify(a[key]) === JSON.stringify(b[key]));
  const length = Math.max(record.tool_calls.length, other.tool_calls.length);
  for (let place = 0; place < length; place++) {
    const [ours, theirs] = [record.tool_calls[place], other.tool_calls[place]];
    if (same(ours, theirs)) continue;
    lines.push([`first call that differs: ${brief((ours || theirs).call_id, 40)}`, told(ours), told(theirs)]);
    break;
  }
  if (!lines.length) return parting ? null : h('p', { class: 'meta', text: 'Calls, answers, reward and stop reason are the same as well.' });
  return h('table', { class: 'plain' },
    h('thead', {}, h('tr', {}, h('th'), h('th', { text: summary.run.name }), h('th', { text: summary.run.against }))),
    h('tbody', {}, lines.map(([name, a, b]) => h('tr', {}, h('th', { scope: 'row', text: name }), h('td', { text: a }), h('td', { text: b })))));
}

const told = (call) => (call ? brief(`${call.name}(${typeof call.arguments === 'string' ? call.arguments : JSON.stringify(call.arguments)}) ${call.status}: ${call.response ?? '–'}`, 300) : 'no such call');

function side(name, record, other) {
  const shown = conversation(record, { plain: true });
  const place = record.messages.findIndex((message, at) => JSON.stringify(message) !== JSON.stringify(other.messages[at]));
  const mark = place < 0 ? null : [...shown.children].find((element) => element.dataset.at === messageAt(record, place));
  if (mark) {
    mark.classList.add('first-difference');
    mark.prepend(h('p', { class: 'mark', text: 'first difference' }));
  }
  return h('section', { class: 'column', 'aria-label': brief(name, 60) }, h('header', {}, h('span', { class: 'key', text: brief(name, 60) }), h('span', { class: 'reward', text: short(record.reward) }), pill(record.stop_reason, tone(record.stop_reason))), shown);
}

/** The article that shows a message: an answer's is that of the call's turn. */
function messageAt(record, place) {
  let at = '';
  let turn = -1;
  record.messages.slice(0, place + 1).forEach((message, index) => {
    const sampled = message.role === 'assistant' && typeof message.raw === 'string';
    if (sampled) turn += 1;
    if (sampled) at = `turn-${turn}`;
    else if (message.role !== 'tool' || !message.tool_call_id) at = `message-${index}`;
  });
  return at;
}
