// What the page carries: the summary at once, a block of records when one of them is asked for.

const KEPT_BLOCKS = 12;
const blockCache = new Map();
let summary = null; // {columns, calls, names, run}
let rows = 0;
let pieceTable = null;

function fromBase64(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let at = 0; at < binary.length; at++) bytes[at] = binary.charCodeAt(at);
  return bytes;
}

async function inflate(base64) {
  const stream = new Blob([fromBase64(base64)]).stream().pipeThrough(new DecompressionStream('deflate'));
  return new Response(stream).text();
}

const parsed = new Promise((resolve) => {
  if (document.readyState !== 'loading') resolve();
  else document.addEventListener('DOMContentLoaded', resolve, { once: true });
});

async function blockText(number) {
  const { version } = document.documentElement.dataset;
  if (version) {
    const answer = await fetch(`blocks/${number}?v=${version}`);
    const text = await answer.text();
    if (!answer.ok) throw new Error(text);
    return inflate(text);
  }
  if (!$(`block-${number + 1}`)) await parsed; // the next one's start says that this one is whole
  const element = $(`block-${number}`);
  if (!element) throw new Error('this file is not whole: a part of its data is missing');
  return inflate(element.textContent);
}

/** The lines of a block; the last few are kept. */
function block(number) {
  let lines = blockCache.get(number);
  blockCache.delete(number);
  lines = lines || blockText(number).then((text) => text.split('\n'));
  blockCache.set(number, lines);
  lines.catch(() => blockCache.delete(number));
  if (blockCache.size > KEPT_BLOCKS) blockCache.delete(blockCache.keys().next().value);
  return lines;
}

/** A row's record, its counterpart's where the run is compared, and its branches' paths: `{record, tokens(), other, branch(n)}`. */
async function trajectory(row) {
  const lines = await block(column('block', row));
  const at = column('line', row);
  const one = (line) => ({ record: JSON.parse(lines[line]), tokens: () => readTokens(lines[line + 1]) });
  const other = column('other', row) === null ? null : one(at + 2);
  return { ...one(at), other, branch: (number) => one(branchLine(row, number)) };
}

/** The line of a sequence's text: the trunk's, or a branch's after those of the record and its counterpart. */
function branchLine(row, number) {
  const at = column('line', row);
  return number ? at + (column('other', row) === null ? 2 : 4) + 2 * (number - 1) : at;
}

function readTokens(line) {
  const tokens = JSON.parse(line);
  tokens.ids = tokens.prompt_ids.concat(tokens.response_ids);
  tokens.logprobs = unpack(tokens.logprobs);
  tokens.differences = tokens.differences ? unpack(tokens.differences) : null;
  return tokens;
}

function unpack(packed) {
  if (Array.isArray(packed)) return packed;
  const bytes = fromBase64(packed.f32 || packed.f64 || '');
  return packed.f32 ? new Float32Array(bytes.buffer) : new Float64Array(bytes.buffer);
}

const column = (name, row) => (summary.columns[name] ? summary.columns[name][row] : null);
const nameOf = (kind, place) => summary.names[kind][place];
const taskOf = (row) => nameOf('task', column('task', row));
const stopOf = (row) => nameOf('stop', column('stop', row));

function statusesOf(row) {
  const bits = column('statuses', row);
  return summary.names.status.filter((name, place) => Math.floor(bits / 2 ** place) % 2);
}

function rowsOfTask(task) {
  const found = [];
  for (let row = 0; row < rows; row++) if (summary.columns.task[row] === task) found.push(row);
  return found.sort((a, b) => column('sample', a) - column('sample', b));
}

/** The table of token texts, made when first asked for: id -> string or bytes. */
function pieceOf() {
  pieceTable = pieceTable || inflate($('pieces').textContent).then((text) => {
    const { ids, pieces, special } = JSON.parse(text);
    return { texts: new Map(ids.map((id, place) => [id, pieces[place]])), special: new Set(special) };
  });
  return pieceTable;
}

// ------------------------------------------------------------------ search

/** Which of `candidates` (by row) hold `words` in their texts; `progress(done, hits)` may return false to end it. */
async function search(words, candidates, progress) {
  const wanted = words.toLowerCase();
  const plain = /^[ !#-[\]-~]*$/.test(wanted); // JSON leaves these as they are, so a line without them need not be parsed
  const hits = new Set();
  let done = 0;
  for (const [number, members] of byBlock(candidates)) {
    const lines = (await blockText(number)).split('\n');
    for (const row of members) if (sequencesOf(row).some((one) => holds(row, lines[branchLine(row, one)], wanted, plain))) hits.add(row);
    done += members.length;
    if (progress(done, hits) === false) return null;
  }
  return hits;
}

const sequencesOf = (row) => Array.from({ length: 1 + (column('branches', row) || 0) }, (_, number) => number);

function byBlock(candidates) {
  const found = new Map();
  for (const row of candidates) {
    const number = column('block', row);
    if (!found.has(number)) found.set(number, []);
    found.get(number).push(row);
  }
  return found;
}

function holds(row, line, wanted, plain) {
  if (column('id', row).toLowerCase().includes(wanted)) return true;
  if (plain && !line.toLowerCase().includes(wanted)) return false;
  return texts(JSON.parse(line)).some((text) => text.toLowerCase().includes(wanted));
}

/** What a search looks at: messages, calls, answers, errors. */
function texts(record) {
  const found = [record.error];
  for (const message of record.messages) found.push(textOf(message.content), message.raw);
  for (const call of record.tool_calls) {
    found.push(call.name, call.response, call.full_response, call.error);
    found.push(typeof call.arguments === 'string' ? call.arguments : values(call.arguments));
  }
  return found.filter((text) => typeof text === 'string');
}

function values(value) {
  const found = [];
  const rest = [value];
  while (rest.length) {
    const next = rest.pop();
    if (next && typeof next === 'object') rest.push(...Object.values(next));
    else found.push(String(next));
  }
  return found.join('\n');
}
