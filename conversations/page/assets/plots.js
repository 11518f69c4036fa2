// Plots of what the filters leave: drawn from the summary, and each bar a way to filter further.

const [PLOT_W, PLOT_H, PLOT_LEFT, PLOT_BOTTOM] = [360, 150, 38, 22];

function drawPlots() {
  const kept = list.order;
  const of = (name) => Array.from(kept, (row) => column(name, row)).filter((value) => value !== null);
  const cards = [
    rewardPlot(of('reward')),
    barsPlot('Stop reasons', tally(Array.from(kept, stopOf)), (name) => changed({ stop: new Set([name]) }), tone),
    histogram('Turns', of('turns'), { whole: true }),
    histogram('Tokens after the prompt', of('response'), { whole: true, pick: (low, high) => changed({ length: [Math.ceil(low), Math.floor(high)] }) }),
    histogram('Tokens sampled', of('sampled'), { whole: true }),
    histogram('Time', of('wall'), { unit: seconds }),
    ...callPlots(kept),
  ];
  $('plots').replaceChildren(h('p', { class: 'meta', text: `Of ${trajectories(kept.length)}${kept.length === rows ? '' : `, as filtered, of ${count(rows)}`}. A bar opens the list with what it counts, where the list has a filter for it.` }), h('div', { class: 'cards' }, cards.filter(Boolean)));
}

function callPlots(kept) {
  const wanted = new Set(kept);
  const { row, tool, status, run_s: took } = summary.calls;
  const times = new Map();
  const statuses = [];
  for (let place = 0; place < row.length; place++) {
    if (!wanted.has(row[place])) continue;
    const name = nameOf('tool', tool[place]);
    statuses.push(nameOf('status', status[place]));
    if (!times.has(name)) times.set(name, []);
    if (took[place] !== null) times.get(name).push(took[place]);
  }
  if (!statuses.length) return [];
  return [barsPlot('Tool calls by status', tally(statuses), (name) => changed({ status: new Set([name]) }), tone), latencyPlot(times)];
}

function card(title, told, drawing) {
  return h('figure', { class: 'card' }, h('figcaption', {}, h('b', { text: title }), h('span', { class: 'meta', text: told })), drawing);
}

function tally(names) {
  const totals = new Map();
  for (const name of names) totals.set(name, (totals.get(name) || 0) + 1);
  return [...totals].sort((a, b) => b[1] - a[1]);
}

function quantile(ordered, part) {
  const at = (ordered.length - 1) * part;
  const low = Math.floor(at);
  return ordered[low] + (at - low) * ((ordered[low + 1] ?? ordered[low]) - ordered[low]);
}

// ------------------------------------------------------------------ histograms

function rewardPlot(values) {
  const pick = (low, high) => changed({ reward: [low, high] });
  const different = [...new Set(values)].sort((a, b) => a - b);
  if (!different.length) return card('Reward', 'none has one', h('p', { class: 'none', text: 'No trajectory here has a reward.' }));
  if (different.length > 12) return histogram('Reward', values, { pick });
  const totals = new Map(tally(values));
  const bars = different.map((value) => ({ label: short(value), total: totals.get(value), tip: `reward ${short(value)}`, pick: () => pick(value, value) }));
  return card('Reward', toldOf(values, short), bins(bars, different.map(short)));
}

function toldOf(values, unit) {
  const ordered = Float64Array.from(values).sort();
  const mean = ordered.reduce((sum, value) => sum + value, 0) / ordered.length;
  return `mean ${unit(mean)} · median ${unit(quantile(ordered, 0.5))} · 95% ${unit(quantile(ordered, 0.95))}`;
}

function histogram(title, values, { whole = false, unit = short, pick = null } = {}) {
  if (!values.length) return null;
  const low = values.reduce((a, b) => Math.min(a, b), Infinity);
  const high = values.reduce((a, b) => Math.max(a, b), -Infinity);
  const step = niceStep((high - low) / 20 || 1, whole);
  const from = Math.floor(low / step) * step;
  const totals = new Array(Math.floor((high - from) / step) + 1).fill(0);
  for (const value of values) totals[Math.min(totals.length - 1, Math.floor((value - from) / step))]++;
  const bars = totals.map((total, place) => {
    const [start, end] = [from + place * step, from + (place + 1) * step];
    const tip = whole && step === 1 ? unit(start) : `${unit(start)} to ${unit(whole ? end - 1 : end)}`;
    return { total, tip, pick: pick && (() => pick(start, whole ? end - 1 : end)) };
  });
  const edges = whole && step === 1 ? totals.map((total, place) => unit(from + place)) : null;
  return card(title, toldOf(values, unit), bins(bars, edges && edges.length <= 24 ? edges : null, [unit(from), unit(from + totals.length * step)]));
}

function niceStep(rough, whole) {
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((one) => one * power >= rough * 0.999) * power;
  return whole ? Math.max(1, Math.round(step)) : step;
}

function bins(bars, labels, ends) {
  const most = Math.max(1, ...bars.map((bar) => bar.total));
  const [wide, high] = [PLOT_W - PLOT_LEFT, PLOT_H - PLOT_BOTTOM - 8];
  const each = wide / bars.length;
  const gap = Math.min(2, each * 0.15);
  const width = Math.min(each - gap, 56);
  const shapes = bars.map((bar, place) => {
    const tall = bar.total ? Math.max(1.5, (high * bar.total) / most) : 0;
    const x = PLOT_LEFT + place * each + (each - width) / 2;
    return pickable(svg('rect', { class: 'column-bar', x, y: 8 + high - tall, width, height: tall, rx: Math.min(2, width / 4) }), `${bar.tip}: ${count(bar.total)}`, bar.total ? bar.pick : null);
  });
  const texts = labels
    ? labels.map((label, place) => (place % Math.ceil(labels.length / 12) ? null : axisText(PLOT_LEFT + (place + 0.5) * each, PLOT_H - 6, label, 'middle')))
    : [axisText(PLOT_LEFT, PLOT_H - 6, ends[0], 'start'), axisText(PLOT_W, PLOT_H - 6, ends[1], 'end')];
  return svg('svg', { class: 'plot', viewBox: `0 0 ${PLOT_W} ${PLOT_H}`, role: 'img', 'aria-label': bars.map((bar) => `${bar.tip}: ${bar.total}`).join('; ') },
    gridLine(8), gridLine(8 + high), axisText(PLOT_LEFT - 6, 12, count(most), 'end'), axisText(PLOT_LEFT - 6, 8 + high, '0', 'end'), shapes, texts);
}

const gridLine = (y) => svg('line', { class: 'grid-line', x1: PLOT_LEFT, x2: PLOT_W, y1: y, y2: y });
const axisText = (x, y, text, anchor) => svg('text', { class: 'axis', x, y, 'text-anchor': anchor }, visible(text));

function pickable(shape, label, pick) {
  shape.append(svg('title', {}, label));
  if (!pick) return shape;
  const go = () => {
    pick();
    openPlace('list');
  };
  shape.classList.add('pick');
  shape.addEventListener('click', go);
  return shape;
}

// ------------------------------------------------------------------ names, and latencies by tool

function barsPlot(title, totals, pick, toneOf) {
  const whole = totals.reduce((sum, [, total]) => sum + total, 0);
  const most = Math.max(1, ...totals.map(([, total]) => total));
  const lines = totals.slice(0, 12).map(([name, total]) => {
    const bar = h('span', { class: 'fill', 'data-tone': toneOf(name) });
    bar.style.width = `${(100 * total) / most}%`;
    return h('button', { type: 'button', class: 'name-bar', title: `${visible(name)}: ${count(total)}`, on: { click: () => { pick(name); openPlace('list'); } } },
      h('span', { class: 'name', text: brief(name, 60) }), h('span', { class: 'track' }, bar), h('span', { class: 'total', text: count(total) }), h('span', { class: 'part', text: `${((100 * total) / whole).toFixed(1)}%` }));
  });
  const rest = totals.length > 12 ? ` · ${totals.length - 12} more` : '';
  return card(title, `${count(whole)} in all${rest}`, h('div', { class: 'name-bars' }, lines));
}

/** A line a tool on a logarithmic axis: 5% to 95%, the middle half thick, the median marked. */
function latencyPlot(times) {
  const named = [...times].filter(([, all]) => all.length).sort((a, b) => b[1].length - a[1].length).slice(0, 10);
  if (!named.length) return null;
  const stats = named.map(([name, all]) => {
    const ordered = Float64Array.from(all).sort();
    const at = (part) => Math.max(1e-6, quantile(ordered, part));
    return { name, total: all.length, p: [0.05, 0.25, 0.5, 0.75, 0.95].map(at), most: Math.max(1e-6, ordered[ordered.length - 1]) };
  });
  const low = Math.floor(Math.log10(Math.min(...stats.map((one) => one.p[0]))));
  const high = Math.max(low + 1, Math.ceil(Math.log10(Math.max(...stats.map((one) => one.most)))));
  const x = (value) => 4 + ((PLOT_W - 8) * (Math.log10(value) - low)) / (high - low);
  const line = 34;
  const tall = stats.length * line + 22;
  const ticks = Array.from({ length: high - low + 1 }, (_, place) => 10 ** (low + place));
  return card('Tool latency', 'median, middle half, 5% to 95%, slowest', svg('svg', { class: 'plot', viewBox: `0 0 ${PLOT_W} ${tall}`, role: 'img', 'aria-label': stats.map((one) => `${visible(one.name)}: median ${seconds(one.p[2])}, 95% ${seconds(one.p[4])}`).join('; ') },
    ticks.map((value, place) => [svg('line', { class: 'grid-line', x1: x(value), x2: x(value), y1: 0, y2: tall - 18 }), axisText(Math.min(PLOT_W - 2, Math.max(2, x(value))), tall - 5, decade(value), place === 0 ? 'start' : value === ticks[ticks.length - 1] ? 'end' : 'middle')]),
    stats.map((one, place) => latencyLine(one, 12 + place * line, x))));
}

const decade = (value) => (value < 0.001 ? `${Math.round(value * 1e6)} µs` : value < 1 ? `${Math.round(value * 1000)} ms` : `${Math.round(value)} s`);

function latencyLine({ name, total, p, most }, y, x) {
  const told = `${brief(name, 60)}: ${count(total)} calls, median ${seconds(p[2])}, 95% ${seconds(p[4])}, slowest ${seconds(most)}`;
  return svg('g', {}, svg('title', {}, told),
    axisText(4, y, `${brief(name, 28)}  ${seconds(p[2])}`, 'start'),
    svg('line', { class: 'whisker', x1: x(p[0]), x2: x(p[4]), y1: y + 9, y2: y + 9 }),
    svg('rect', { class: 'half', x: x(p[1]), y: y + 5, width: Math.max(1.5, x(p[3]) - x(p[1])), height: 8, rx: 2 }),
    svg('rect', { class: 'median', x: x(p[2]) - 1, y: y + 3, width: 2, height: 12 }),
    svg('circle', { class: 'slowest', cx: x(most), cy: y + 9, r: 2 }));
}
